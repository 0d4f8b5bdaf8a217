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
from torch import Tensor

from fedzo import engine
from fedzo.directions.base import Isotropic
from fedzo.errors import FedzoError
from fedzo.estimators import ESTIMATORS, Estimate, Query
from fedzo.evaluation import Batch, losses_from_scores
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.run_folder import RunFolder, strict_json, write_atomically
from fedzo.runtime import keep_memory

FACTOR = 3.0  # between neighbouring learning rates
SLOPES, CURVATURES, LEAST_RISE = 8, 2, 3e-3  # directions of a probe; the curvature hardly differs between them
PRELOAD = ["fedzo.engine", "transformers.models.auto.modeling_auto", "tensorboard.compat.proto.event_pb2"]

Result = dict[str, Any]


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


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

    def __call__(self, cell: Named) -> Result | None:
        """None: the cell failed, or is not there to be read."""
        path = self.out / f"{cell.name}.json"
        if not path.exists() and self.work is not None:
            self._failed(cell).unlink(missing_ok=True)
            code = apart(self.start, _do, cell, self.work, self.out)
            if not path.exists() and not self.fault(cell):
                note_failure(self.out, cell, f"its process ended with exit code {code}")
            done = self.describe(json.loads(path.read_text())) if path.exists() else f"failed: {self.fault(cell)}"
            print(f"{cell.name}: {done}", flush=True)
        return json.loads(path.read_text()) if path.exists() else None

    def fault(self, cell: Named) -> str:
        """Why a cell failed; "" when it did not, or has not been tried."""
        path = self._failed(cell)
        return path.read_text().strip() if path.exists() else ""

    def _failed(self, cell: Named) -> Path:
        return self.out / f"{cell.name}.failed"


def apart(start: str, function: Callable[..., object], *arguments: object) -> int | None:
    """Calls a function in a process of its own, to its end; that process's exit code.

    Args:
        start: "forkserver": a new process with the imports of `PRELOAD`; "fork": one with all that this one holds.
    """
    context: Any = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode  # type: ignore[no-any-return]


def note_failure(out: Path, cell: Named, reason: str) -> None:
    """Writes why a cell failed, in one line."""
    write_atomically(out / f"{cell.name}.failed", " ".join(reason.split()) + "\n")


def _do(cell: Named, work: Callable[[Any], Result], out: Path) -> None:
    """A process of its own."""
    keep_memory()
    started = time.perf_counter()
    try:
        result = work(cell)
    except FedzoError as error:
        return note_failure(out, cell, str(error))
    except Exception as error:
        note_failure(out, cell, f"{type(error).__name__}: {error}")
        raise
    write_atomically(out / f"{cell.name}.json", strict_json(result | {"seconds": time.perf_counter() - started}))


class Clock:
    """An observer that notes when rounds end, in seconds of the process's own CPU time: neighbours do not count."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def round(self, summary: RoundSummary) -> None:
        self.tick()

    def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None:
        pass

    def tick(self) -> None:
        self.times.append(time.process_time())

    def seconds_a_round(self) -> float:
        """The median, so that rounds with an evaluation between them do not count."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else math.nan


def open_run(path: Path, experiment: Experiment) -> RunFolder:
    """The folder of a run, a new one where there is none."""
    return RunFolder.open(path) if (path / "config.toml").is_file() else RunFolder.create(path, experiment.config)


def train(experiment: Experiment, folder: RunFolder) -> tuple[Result, Ledger]:
    """A run, to its end: its result, and its ledger, open."""
    clock = Clock()
    ledger = engine.run(experiment, folder, [clock])
    return {
        "trainable": ledger.spec.size,
        "rounds": ledger.spec.rounds,
        "ledger_hash": ledger.head.hex(),
        "cpu_seconds_a_round": clock.seconds_a_round(),
        "validation": dict(sorted(ledger.evaluations("validation").items())),
        "test": dict(sorted(ledger.evaluations("test").items())),
    }, ledger


def mean_loss(experiment: Experiment, theta: Tensor, batch: Batch) -> float:
    """Over the batch, at theta."""
    return float(losses_from_scores(experiment.evaluator.scores(theta, batch), batch.labels.cpu()).double().mean())


def probe(experiment: Experiment, examples: int) -> Result:
    """The learning rate to start from: share of signal in g^2, over z'Hz, at theta0 and a round's examples."""
    theta, data, method = experiment.theta0(), experiment.client_data(0), experiment.config.method
    batch = data.batch(np.arange(min(examples, len(data))))
    estimator, directions = ESTIMATORS["two-point"](), Isotropic(method.directions)

    def query(count: int, eps: float) -> Estimate:
        steps = estimator.estimate(Query(theta, batch, tuple(range(count)), eps, 0, directions))
        try:
            request = next(steps)
            while True:
                request = steps.send(experiment.evaluator.answer(request))
        except StopIteration as stop:
            estimate: Estimate = stop.value
            return estimate

    projected = query(SLOPES, method.eps).projected
    square = float((projected.mean(1) ** 2).mean())
    fisher = float(projected.var(1, ddof=1).mean())
    signal = max(1 - fisher / len(batch) / square, 0.1)
    eps, second = second_difference(
        lambda eps: query(CURVATURES, eps).loss - mean_loss(experiment, theta, batch), method.eps
    )
    curvature = max(second, fisher)
    return {"learning_rate": signal / curvature, "gradient": math.sqrt(square), "signal": signal,
            "curvature": curvature, "eps": eps}  # fmt: skip


def second_difference(rise: Callable[[float], float], eps: float) -> tuple[float, float]:
    """u'Hu along a direction u, from how far the mean of the losses at +/- eps u is above the one in the middle.

    It is taken with the least of eps, 4 eps, ... at which the loss rises by `LEAST_RISE`: about the distance of one
    good step, and far above rounding.

    Returns:
        That eps, and u'Hu.
    """
    found = 0.0
    for rung in range(8):
        at = eps * 4.0**rung
        found = rise(at)
        if found > LEAST_RISE:
            break
    return at, 2 * found / at**2


def endpoints(evaluations: Mapping[str, Any], name: str) -> tuple[float, float]:
    """A metric at the first and the last evaluation; infinite where it was not finite."""
    values = [_read(metrics[name]) for metrics in evaluations.values()]
    return values[0], values[-1]


def _read(metric: float | None) -> float:
    """JSON has no infinity."""
    return math.inf if metric is None else metric


def next_exponent(tried: Mapping[int, float]) -> int:
    """Where to look next, in powers of the factor: the untried neighbour of the lowest loss, the smaller one first."""
    best = min(tried, key=lambda k: tried[k], default=0)
    return min({best + d for d in range(-len(tried), len(tried) + 1)} - set(tried), key=lambda k: (abs(k - best), k))


def tune(play: Callable[[C], Result | None], start: C, trial: Callable[[float], C], trials: int) -> float | None:
    """The learning rate with the lowest validation loss at the end of its trial.

    Args:
        start: the cell whose result says where to begin.
        trial: the cell that tries a learning rate.
        trials: how many, each beside the best so far.

    Returns:
        None when a part of the search failed or is not there.
    """
    found = play(start)
    if found is None:
        return None
    losses: dict[int, float] = {}
    for _ in range(trials):
        exponent = next_exponent(losses)
        result = play(trial(found["learning_rate"] * FACTOR**exponent))
        if result is None:
            return None
        losses[exponent] = endpoints(result["validation"], "loss")[1]
    best: int = min(losses, key=lambda k: losses[k])
    return float(found["learning_rate"] * FACTOR**best)


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
