"""Runs over quantised bases: one theta for all parties, and the mask as an artifact that is made once."""

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import config, fedzo, make_data, options, run

from fedzo import engine, experiment
from fedzo.config import Config
from fedzo.errors import LedgerError, SpaceError
from fedzo.experiment import Experiment, open_experiment
from fedzo.federation.coordinator import Coordinator
from fedzo.federation.ledger import Ledger
from fedzo.report import summarise, verify
from fedzo.run_folder import RunFolder
from fedzo.spaces import Mask

pytest.importorskip("bitsandbytes")
SPARSE: dict[str, Any] = {
    "space__kind": "sparse", "space__mask": "sensitive", "space__density": 0.001, "space__calibration_examples": 6,
    "model__client_quantisation": "nf4, int8, none", "evaluation__every": 0, "data__test": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mixed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with clients on nf4, int8 and float32."""
    path = tmp_path_factory.mktemp("mixed") / "run"
    run(path, config(data, **SPARSE)).close()
    return path


@pytest.fixture
def no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Mask:
        raise AssertionError("a mask was made that the run already has")

    monkeypatch.setattr(experiment, "sensitive_mask", forbidden)


def digest(ledger: Ledger, chosen: Config) -> str:
    """Of theta, replayed by a party with this configuration from what the ledger keeps."""
    party = open_experiment(chosen, ledger)
    engine.check_same(ledger, party)
    assert verify(ledger, party) == ledger.rounds
    replica = party.replica(ledger.spec)
    for entry in ledger.read():
        replica.apply([entry.records()])
    return replica.digest().hex()


def test_one_theta_on_all_bases(data: Path, mixed: Path, tmp_path: Path, no_mask_is_made: None) -> None:
    chosen = config(data, **SPARSE)
    with Ledger(mixed / "ledger.sqlite") as ledger:
        figures = summarise(ledger)
        assert figures["bases"] == {"int8": 1, "nf4": 1, "none": 1}
        assert figures["accepted"] == 9 and figures["dropped"] == {}
        assert figures["artifact_bytes"] == 3 * len(ledger.artifact(ledger.spec.mask))
        digests = {digest(ledger, chosen.on_base(base)) for base in ("none", "nf4", "fp4", "int8")}
        assert digests == {figures["theta_digest"]}
        # What a party on a base in 4 bits sees is another model: only theta is the same.
        whole, coarse = (open_experiment(chosen.on_base(base), ledger) for base in ("none", "nf4"))
    batch = whole.client_data(0).batch([0, 1, 2, 3])
    assert not torch.equal(
        whole.evaluator.scores(whole.theta0(), batch), coarse.evaluator.scores(whole.theta0(), batch)
    )
    assert torch.equal(whole.theta0(), coarse.theta0())


def test_the_replicas_of_all_bases_end_alike(data: Path, tmp_path: Path) -> None:
    chosen = config(data, **SPARSE)
    party = Experiment(chosen)
    bases = engine.Bases(chosen, party.spec(), lambda own: party.on_base(own.model.quantisation))
    folder = RunFolder.create(tmp_path / "run", chosen)
    with engine.run(party, folder, connect=lambda e, c: engine.in_process(e, c, bases)) as ledger:
        last = list(ledger.read())[-2].digest  # where the last plan brought the clients
    digests = {base: replica.digest() for base, (_, replica) in bases.kept.items()}
    assert digests == dict.fromkeys(("nf4", "int8", "none"), last)
    assert bases.kept["none"][0] is party


def test_a_run_goes_on_with_the_mask_of_its_ledger(
    data: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception):
        pass

    class Stopper:
        def round(self, summary: object) -> None:
            raise StopError

        def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None: ...

    chosen = config(data, **SPARSE)
    folder = RunFolder.create(tmp_path / "run", chosen)
    with pytest.raises(StopError):
        engine.run(Experiment(chosen), folder, [Stopper()])
    calls: list[int] = []
    monkeypatch.setattr(experiment, "sensitive_mask", lambda *args, **kwargs: calls.append(1))
    for command in (
        ("resume", folder.path),
        ("verify", folder.path),
        ("evaluate", folder.path, "--split", "validation"),
    ):
        answer = fedzo(*command, "--json")
        assert answer.code == 0, answer.err
    assert calls == []
    with Ledger(folder.ledger) as ledger, Ledger(mixed / "ledger.sqlite") as whole:
        assert ledger.head == whole.head
        assert summarise(ledger)["artifact_bytes"] == summarise(whole)["artifact_bytes"]


def test_inspect_shows_the_bases(mixed: Path) -> None:
    assert "int8 1, nf4 1, none 1" in fedzo("inspect", mixed).out


@pytest.mark.parametrize("statement", ["DELETE FROM artifacts", "UPDATE artifacts SET data = substr(data, 1, 99)"])
def test_a_damaged_mask_in_the_ledger_is_named(
    statement: str, data: Path, mixed: Path, tmp_path: Path, no_mask_is_made: None
) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes((mixed / "ledger.sqlite").read_bytes())
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()
    with Ledger(path) as ledger:
        for call in (lambda: open_experiment(config(data, **SPARSE), ledger), lambda: verify(ledger, None)):
            with pytest.raises(LedgerError, match=f"artifact {ledger.spec.mask[:12]} is missing or damaged"):
                call()


def test_the_run_s_mask_against_a_file(data: Path, mixed: Path, tmp_path: Path) -> None:
    with Ledger(mixed / "ledger.sqlite") as ledger:
        own = Mask.from_bytes(ledger.artifact(ledger.spec.mask))
        assert hashlib.sha256(own.to_bytes()).hexdigest() == ledger.spec.mask
        path = tmp_path / "mask.safetensors"
        own.save(path)
        named = config(data, **{**SPARSE, "space__mask": str(path)})
        engine.check_same(ledger, open_experiment(named, ledger))
        Mask(own.fingerprint, own.method, {**own.settings, "note": 1}, own.entries).save(path)
        with pytest.raises(SpaceError, match=f"holds the mask .*, the run's is {own.hash[:12]}"):
            open_experiment(named, ledger)
        path.unlink()  # it may have been made on another machine
        engine.check_same(ledger, open_experiment(named, ledger))
    with pytest.raises(SpaceError, match=r"mask file .* does not exist"):
        Experiment(named)


@pytest.mark.parametrize(
    "changes",
    [
        {"space__mask": "forward"},
        {"space__mask": "magnitude", "space__per_tensor": True},
        {"space__kind": "adapter", "space__rank": 2},
        {"space__kind": "full", "space__include": "*norm*"},
        {"space__kind": "full", "space__include": "*norm*", "model__compute_dtype": "bfloat16"},
    ],
)
def test_other_spaces_over_mixed_bases(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    chosen = config(data, **{**SPARSE, "model__quantisation": "nf4", **changes})
    with run(tmp_path / "run", chosen) as ledger:
        figures = summarise(ledger)
        assert figures["accepted"] == 9
        plain = chosen.model_copy(update={"model": chosen.model.model_copy(update={"compute_dtype": "float32"})})
        assert digest(ledger, plain.on_base("none")) == figures["theta_digest"]


def test_quantised_weights_cannot_be_trained_whole(data: Path) -> None:
    with pytest.raises(SpaceError, match=r"parameter .* is quantised .*cannot be trained"):
        Experiment(config(data, model__quantisation="nf4"))


def test_calibration_on_a_text(data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    changes = {**SPARSE, "space__calibration": str(text), "model__max_length": 16}
    text.write_text("the room was clean and the view was lovely . " * 40, encoding="utf-8")
    made = Experiment(config(data, **changes)).mask
    assert made is not None and made.method == "sensitive" and made.settings["examples"] == 6
    assert str(tmp_path) not in str(made.settings)
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(Exception, match="too short"):
        Experiment(config(data, **changes))
    text.unlink()
    with pytest.raises(Exception, match=r"calibration text .* cannot be read"):
        Experiment(config(data, **changes))
    assert fedzo("run", *options(data, **changes), "--out", tmp_path / "none").code == 1
    assert not (tmp_path / "none").exists()


def test_clients_with_another_mask_are_refused(data: Path, mixed: Path, tmp_path: Path) -> None:
    with Ledger(mixed / "ledger.sqlite") as ledger:
        party = open_experiment(config(data, **SPARSE), ledger)
        other = Experiment(config(data, **{**SPARSE, "space__density": 0.002}))
        coordinator = Coordinator(ledger, party.replica(ledger.spec))
        hello = other.worker(0, party.replica(ledger.spec)).hello()
        with pytest.raises(Exception, match="client 0 refused: its mask is"):
            coordinator.admit(hello)
