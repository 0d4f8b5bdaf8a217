"""The engine on the embedded model: the same ledger again, and for each choice a replay to the recorded theta."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import config, make_data, run

from fedzo import engine, spaces
from fedzo.errors import FedzoError, LedgerError, RunError, SpaceError
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator, RoundSummary, replay
from fedzo.federation.ledger import Ledger
from fedzo.report import summarise, verify
from fedzo.run_folder import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three rounds."""
    path = tmp_path_factory.mktemp("plain") / "run"
    run(path, config(data)).close()
    return path


def head(path: Path) -> str:
    with Ledger(path / "ledger.sqlite") as ledger:
        return ledger.head.hex()


def test_same_config_and_seed_give_the_same_ledger(data: Path, plain: Path, tmp_path: Path) -> None:
    with run(tmp_path / "again", config(data)) as again:
        assert again.head.hex() == head(plain)
    with run(tmp_path / "threads", config(data, runtime__threads=2)) as threads:
        assert threads.head.hex() == head(plain)
    with run(tmp_path / "seed", config(data, seed=1)) as seed:
        assert seed.head.hex() != head(plain)


def test_evaluation_does_not_change_the_ledger(data: Path, plain: Path, tmp_path: Path) -> None:
    with run(tmp_path / "r", config(data, evaluation__every=0, evaluation__limit=5, evaluation__batch_size=3)) as other:
        assert other.head.hex() == head(plain)
        assert sorted(other.evaluations("validation")) == sorted(other.evaluations("test")) == [0, 3]


VARIANTS: dict[str, dict[str, Any]] = {
    "some clients": {"data__clients": 4, "federation__clients_per_round": 2, "federation__rounds": 5},
    "rate": {"data__clients": 4, "federation__client_rate": 0.5, "federation__rounds": 4},
    "independent": {"federation__seeds": "independent", "federation__aggregation": "uniform"},
    "pool": {"federation__seeds": "pool", "federation__pool_size": 8},
    "weighted pool": {"federation__seeds": "weighted-pool", "federation__pool_size": 8, "federation__local_steps": 2},
    "one-point": {"method__estimator": "one-point"},
    "one forward": {"method__estimator": "p-rge"},
    "normalised": {"method__estimator": "fzoo", "method__queries": 3},
    "derivatives": {"method__estimator": "forward-gradient"},
    "local steps": {"federation__local_steps": 2, "method__schedule": "cosine", "method__warmup_steps": 2},
    "uniform": {"federation__aggregation": "uniform", "method__directions": "gaussian"},
    "median": {"federation__aggregation": "median", "method__schedule": "linear"},
    "trimmed mean": {"federation__aggregation": "trimmed-mean", "federation__trim": 0.34},
    "digest at times": {"federation__digest_every": 2, "federation__rounds": 5},
    "some parameters": {"space__include": "*norm*"},
    "random mask": {"space__kind": "sparse", "space__density": 0.01},
    "mask by magnitude": {"space__kind": "sparse", "space__mask": "magnitude", "space__exclude": "*embed*"},
    "lora": {"space__kind": "adapter", "space__rank": 2, "space__targets": "q_proj, v_proj"},
    "dirichlet": {"data__partition": "dirichlet", "data__alpha": 1.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_choice_replays_to_the_recorded_theta(name: str, data: Path, tmp_path: Path) -> None:
    chosen = config(data, evaluation__every=0, data__test="", **VARIANTS[name])
    with run(tmp_path / "run", chosen) as ledger:
        fresh = Experiment(chosen)
        engine.check_same(ledger, fresh)
        digests = sum(1 for r in range(ledger.rounds) if ledger.spec.has_digest(r))
        assert verify(ledger, fresh) == digests > 0
        figures = summarise(ledger)
        assert figures["rounds"] == ledger.spec.rounds == chosen.federation.rounds
        assert figures["accepted"] > 0
        assert figures["dropped"] == {}
        assert all(np.isfinite(entry.scalars).all() for entry in ledger.read())
        moved = fresh.replica(ledger.spec)
        replay(ledger, moved)
        assert not torch.equal(moved.theta, fresh.theta0())


def test_language_modelling_on_a_text_file(tmp_path: Path) -> None:
    for name, count in (("train", 30), ("test", 6)):
        text = "\n\n".join(f"the {name} room {n} was clean , and the view was lovely ." for n in range(count))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    chosen = config(
        tmp_path, task__name="lm", data__validation="", data__validation_fraction=0.2, model__max_length=24,
        data__clients=2, method__learning_rate=1e-4,
    )  # fmt: skip
    with run(tmp_path / "run", chosen) as ledger:
        assert verify(ledger, Experiment(chosen)) == 3
        figures = summarise(ledger)
    assert figures["test_perplexity"] > 1
    assert figures["test_perplexity"] == pytest.approx(np.exp(figures["test_loss"]), rel=1e-5)
    assert "test_accuracy" not in figures


def test_a_run_goes_on_after_any_round(data: Path, plain: Path, tmp_path: Path) -> None:
    """Stopped by an exception after each round in turn, the run ends with the ledger of an uninterrupted one."""

    class StopError(Exception):
        pass

    class Stopper:
        def round(self, summary: RoundSummary) -> None:
            raise StopError

        def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None:
            pass

    folder = RunFolder.create(tmp_path / "run", config(data))
    experiment = Experiment(config(data))
    for _ in range(3):
        with pytest.raises(StopError):
            engine.run(experiment, folder, [Stopper()])
    with engine.run(experiment, folder) as ledger:
        assert ledger.head.hex() == head(plain)
        assert sorted(ledger.evaluations("validation")) == [0, 2, 3]
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert sum('"round"' in line.split(",")[0] for line in lines) == 3


def test_lost_clients_are_counted(data: Path, tmp_path: Path) -> None:
    """A transport that loses client 1 and changes a byte of client 2: the run goes on with the others, and verifies."""
    chosen = config(data, evaluation__every=0)

    def connect(experiment: Experiment, coordinator: Coordinator) -> engine.Transport:
        whole = engine.in_process(experiment, coordinator)

        def exchange(parcels: Sequence[engine.Parcel]) -> Iterable[engine.Parcel]:
            for client, answer in whole.exchange([parcel for parcel in parcels if parcel[0] != 1]):
                yield client, answer[:-1] if client == 2 else answer

        return engine.Transport(exchange)

    folder = RunFolder.create(tmp_path / "run", chosen)
    with engine.run(Experiment(chosen), folder, connect=connect) as ledger:
        figures = summarise(ledger)
        assert figures["dropped"] == {"malformed": 3, "no-reply": 3}
        assert [entry.clients for entry in ledger.read()] == [(0,)] * 3
        assert verify(ledger, Experiment(chosen)) == 3


def test_one_process_at_a_time(data: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config(data))
    with folder.locked(), pytest.raises(RunError, match="another process"), folder.locked():
        pass


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method__learning_rate": 0.5}, "learning_rate"),
        ({"space__kind": "sparse"}, "space"),
        ({"data__limit": 30}, "experiment"),
        ({"federation__rounds": 9}, "rounds"),
    ],
)
def test_another_experiment_is_refused_by_field(change: dict[str, Any], named: str, data: Path, plain: Path) -> None:
    with Ledger(plain / "ledger.sqlite") as ledger, pytest.raises(LedgerError, match=f"another run: its {named} "):
        engine.check_same(ledger, Experiment(config(data, **change)))


def test_a_mask_file_is_a_space_of_its_own_model_only(data: Path, tmp_path: Path) -> None:
    experiment = Experiment(config(data, space__kind="sparse", space__mask="magnitude", space__density=0.02))
    path = tmp_path / "mask.safetensors"
    mask = spaces.draw_mask(experiment.loaded.model, 0.02, "magnitude", experiment.loaded.fingerprint)
    mask.save(path)
    chosen = config(data, space__kind="sparse", space__mask=str(path), evaluation__every=0, data__test="")
    with run(tmp_path / "run", chosen) as ledger:
        assert ledger.spec.space_hash == experiment.space.hash
        assert verify(ledger, Experiment(chosen)) == 3
    replace(mask, fingerprint="0" * 64).save(path)
    with pytest.raises(SpaceError, match="another model"):
        Experiment(chosen)


def test_rounds_are_chosen_by_name_or_number(plain: Path) -> None:
    with Ledger(plain / "ledger.sqlite") as ledger:
        assert engine.choose_round(ledger, "last") == 3
        assert engine.choose_round(ledger, "0") == 0
        quality = {r: m["accuracy"] for r, m in ledger.evaluations("validation").items()}
        best = engine.choose_round(ledger, "best")
        assert best == min(r for r in quality if quality[r] == max(quality.values()))
        for text in ("4", "-1", "first", "1.0", ""):
            with pytest.raises(RunError, match="a number up to 3"):
                engine.choose_round(ledger, text)


def test_half_of_a_ledger_gives_the_theta_recorded_there(data: Path, plain: Path) -> None:
    experiment = Experiment(config(data))
    with Ledger(plain / "ledger.sqlite") as ledger:
        for rounds in (1, 2):
            replica = experiment.replica(ledger.spec)
            replay(ledger, replica, rounds)
            assert replica.digest() == next(ledger.read(rounds - 1)).digest


def test_answers_need_a_plan(data: Path) -> None:
    experiment = Experiment(config(data))
    replica = experiment.replica(experiment.spec())
    worker = experiment.worker(0, replica)
    with pytest.raises(FedzoError):
        engine.answer(worker, experiment.evaluator, b"no message")
