"""What the comparisons here share: cells of work with a file each, learning rates chosen on validation data, curves.

A cell is any picklable object with a `name`; a result is JSON. A comparison that is stopped goes on where it was.
"""

import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from fedzo import engine
from fedzo.errors import ConfigError, FedzoError, SpaceError
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.files import write_atomically
from fedzo.run_folder import RunFolder, strict_json
from fedzo.runtime import keep_memory

FACTOR = 3.0  # between neighbouring learning rates
PRELOAD = [
    "fedzo.engine",
    "transformers.models.auto.modeling_auto",
    "flwr_datasets.partitioner",
    "tensorboard.summary.writer.record_writer",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.compat.proto.summary_pb2",
]

Result = dict[str, Any]


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


class MissingError(Exception):
    """A cell failed or has not been done; the message says which, or why."""


@dataclass(frozen=True)
class Player:
    """Gives a cell's result: from its file, else by doing it in a process of its own.

    Attributes:
        out: folder of NAME.json for a cell that is done, NAME.failed (the reason, one line) for one that failed.
        work: does a cell; None: no cell is done, files are only read.
        start: how its process starts, see `apart`.
        describe: a result in a few words, to be printed.
    """

    out: Path
    work: Callable[[Any], Result] | None
    start: str = "forkserver"
    describe: Callable[[Result], str] = str

    def __call__(self, cell: Named) -> Result:
        """The result.

        Raises:
            MissingError: there is none.
        """
        path, failed = self.out / f"{cell.name}.json", self.out / f"{cell.name}.failed"
        if not path.exists() and self.work is not None:
            failed.unlink(missing_ok=True)
            code = apart(self.start, _do, cell, self.work, self.out)
            if not path.exists() and not failed.exists():
                note_failure(self.out, cell, f"its process ended with exit code {code}")
            done = self.describe(json.loads(path.read_text())) if path.exists() else failed.read_text().strip()
            print(f"{cell.name}: {done}", flush=True)
        if not path.exists():
            raise MissingError(failed.read_text().strip() if failed.exists() else f"{cell.name} has not been done")
        found: Result = json.loads(path.read_text())
        return found


def apart(start: str, function: Callable[..., object], *arguments: object) -> int | None:
    """Calls a function in a process of its own, to its end; that process's exit code, or None where it did not start.

    Args:
        start: "forkserver": a new process with the imports of `PRELOAD`; "fork": one with all that this one holds.
    """
    context: Any = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=function, args=arguments)
    try:
        process.start()
    except (EOFError, OSError):  # the server of forks was killed; the next call starts another
        return None
    process.join()
    return process.exitcode  # type: ignore[no-any-return]


def note_failure(out: Path, cell: Named, error: Exception | str) -> None:
    """Writes why a cell failed, in one line; a configuration or space that cannot be is no failure of the program."""
    kind = "not valid" if isinstance(error, ConfigError | SpaceError) else "failed"
    known = isinstance(error, str | FedzoError)
    reason = f"{kind}: {error}" if known else f"{kind}: {type(error).__name__}: {error}"
    write_atomically(out / f"{cell.name}.failed", " ".join(reason.split()) + "\n")


def _do(cell: Named, work: Callable[[Any], Result], out: Path) -> None:
    """A process of its own."""
    keep_memory()
    started = time.perf_counter(), time.process_time()
    try:
        result = work(cell)
    except Exception as error:
        note_failure(out, cell, error)
        if not isinstance(error, FedzoError):
            raise
    else:
        took = {"seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}
        write_atomically(out / f"{cell.name}.json", strict_json(result | took))


class Clock:
    """An observer that notes when rounds end, in seconds of the process's own CPU time: neighbours do not count."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def round(self, summary: RoundSummary | None) -> None:
        self.times.append(time.process_time())

    def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        pass

    def seconds_a_round(self) -> float:
        """The median, so that rounds with an evaluation between them do not count."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else math.nan


def train(experiment: Experiment, folder: RunFolder, clock: Clock) -> tuple[Result, Ledger]:
    """A run, to its end: its result, and its ledger, open."""
    ledger = engine.run(experiment, folder, [clock])
    return {
        "trainable": ledger.spec.size,
        "rounds": ledger.spec.rounds,
        "ledger_hash": ledger.head.hex(),
        "cpu_seconds_a_round": clock.seconds_a_round(),
        "validation": dict(sorted(ledger.evaluations("validation").items())),
        "test": dict(sorted(ledger.evaluations("test").items())),
    }, ledger


def endpoints(evaluations: Mapping[str, Any], name: str) -> tuple[float, float]:
    """A metric at the first and the last evaluation; infinite where it was not finite."""
    values = [_read(metrics[name]) for metrics in evaluations.values()]
    return values[0], values[-1]


def _read(metric: float | None) -> float:
    """JSON has no infinity."""
    return math.inf if metric is None else metric


def next_exponent(tried: Mapping[int, float], up: bool = False) -> int:
    """Where to look next, in powers of the factor: the untried neighbour of the lowest loss.

    Of two such the smaller one first, with `up` the larger.
    """
    best = min(tried, key=lambda k: tried[k], default=0)
    near = {best + d for d in range(-len(tried), len(tried) + 1)} - set(tried)
    return min(near, key=lambda k: (abs(k - best), -k if up else k))


def tune(play: Callable[[C], Result], start: C, trial: Callable[[float], C], trials: int, up: bool = False) -> float:
    """The learning rate with the lowest validation loss at the end of its trial.

    Args:
        play: gives a cell's result.
        start: the cell whose result says where to begin.
        trial: the cell that tries a learning rate.
        trials: how many, each beside the best so far.
        up: larger rates first, where the first one is a careful one.

    Raises:
        MissingError: a part of the search failed or is not there.
    """
    first: float = play(start)["learning_rate"]
    losses: dict[int, float] = {}
    for _ in range(trials):
        exponent = next_exponent(losses, up)
        losses[exponent] = endpoints(play(trial(first * FACTOR**exponent))["validation"], "loss")[1]
    return first * FACTOR ** min(losses, key=lambda k: losses[k])


def curve(runs: Sequence[Result], split: str, name: str, forwards: float) -> list[tuple[float, float, float, float]]:
    """(forwards, mean, least, largest) over the seeds at every evaluation; `forwards` are those of a round."""
    points = [int(rounds) for rounds in runs[0][split]]
    values = [[_read(run[split][str(rounds)][name]) for run in runs] for rounds in points]
    return [
        (forwards * rounds, statistics.fmean(at), min(at), max(at)) for rounds, at in zip(points, values, strict=True)
    ]


def percent(mean: float, least: float, largest: float) -> str:
    """ "59.8% (57.8 to 61.6)"."""
    return f"{100 * mean:.1f}% ({100 * least:.1f} to {100 * largest:.1f})"
