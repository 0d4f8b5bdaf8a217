"""Figures, verification and plots of runs that are written by hand, and the files that are written along a run."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_spec, theta0

from fedzo.config import Config
from fedzo.errors import LedgerError, RunError
from fedzo.federation.coordinator import RoundSummary
from fedzo.federation.ledger import NO_DIGEST, Ledger, LedgerRound
from fedzo.federation.randomness import round_seeds
from fedzo.federation.replica import Replica
from fedzo.report import plot, summarise, traffic, verify
from fedzo.run_folder import MetricsLog, RunFolder, strict_json


class Base:
    """Stands for an experiment: only a replica is asked of it."""

    def __init__(self, shift: float = 0.0) -> None:
        self._shift = shift

    def replica(self, spec: Any) -> Replica:
        return Replica(spec, lambda: theta0() + self._shift)


def summary(round_: int, loss: float | None = 0.5, **changes: Any) -> RoundSummary:
    values = {
        "round": round_, "sampled": 4, "accepted": 4, "dropped": {}, "loss": loss, "bytes_down": 400, "bytes_up": 40,
        "artifact_bytes": 7, "scalars": 3, "max_scalar": 1.5,
    }  # fmt: skip
    return RoundSummary(**{**values, **changes})


def write(path: Path, rounds: int = 3, wrong: int | None = None, **changes: Any) -> Ledger:
    """A ledger with rounds whose digests are right, but for the one of round `wrong`."""
    spec = make_spec(**changes)
    ledger = Ledger.create(path / "ledger.sqlite", spec)
    replica = Replica(spec, theta0)
    for number in range(rounds):
        seeds = round_seeds(spec.seed, "shared", number, 0, (spec.local_steps, spec.queries), None)
        scalars = torch.linspace(-1, 1, seeds.size).reshape(seeds.shape).numpy()
        entry = LedgerRound(number, seeds, scalars, (0, 2), NO_DIGEST)
        replica.apply([entry.records()])
        digest = replica.digest() if spec.has_digest(number) else NO_DIGEST
        entry = LedgerRound(number, seeds, scalars, (0, 2), b"?" * 32 if number == wrong else digest)
        ledger.append(entry, vars(summary(number)))
    return ledger


def test_traffic_is_of_an_average_client(tmp_path: Path) -> None:
    with write(tmp_path) as ledger:
        sent, spec = traffic(ledger), ledger.spec
    assert sent.up == [10, 20, 30]
    assert sent.down == [100, 200, 300]
    assert sent.weights_up == [4 * spec.size * n for n in (1, 2, 3)]
    assert sent.model_up == [4 * spec.parameters * n for n in (1, 2, 3)]


def test_figures(tmp_path: Path) -> None:
    with write(tmp_path) as ledger:
        empty = summarise(ledger)
        assert "best_round" not in empty and "bases" not in empty and empty["artifact_bytes"] == 21
        of = {"examples": 9, "compute_dtype": "float32"}
        ledger.record_members({0: {**of, "quantisation": "nf4"}, 3: {**of, "quantisation": "int8"}})
        ledger.record_members({1: {**of, "quantisation": "nf4"}, 2: {**of, "quantisation": "none"}})
        ledger.record_members({3: {**of, "quantisation": "none", "compute_dtype": "bfloat16"}})
        assert summarise(ledger)["bases"] == {"nf4": 2, "none": 1, "none in bfloat16": 1}
        assert "test_loss" not in empty
        for rounds, accuracy in ((0, 0.5), (2, 0.75), (3, 0.75)):
            ledger.record_evaluation(rounds, "validation", {"loss": 1.0, "accuracy": accuracy})
        figures = summarise(ledger)
        last = next(ledger.read(2))
    assert figures["theta_digest"] == last.digest.hex()
    assert (figures["records"], figures["accepted"], figures["dropped"]) == (9, 12, {})
    assert (figures["validation_accuracy_before"], figures["validation_accuracy"]) == (0.5, 0.75)
    assert figures["best_round"] == 2  # the earliest of equals


def test_figures_of_a_run_without_rounds(tmp_path: Path) -> None:
    with write(tmp_path, rounds=0) as ledger:
        figures = summarise(ledger)
        assert figures["theta_digest"] == ledger.spec.theta0
        assert "bytes_up_per_client" not in figures
        with pytest.raises(RunError, match="no rounds to plot"):
            plot(ledger, tmp_path)


def test_verify_names_the_first_bad_round(tmp_path: Path) -> None:
    seen: list[int] = []
    with write(tmp_path, wrong=1) as ledger:
        assert verify(ledger, None) == 0
        with pytest.raises(LedgerError, match="round 1 replays to another theta"):
            verify(ledger, Base(), seen.append)  # type: ignore[arg-type]
        with pytest.raises(LedgerError, match="another model"):
            verify(ledger, Base(shift=1.0))  # type: ignore[arg-type]
    assert seen == [1]


def test_verify_counts_the_digests(tmp_path: Path) -> None:
    with write(tmp_path, rounds=5, digest_every=2) as ledger:
        wanted = sum(ledger.spec.has_digest(number) for number in range(5))
        assert verify(ledger, Base()) == wanted < 5  # type: ignore[arg-type]


def test_plots_of_language_modelling_and_of_lost_rounds(tmp_path: Path) -> None:
    with write(tmp_path) as ledger:
        entry = LedgerRound(
            3, *(part[:, :0] for part in (next(ledger.read()).seeds, next(ledger.read()).scalars)), (), NO_DIGEST
        )
        ledger.append(entry, vars(summary(3, None, accepted=0, dropped={"no-reply": 4})))
        ledger.record_evaluation(0, "test", {"loss": 2.0, "perplexity": 7.4})
        names = {path.name for path in plot(ledger, tmp_path)}
        assert summarise(ledger)["dropped"] == {"no-reply": 4}
    assert names == {"loss.png", "perplexity.png", "bytes.png"}
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_plot_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with write(tmp_path) as ledger:
        (tmp_path / "loss.png").mkdir()
        with pytest.raises(RunError, match=r"cannot write .*loss\.png"):
            plot(ledger, tmp_path)


# What is written along a run.


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond a size: for their writers the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def test_metrics_are_made_anew_from_the_ledger(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, Config())
    with write(tmp_path) as ledger:
        folder.metrics.write_text('{"event": "round", "round": 0}\n{"half')
        log = MetricsLog(folder, ledger)
        log.evaluation(3, "test", {"loss": float("nan"), "accuracy": 0.5})
        log.close()
    assert [line["round"] for line in lines(folder)[:3]] == [0, 1, 2]
    assert lines(folder)[3] == {"event": "evaluation", "rounds": 3, "split": "test", "loss": None, "accuracy": 0.5}


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder.create(tmp_path, Config())
    with write(tmp_path) as ledger:
        for _ in range(2):  # on resume they are made anew, not doubled
            log = MetricsLog(folder, ledger)
            log.round(summary(3, 0.25, dropped={"late": 2}))
            log.evaluation(4, "validation", {"loss": 0.125, "accuracy": 0.75})
            log.close()
    events = accumulator.EventAccumulator(str(folder.events))
    events.Reload()
    read = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert read["round/loss"] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25)]
    assert read["round/dropped"][-1] == (4, 2.0)
    assert read["validation/accuracy"] == [(4, 0.75)]


@pytest.mark.parametrize("full", ["metrics.jsonl", "events.out"])
def test_a_full_disk_under_the_metrics_is_one_error(
    full: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(tmp_path, Config())
    with write(tmp_path) as ledger:
        log = MetricsLog(folder, ledger)
        if full == "events.out":
            if log._events is None:
                pytest.skip("tensorboard is not installed")
            for number in range(3, 63):  # until the events are the larger file
                log.round(summary(number))
            size = next(folder.events.iterdir()).stat().st_size
            assert size > folder.metrics.stat().st_size + 200
        else:
            size = folder.metrics.stat().st_size
        with full_disk(size), pytest.raises(RunError, match=f"cannot write .*{full}.*; committed rounds are intact"):
            log.round(summary(3))
        log.close()
        MetricsLog(folder, ledger).close()
    assert [line["round"] for line in lines(folder)] == [0, 1, 2]
    assert "Traceback" not in capfd.readouterr().err


def test_strict_json() -> None:
    value = {"a": float("inf"), "b": {"c": float("nan"), "d": 0.1}, "e": True, "f": None}
    assert json.loads(strict_json(value)) == {"a": None, "b": {"c": None, "d": 0.1}, "e": True, "f": None}
