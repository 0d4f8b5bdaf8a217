"""Zeroth-order methods compared: all of fedzo's, on every training scheme, with equal forward passes.

    python simulations/zo_bench.py [--methods NAMES] [--schemes NAMES] [--tasks NAMES] [--seeds N] [--quick] [--report]

Every method runs federated: 2 clients with iid data, batches of 8, shared seeds, as few queries a step as it is valid
with (`OWN` has those that are about many). A budget counts the forward passes of one client over a batch, also those
over more examples and those that a rule takes beside its estimator, so a method with dear steps takes fewer. Token
embeddings are frozen, an encoder's new head is trained by all. Both models start where there is something to learn: the
encoder from the features of the label texts as its head, the language model from the bare sentence as its prompt.

The learning rate of each method, scheme and task is chosen on validation loss: from the best one of a first step, by
the rule of "auto" and one probe for all, `--trials` shorter runs, each a factor 3 away from the best so far, larger
ones first, with a seed that no reported run has. What is best for a short run is too much for a long one: the rate is
divided by the square root of how much longer a run is than a trial. All else is fedzo's default (what is counted in
steps is made to fit the run: `KEYS`). The test split is absent from trials. One seed is run of every method, all of
them of each task's `--best` by validation loss.

`backprop-sgd` and `backprop-adam` are the reference: the same clients, batches and number of trials; a forward and
backward pass counts as 3 forwards, and a client sends its gradient. Of each task's best method a run of `--long` times
the forwards follows, its learning rate chosen alike, to say how many it needs for 95% of what the reference gains.

A process holds model and data of one scheme and seed and forks one for each cell, so that a cell pays for no loading,
harms no other, and its memory is its own: the peak of its resident set over what it had when it began. Server and both
clients are in it; points are evaluated in pairs. A step's seconds are CPU time, of both clients and the server. Results
are JSON files under --out: a stopped comparison goes on where it was, and failed cells are tried again. Writes
table.md, table.json and TASK.png there, and ends with one line of JSON.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import math
import shutil
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from cells import (
    Clock,
    MissingError,
    Player,
    Result,
    apart,
    endpoints,
    note_failure,
    train,
    tune,
)
from memory import forget_peak, peak
from torch import Tensor
from zo_tables import Pair, best, goals, pair_of, plot, row, table, unreached

from fedzo import engine
from fedzo.config import Config, flatten, from_flat, load_config
from fedzo.errors import ConfigError
from fedzo.estimators import ESTIMATORS
from fedzo.evaluation import Batch, GradientRequest, LossRequest, losses_from_scores
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import RoundSummary
from fedzo.federation.randomness import choose, derive
from fedzo.files import write_atomically
from fedzo.limits import AtLeast
from fedzo.methods import METHODS, Method
from fedzo.optimizers import OPTIMIZERS, Schedule
from fedzo.registry import lookup
from fedzo.report import summarise
from fedzo.run_folder import RunFolder, strict_json
from fedzo.runtime import keep_memory
from fedzo.spaces.sparse import DRAWN
from fedzo.step_size import SHARE, Probe
from fedzo.structures import STRUCTURES

CLIENTS, BATCH = 2, 8
TUNING_SEED = 1000
EVALUATIONS = {"run": 4, "long": 16}  # after the first
GROUP = 8  # methods whose cells one process holds model and data for
LEAST_RISE = 3e-3  # of the loss, where a curvature is measured
BACKPROP = 3  # forwards that a forward and backward pass counts as
REFERENCES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "backprop-sgd": torch.optim.SGD,
    "backprop-adam": torch.optim.Adam,
}
# What is counted in steps, made to fit a run.
KEYS: dict[str, Any] = {
    "method.project_every": 20,
    "method.project_steps": 5,
    "method.refresh": 25,
    "method.anchor_every": 5,
}
# What single methods are about.
OWN: dict[str, dict[str, Any]] = {
    "one-point": {"method.queries": 3},
    "p-rge": {"method.queries": 2},
    "fzoo": {"method.queries": 7},
    "block-wise": {"method.queries": 8},
    "deepzero": {"method.queries": 15},
    "zo-adamw": {"method.weight_decay": 0.01},
}

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A model with its task.

    Attributes:
        config: model, task and data.
        changes: what differs from that configuration.
        mask: how the entries of a sparse space are chosen: the best on this model in sparse_vs_full.py.
        first_order: parameters that `hybrid` moves by back-propagation.
        forwards, trial_forwards: of a client, in a run and in a trial.
    """

    config: str
    changes: Mapping[str, Any]
    mask: str
    first_order: str
    forwards: int = 160
    trial_forwards: int = 24


TASKS = {
    "sst2": Task(
        "configs/sst2-reviews.toml",
        {"task.template": "{sentence}", "space.exclude": "*embed_tokens*"},
        "sensitive",
        "*layers.5.*",
    ),
    "trec": Task(
        "configs/trec-minilm.toml",
        {"space.exclude": "*word_embeddings*"},
        "magnitude",
        "*head.*",
    ),
    "embedded": Task("configs/demo.toml", {"space.exclude": "*embed_tokens*"}, "sensitive", "*layers.1.*", 32, 16),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "full": {"space.kind": "full"},
    "lora": {"space.kind": "adapter", "space.adapter": "lora"},
    "prefix": {"space.kind": "adapter", "space.adapter": "prefix"},
    "prompt": {"space.kind": "adapter", "space.adapter": "prompt"},
    "sparse": {"space.kind": "sparse", "space.density": 0.001},
    "scales": {"space.kind": "scales", "model.quantisation": "nf4"},
    "codes": {"space.kind": "codes", "model.quantisation": "int8"},
}

# What theta0 is evaluated and probed with, where that is not zo-sgd.
PLAIN = {"codes": "quzo"}


@dataclass(frozen=True)
class Options:
    """What the comparison is asked for.

    Attributes:
        out: folder of the results.
        tasks, schemes, methods: names; the references are among the methods.
        seeds, best: seeds of the best methods, and how many those are of each task.
        trials: learning rates tried for each method.
        forwards, trial_forwards: budgets of all tasks; 0: the task's own.
        long: budget of the long run, in multiples of a run's.
        examples, validation: training examples of both clients together, and validation examples.
    """

    out: Path
    tasks: tuple[str, ...]
    schemes: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    best: int
    trials: int
    forwards: int
    trial_forwards: int
    long: int
    examples: int
    validation: int

    def budget(self, kind: str, task: str) -> int:
        """Forward passes of a client in a cell."""
        run = self.forwards or TASKS[task].forwards
        return {"run": run, "long": run * self.long, "trial": self.trial_forwards or TASKS[task].trial_forwards}[kind]


@dataclass(frozen=True)
class Cell:
    """The work of one process.

    Attributes:
        kind: "mask" (makes it), "start" (evaluates theta0), "slopes" (probes the loss), "probe" (picks the learning
            rate to start from), "trial", "run" or "long".
        budget: forward passes of a client, in the last three.
    """

    kind: str
    task: str
    scheme: str
    method: str
    seed: int
    budget: int = 0
    learning_rate: float = 1e-3

    @property
    def name(self) -> str:
        what = f"-{self.budget}-{self.learning_rate:.3g}" if self.budget else ""
        return f"{self.kind}-{self.task}-{self.scheme}-{self.method}-{self.seed}{what}"

    def config(self, options: Options) -> Config:
        """The run of this cell, of as many rounds as its budget has.

        Raises:
            ConfigError: the method is not valid with the scheme, or one step takes more than the budget.
        """
        task, method = TASKS[self.task], METHODS[self.method if self.method in METHODS else "zo-sgd"]
        flat: dict[str, Any] = {
            **flatten(load_config(Path(task.config))),
            "space.include": "*",
            "space.mask": task.mask,
            "space.calibration_examples": 64,
            "space.virtual_tokens": 8,
            "data.clients": CLIENTS,
            "data.partition": "iid",
            "data.limit": options.examples,
            "method.batch_size": BATCH,
            "method.learning_rate": self.learning_rate,
            "method.schedule": "linear",
            "federation.seeds": "shared",
            "evaluation.limit": options.validation,
            "evaluation.divergence": 0.0,
            "runtime.threads": 1,
            "runtime.device": "cpu",
            "runtime.evaluation": "paired",
            "seed": self.seed,
            **KEYS,
            **task.changes,
            **SCHEMES[self.scheme],
            **method.keys,
            "method.queries": least_queries(method),
            **OWN.get(self.method, {}),
        }
        if "method.first_order" in method.open:
            flat |= {"method.first_order": task.first_order, "method.first_order_optimizer": "adam"}
        if made_mask(self.task, self.scheme) and self.kind != "mask":
            flat["space.mask"] = str(mask_file(options, self.task))
        if self.seed == TUNING_SEED:
            flat["data.test"] = ""
        if self.budget:
            forwards = BACKPROP if self.method in REFERENCES else step_forwards(self._checked(flat))
            rounds = int(self.budget / forwards)
            if not rounds:
                raise ConfigError(f"one step takes {forwards:g} forward passes, more than the budget of {self.budget}")
            every = max(1, rounds // EVALUATIONS.get(self.kind, 1))
            flat |= {
                "federation.rounds": rounds,
                "federation.digest_every": every,
                "evaluation.every": every if self.kind in EVALUATIONS else 0,
            }
        return self._checked(flat).resolved()

    def _checked(self, flat: Mapping[str, Any]) -> Config:
        """`from_flat`, the message of whose errors begins with what is wrong."""
        try:
            return from_flat(flat, self.name)
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix(f"{self.name}: ")) from None


def made_mask(task: str, scheme: str) -> bool:
    """Whether the space's mask is made from data, once, and read from a file."""
    return scheme == "sparse" and TASKS[task].mask not in DRAWN


def mask_file(options: Options, task: str) -> Path:
    """Where the mask of a task's sparse space is, one for all seeds."""
    return options.out / f"mask-{task}.safetensors"


def least_queries(method: Method) -> int:
    """The fewest queries a step that the method's parts are valid with."""
    parts = ESTIMATORS[method.estimator], STRUCTURES[method.structure], OPTIMIZERS[method.optimizer]
    limits = [limit for part in parts for limit in part.limits if isinstance(limit, AtLeast)]
    return max([limit.least for limit in limits if limit.key == "method.queries"], default=1)


def step_forwards(config: Config) -> float:
    """Forward passes over a batch that a client's step takes, on average over a run; of more examples as many more."""
    method = config.method
    estimator = ESTIMATORS[method.estimator](config.settings())
    examples = estimator.evaluated(method.queries, method.batch_size, config.data.limit // CLIENTS)
    return config.step_forwards + examples / method.batch_size - estimator.forwards(method.queries)


def start_of(cell: Cell) -> Cell:
    """The evaluation of theta0, which all methods share."""
    return Cell("start", cell.task, cell.scheme, PLAIN.get(cell.scheme, "zo-sgd"), cell.seed)


def slopes_of(cell: Cell) -> Cell:
    """The probe of the loss, which all methods share: E[z z'] is the identity for all."""
    return replace(start_of(cell), kind="slopes")


def work(cell: Cell, experiment: Experiment, options: Options) -> Result:
    """Does a cell in a fork of the process that holds its experiment; the method is the cell's own."""
    config, read = cell.config(options), Player(options.out, None)
    experiment.config = config
    if cell.kind == "start":
        return evaluated(experiment, experiment.theta0(), 0)
    if cell.kind == "slopes":
        return asdict(experiment.probe)
    if cell.kind == "probe":
        if cell.method in REFERENCES:
            return {"learning_rate": reference_rate(experiment, cell.method)}
        found = read(slopes_of(cell))
        seen = Probe(**{field.name: found[field.name] for field in fields(Probe)})
        experiment.probe = replace(seen, directions=config.method.queries)
        return {"learning_rate": experiment.step_size.learning_rate / SHARE}
    start = read(start_of(cell))
    theta, batch = experiment.theta0(), experiment.client_data(0).batch(np.arange(BATCH))
    experiment.evaluator.answer(LossRequest(theta, batch, (1e-3, -1e-3)))  # a fork has the pages of libraries to load
    del theta, batch
    gauge = Gauge()
    if cell.method in REFERENCES:
        result = backprop(experiment, cell.method, start, gauge) | {"queries": 0, "forwards_a_step": BACKPROP}
    else:
        result = zeroth_order(experiment, options.out / "runs" / cell.name, start, gauge)
        result |= {"queries": config.method.queries, "forwards_a_step": step_forwards(config)}
    return result | {"peak_bytes": gauge.highest, "cpu_seconds_a_round": gauge.seconds_a_round()}


class Gauge(Clock):
    """A clock that also has the peak memory of the rounds, in bytes over what there was when it was made."""

    def __init__(self) -> None:
        super().__init__()
        forget_peak("cpu")
        self.before, self.highest = peak("cpu"), 0

    def round(self, summary: RoundSummary | None) -> None:
        super().round(summary)
        self.highest = max(self.highest, peak("cpu") - self.before)

    def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        """What an evaluation took is forgotten: its batches are larger."""
        forget_peak("cpu")


def evaluated(experiment: Experiment, theta: Tensor, rounds: int, last: bool = True) -> Result:
    """split -> rounds -> metrics, of the test split only at the last round."""
    data = {"validation": experiment.validation, "test": experiment.test if last else None}
    return {split: {rounds: experiment.evaluate(theta, d)} if d is not None else {} for split, d in data.items()}


def zeroth_order(experiment: Experiment, path: Path, start: Result, gauge: Gauge) -> Result:
    """A federated run; theta0 is not evaluated again."""
    shutil.rmtree(path, ignore_errors=True)  # one that was stopped would have the figures of its last part only
    folder = RunFolder.create(path, experiment.config)
    with engine.start(folder, experiment) as ledger:
        for split in ("validation", "test"):
            for rounds, metrics in start[split].items():
                ledger.record_evaluation(int(rounds), split, metrics)
    result, ledger = train(experiment, folder, gauge)
    with ledger:
        state = experiment.replica(ledger.spec).state.values()
        return result | {
            "bytes_sent": summarise(ledger)["bytes_up_per_client"],
            "state": sum(value.numel() * value.element_size() for value in state) / (4 * ledger.spec.size),
        }


def backprop(experiment: Experiment, method: str, start: Result, gauge: Gauge) -> Result:
    """The run of a reference: along the gradients of both clients' batches, those of a federated run."""
    config, theta = experiment.config, experiment.theta0()
    rounds, every, rate = config.federation.rounds, config.evaluation.every, float(config.method.learning_rate)
    schedule = Schedule(config.method.schedule, rate, rounds)
    optimizer = REFERENCES[method]([theta], lr=rate)
    data = [experiment.client_data(client) for client in range(CLIENTS)]
    total = sum(map(len, data))
    result: Result = {split: dict(start[split]) for split in ("validation", "test")}
    for round_ in range(rounds):
        theta.grad = torch.zeros_like(theta)
        for client, own in enumerate(data):
            batch = own.batch(choose(derive(config.seed, "batch", round_, client, 0), len(own), BATCH))
            theta.grad += gradient_of(experiment, theta, batch) * (len(own) / total)
        optimizer.param_groups[0]["lr"] = schedule(round_)
        optimizer.step()
        gauge.round(None)
        last = round_ + 1 == rounds
        if last or (every and (round_ + 1) % every == 0):
            for split, metrics in evaluated(experiment, theta, round_ + 1, last).items():
                result[split] |= metrics
                gauge.evaluation(round_ + 1, split, metrics)
    return result | {
        "trainable": len(theta),
        "rounds": rounds,
        "bytes_sent": 4 * len(theta) * rounds,
        "state": sum(value.shape == theta.shape for value in optimizer.state[theta].values()),
    }


def gradient_of(experiment: Experiment, theta: Tensor, batch: Batch) -> Tensor:
    """[size], of the batch's mean loss."""
    return experiment.evaluator.answer(GradientRequest(theta, batch, ((0, len(theta)),)))[len(batch) :]


def reference_rate(experiment: Experiment, method: str) -> float:
    """The rate at which the first step of a reference lowers the loss most, by slope and curvature along that step.

    The curvature is at least the slope squared, its part of the empirical Fisher.
    """
    theta, data = experiment.theta0(), experiment.client_data(0)
    batch = data.batch(np.arange(min(CLIENTS * BATCH, len(data))))
    gradient = gradient_of(experiment, theta, batch)
    step = gradient.sign() if method == "backprop-adam" else gradient
    length = float(step.norm()) / math.sqrt(len(theta))
    unit, loss = step / length, mean_loss(experiment, theta, batch)  # as long as a direction of zeroth order

    def rise(eps: float) -> float:
        return sum(mean_loss(experiment, theta + a * unit, batch) for a in (eps, -eps)) / 2 - loss

    slope = float(gradient @ unit)
    curvature = max(second_difference(rise, experiment.config.method.eps), slope**2)
    return slope / curvature / length


def mean_loss(experiment: Experiment, theta: Tensor, batch: Batch) -> float:
    """Over the batch, at theta."""
    return float(losses_from_scores(experiment.evaluator.scores(theta, batch), batch.labels.cpu()).double().mean())


def second_difference(rise: Callable[[float], float], eps: float) -> float:
    """u'Hu along a direction u, from how far the mean of the losses at +/- eps u is above the one in the middle.

    It is taken with the least of eps, 4 eps, ... at which the loss rises by `LEAST_RISE`: about the distance of one
    good step, and far above rounding.
    """
    found = 0.0
    for rung in range(8):
        at = eps * 4.0**rung
        found = rise(at)
        if found > LEAST_RISE:
            break
    return 2 * found / at**2


def describe(result: Result) -> str:
    if "learning_rate" in result:
        return "start at {learning_rate:.3g}, {seconds:.1f} s".format(**result)
    if "validation" in result:
        before, after = endpoints(result["validation"], "loss")
        return f"validation loss {before:.4f} -> {after:.4f}, {result['seconds']:.1f} s"
    return "{seconds:.1f} s".format(**result)


def make_mask(cell: Cell, options: Options) -> Result:
    """Writes the mask of a task's sparse space."""
    mask = Experiment(cell.config(options)).mask
    assert mask is not None
    mask.save(mask_file(options, cell.task))
    return {"mask": mask.hash}


def hold(options: Options, start: Cell, act: Callable[[Player], None]) -> None:
    """A process of its own: holds model and data of a task, scheme and seed, and plays their cells, each in a fork."""
    keep_memory()
    try:
        experiment = Experiment(start.config(options))
        play = Player(options.out, partial(work, experiment=experiment, options=options), "fork", describe)
        before = play(start)
        with TemporaryDirectory() as scratch:  # a run: code, kernels and data are loaded at their first use
            experiment.config = replace(start, kind="trial", budget=4).config(options)
            zeroth_order(experiment, Path(scratch) / "run", before, Gauge())
    except MissingError:
        return
    except Exception as error:
        return note_failure(options.out, start, error)
    act(play)


def tune_all(play: Player, options: Options, pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        with suppress(MissingError):
            if pair[2] not in REFERENCES:
                play(slopes_of(Cell("probe", *pair, TUNING_SEED)))
            tuned(play, options, pair)


def play_all(play: Player, cells: Sequence[Cell]) -> None:
    for cell in cells:
        with suppress(MissingError):
            play(cell)


def tuned(play: Callable[[Cell], Result], options: Options, pair: Pair) -> float:
    """The learning rate of a method on a task with a scheme.

    Raises:
        MissingError: a part of the search failed or is not there.
    """

    def trial(rate: float) -> Cell:
        return Cell("trial", *pair, TUNING_SEED, options.budget("trial", pair[0]), rate)

    return tune(play, Cell("probe", *pair, TUNING_SEED), trial, options.trials, up=True)


class Comparison:
    """The cells of a comparison, done and read.

    Attributes:
        pairs: (task, scheme, method) of all.
        refused: why a pair is not valid, as is known before anything is loaded.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.read = options, Player(options.out, None)
        self.pairs: list[Pair] = list(product(options.tasks, options.schemes, options.methods))
        self.refused: dict[Pair, str] = {}
        for pair in self.pairs:
            try:
                for kind in ("trial", "run"):
                    Cell(kind, *pair, TUNING_SEED, options.budget(kind, pair[0])).config(options)
            except ConfigError as error:
                self.refused[pair] = f"not valid: {error}"

    def play(self, jobs: int) -> None:
        """Does what is missing: trials and the first seed of all, the other seeds of the best, the long runs."""
        todo = [pair for pair in self.pairs if pair not in self.refused]
        with ThreadPoolExecutor(jobs) as threads:
            list(threads.map(self._mask, {task for task, scheme, _ in todo if made_mask(task, scheme)}))
            list(threads.map(self._first, grouped(todo, lambda pair: pair[:2])))
            chosen = [pair_of(r) for r in best(self.rows()[0], self.options.best)]
            others = [self._run(pair, seed) for seed in range(1, self.options.seeds) for pair in chosen]
            list(threads.map(self._hold, grouped(others, start_of)))
            list(threads.map(self._hold, [[self._run(pair_of(r), 0, "long")] for r in unreached(self.rows()[0])]))

    def rows(self) -> tuple[list[Result], dict[Pair, str]]:
        """The figures of every pair that has been run, and why the others have not."""
        rows, reasons = [], dict(self.refused)
        for pair in self.pairs:
            if pair in reasons:
                continue
            try:
                first, *others = [self._run(pair, seed) for seed in range(self.options.seeds)]
                runs, long = [self.read(first)], self._found(self._run(pair, 0, "long"))
            except MissingError as error:
                reasons[pair] = self._fault(pair) or str(error)
                continue
            runs += [result for result in map(self._found, others) if result is not None]
            rows.append(row(pair, pair[2] in REFERENCES, first.learning_rate, runs, long))
        return rows, reasons

    def _fault(self, pair: Pair) -> str:
        """Why nothing of a task with a scheme could be done."""
        starts = [start_of(Cell("run", *pair, seed)) for seed in (TUNING_SEED, 0)]
        failed = [path for start in starts if (path := self.options.out / f"{start.name}.failed").exists()]
        return failed[0].read_text().strip() if failed else ""

    def _mask(self, task: str) -> None:
        play = Player(self.options.out, partial(make_mask, options=self.options), describe=describe)
        with suppress(MissingError):
            play(Cell("mask", task, "sparse", "zo-sgd", TUNING_SEED))

    def _first(self, pairs: Sequence[Pair]) -> None:
        """Trials and the first seed of some methods of one task and scheme."""
        untuned = [pair for pair in pairs if not self._is_tuned(pair)]
        if untuned:
            start = start_of(Cell("probe", *pairs[0], TUNING_SEED))
            apart("forkserver", hold, self.options, start, partial(tune_all, options=self.options, pairs=untuned))
        self._hold([self._run(pair, 0) for pair in pairs if self._is_tuned(pair)])

    def _hold(self, cells: Sequence[Cell]) -> None:
        """Those of the cells, all of one task, scheme and seed, that are missing."""
        left = [cell for cell in cells if self._found(cell) is None]
        if left:
            apart("forkserver", hold, self.options, start_of(left[0]), partial(play_all, cells=left))

    def _is_tuned(self, pair: Pair) -> bool:
        with suppress(MissingError):
            return tuned(self.read, self.options, pair) > 0
        return False

    def _found(self, cell: Cell) -> Result | None:
        with suppress(MissingError):
            return self.read(cell)
        return None

    def _run(self, pair: Pair, seed: int, kind: str = "run") -> Cell:
        budget = self.options.budget(kind, pair[0])
        shorter = math.sqrt(self.options.budget("trial", pair[0]) / budget)  # what steps add up of noise
        return Cell(kind, *pair, seed, budget, tuned(self.read, self.options, pair) * shorter)


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items with equal keys together, in lists of at most `GROUP`."""
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return [of[i : i + GROUP] for of in found.values() for i in range(0, len(of), GROUP)]


def chosen_options() -> tuple[Options, int, bool]:
    """Those of the command line: options, processes at a time, and whether only what is there is reported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {"methods": (*REFERENCES, *METHODS), "schemes": tuple(SCHEMES), "tasks": tuple(TASKS)}
    parser.add_argument("--methods", default=",".join(known["methods"]), help="all: %(default)s")
    parser.add_argument("--schemes", default="full,lora,prefix,prompt,sparse", help=f"of {', '.join(SCHEMES)}")
    parser.add_argument("--tasks", default="sst2,trec", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, default=3, help="of the best methods; the others have one")
    parser.add_argument("--best", type=int, default=5, help="of each task, that have all seeds")
    parser.add_argument("--forwards", type=int, default=0, help="of a client in a run; 0: the task's own")
    parser.add_argument("--trial-forwards", type=int, default=0, help="of a client in a trial; 0: the task's own")
    parser.add_argument("--trials", type=int, default=3, help="learning rates tried for each method")
    parser.add_argument("--long", type=int, default=16, help="budget of the long run, in multiples of a run's")
    parser.add_argument("--examples", type=int, default=512, help="training examples of both clients together")
    parser.add_argument("--validation", type=int, default=128, help="validation examples")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/zo-bench"), help="one for each choice of sizes")
    parser.add_argument("--report", action="store_true", help="only tables and plots, of what is there")
    parser.add_argument("--quick", action="store_true", help="a few methods on the embedded model")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.schemes, args.methods = "embedded", "full,lora", "backprop-adam,zo-sgd,zo-adam,qzo"
        args.seeds, args.best, args.trials, args.long, args.examples, args.validation = 2, 1, 2, 2, 200, 40
    values = vars(args)
    for what, names in known.items():
        values[what] = tuple(values[what].split(","))
        for name in values[what]:
            lookup(dict.fromkeys(names), name, what.removesuffix("s"))
    return Options(**{field.name: values[field.name] for field in fields(Options)}), args.jobs, args.report


def main() -> None:
    options, jobs, report = chosen_options()
    options.out.mkdir(parents=True, exist_ok=True)
    comparison, started = Comparison(options), time.perf_counter()
    if not report:
        comparison.play(jobs)
    rows, reasons = comparison.rows()
    figures: Result = {
        "clients": CLIENTS,
        "batch_size": BATCH,
        "trials": options.trials,
        "seconds": round(time.perf_counter() - started),
        "goals": goals(rows),
        "absent": {"/".join(pair): reason for pair, reason in reasons.items()},
    }
    write_atomically(options.out / "table.json", strict_json(figures | {"rows": rows}) + "\n")
    write_atomically(options.out / "table.md", table(rows, reasons))
    for task in dict.fromkeys(r["task"] for r in rows):
        plot(rows, task, options.out / f"{task}.png")
    print(table(rows, reasons))
    brief = [{name: value for name, value in r.items() if not name.endswith("curve")} for r in rows]
    print(strict_json(figures | {"rows": brief}))


if __name__ == "__main__":
    main()
