"""Which parameters should zeroth order train? Sensitive, random and magnitude masks against full and LoRA, on SST-2.

    python simulations/sparse_vs_full.py [--models NAMES] [--methods NAMES] [--jobs N] [--report] [--quick]

Every method gets the same number of forward passes (one forward is one pass over a client's batch) in the same
federated run: 2 clients with iid data, shared seeds, one two-point query a step. The claim under test is of Guo et al.,
arXiv 2406.02913: zeroth order on the 0.1% most sensitive parameters beats zeroth order on all.

Both models start where there is something to learn: the encoder from a random classification head, the language model
from a prompt without the words that its training put before the verdict. (From their good zero-shot starts no method
moves within such a budget: nearly all of a projected gradient is then the noise of its examples.) What is the same for
all: token embeddings are frozen, an encoder's head is trained. `head` (the head alone) is the line that an encoder's
other methods must beat.

The learning rate is chosen for each method on validation loss, with one budget for all: a start from a probe, then
`--trials` runs of `--trial-forwards` forwards with a seed that no reported run has, each a factor 3 away from the best
rate so far. The start is what method.learning_rate = "auto" takes (docs/step-size.md). The test split is absent from
probes and trials; reported runs evaluate it first and last, and validation data in between.

Every run is a process with one thread; its result is a JSON file under --out, so that a stopped comparison goes on
where it was. Writes table.md and accuracy.png there and ends with one line of JSON.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cells import Clock, MissingError, Player, Result, curve, endpoints, percent, train, tune

from fedzo.config import Config, flatten, from_flat, load_config
from fedzo.experiment import Experiment
from fedzo.files import write_atomically
from fedzo.run_folder import RunFolder

CLIENTS, BATCH = 2, 16
FORWARDS_A_ROUND = 2 * CLIENTS
TUNING_SEED = 1000

Pair = tuple[str, str]


@dataclass(frozen=True)
class Subject:
    """A model with its task.

    Attributes:
        config: its model, task and data.
        changes: what differs from that configuration.
        embeddings: pattern of the parameters that no method trains.
        forwards, trial_forwards: the default budgets.
    """

    config: str
    changes: Mapping[str, str]
    embeddings: str
    forwards: int
    trial_forwards: int


SUBJECTS = {
    "minilm-l6": Subject("configs/sst2-minilm.toml", {"model.head": "random"}, "*word_embeddings*", 400, 160),
    "reviews-6m": Subject("configs/sst2-reviews.toml", {"task.template": "{sentence}"}, "*embed_tokens*", 600, 240),
    "embedded": Subject("configs/demo.toml", {}, "*embed_tokens*", 400, 160),
}
METHODS: dict[str, dict[str, str]] = {
    "sensitive": {"space.kind": "sparse", "space.mask": "sensitive"},
    "random": {"space.kind": "sparse", "space.mask": "random"},
    "magnitude": {"space.kind": "sparse", "space.mask": "magnitude"},
    "full": {"space.kind": "full"},
    "lora": {"space.kind": "adapter", "space.adapter": "lora"},
    "head": {"space.kind": "full", "space.include": "head.*"},
}


@dataclass(frozen=True)
class Cell:
    """One process's work: a probe, a trial of a learning rate, or a reported run."""

    kind: str
    subject: str
    method: str
    seed: int
    forwards: int = 0
    learning_rate: float = 1e-3

    @property
    def name(self) -> str:
        rate = f"-{self.forwards}-{self.learning_rate:.3g}" if self.kind != "probe" else ""
        return f"{self.kind}-{self.subject}-{self.method}-{self.seed}{rate}"

    def config(self, size: Mapping[str, Any]) -> Config:
        """The run of this cell; size limits its data."""
        subject = SUBJECTS[self.subject]
        rounds = max(1, self.forwards // FORWARDS_A_ROUND)
        changes: dict[str, Any] = {
            "seed": self.seed,
            "space.include": "*",
            "space.exclude": subject.embeddings,
            "space.density": 0.001,
            "data.clients": CLIENTS,
            "data.partition": "iid",
            "method.queries": 1,
            "method.batch_size": BATCH,
            "method.learning_rate": self.learning_rate,
            "method.schedule": "linear",
            "federation.rounds": rounds,
            "federation.seeds": "shared",
            "federation.digest_every": max(1, rounds // 4),
            "evaluation.every": max(1, rounds // 4) if self.kind == "run" else 0,
            "runtime.threads": 1,
            "runtime.device": "cpu",
        }
        if self.kind != "run":
            changes["data.test"] = ""
        flat = {**flatten(load_config(Path(subject.config))), **subject.changes, **changes, **METHODS[self.method]}
        return from_flat(flat | dict(size), self.name).resolved()


def work(cell: Cell, size: Mapping[str, Any], out: Path) -> Result:
    """Does a cell."""
    experiment = Experiment(cell.config(size))
    if cell.kind == "probe":
        return {"learning_rate": experiment.step_size.learning_rate, **asdict(experiment.probe)}
    path = out / "runs" / cell.name
    folder = RunFolder.open(path) if (path / "config.toml").is_file() else RunFolder.create(path, experiment.config)
    result, ledger = train(experiment, folder, Clock())
    ledger.close()
    return result


def describe(result: Result) -> str:
    if "curvature" in result:
        return "start at {learning_rate:.3g} (curvature {curvature:.3g}), {seconds:.0f} s".format(**result)
    before, after = endpoints(result["validation"], "loss")
    return (f"validation loss {before:.4f} -> {after:.4f}, {result['cpu_seconds_a_round']:.3f} CPU s a round, "
            f"{result['seconds']:.0f} s")  # fmt: skip


def row(pair: Pair, rate: float, runs: Sequence[Result]) -> Result:
    """The figures of a method on a model."""
    over_run = curve(runs, "validation", "accuracy", FORWARDS_A_ROUND)
    figures: Result = {"model": pair[0], "method": pair[1], "trainable": runs[0]["trainable"], "learning_rate": rate,
                       "seeds": len(runs), "forwards": over_run[-1][0]}  # fmt: skip
    for split in ("validation", "test"):
        for name in ("accuracy", "loss"):
            points = curve(runs, split, name, FORWARDS_A_ROUND)
            figures[f"{split}_{name}_before"] = round(points[0][1], 4)
            for suffix, value in zip(("", "_min", "_max"), points[-1][1:], strict=True):
                figures[f"{split}_{name}{suffix}"] = round(value, 4)
    figures["validation_accuracy_over_run"] = round(statistics.fmean(point[1] for point in over_run[1:]), 4)
    figures["cpu_seconds_a_round"] = round(statistics.median(run["cpu_seconds_a_round"] for run in runs), 3)
    figures["validation_curve"] = [[forwards, *(round(v, 4) for v in at)] for forwards, *at in over_run]
    return figures


def table(rows: Iterable[Result]) -> str:
    """Markdown: mean and, in brackets, range over the seeds."""
    lines = [
        "| Model | Method | Trainable | Learning rate | Validation loss | Validation accuracy: 1/4 | 1/2 | all "
        "| Test accuracy: before | after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["model"], r["method"], f"{r['trainable']:,}", f"{r['learning_rate']:.2g}"]
        cells.append("{validation_loss:.4f} ({validation_loss_min:.4f} to {validation_loss_max:.4f})".format(**r))
        points = r["validation_curve"]
        cells += [percent(*points[(len(points) - 1) * part // 4][1:]) for part in (1, 2, 4)]
        cells += [f"{100 * r['test_accuracy_before']:.1f}%"]
        cells += [percent(r["test_accuracy"], r["test_accuracy_min"], r["test_accuracy_max"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Result], path: Path) -> None:
    """Validation accuracy over forward passes, a panel a model: mean and, shaded, range over the seeds."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(r["model"] for r in rows))
    figure = Figure(figsize=(5.6 * len(models), 4.2), dpi=150, layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for r in rows:
            if r["model"] == model:
                forwards, mean, least, largest = zip(*r["validation_curve"], strict=True)
                color = f"C{list(METHODS).index(r['method'])}"
                axes.plot(forwards, mean, color=color, marker="o", markersize=3, label=r["method"])
                axes.fill_between(forwards, least, largest, color=color, alpha=0.15, linewidth=0)
        axes.set(title=model, xlabel="forward passes", ylabel="validation accuracy")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm-l6,reviews-6m", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="0,1,2", help="of the reported runs")
    parser.add_argument("--forwards", type=int, default=0, help="forward passes of a reported run; 0: the model's own")
    parser.add_argument("--trial-forwards", type=int, default=0, help="of a trial; 0: the model's own")
    parser.add_argument("--trials", type=int, default=3, help="learning rates tried for each method")
    parser.add_argument("--examples", type=int, default=4000, help="training examples of both clients together")
    parser.add_argument("--validation", type=int, default=400, help="validation examples")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/sparse-vs-full"), help="one for each --examples")
    parser.add_argument("--report", action="store_true", help="only table and plot, of what is there")
    parser.add_argument("--quick", action="store_true", help="the embedded model, a tiny budget")
    args = parser.parse_args()
    if args.quick:
        args.models, args.seeds, args.trials = "embedded", "0,1", 2
        args.forwards, args.trial_forwards, args.examples, args.validation = 32, 16, 200, 40
    args.out.mkdir(parents=True, exist_ok=True)
    size = {"data.limit": args.examples, "evaluation.limit": args.validation}
    play = Player(args.out, None if args.report else partial(work, size=size, out=args.out), describe=describe)

    def tuned(pair: Pair) -> float | None:
        forwards = args.trial_forwards or SUBJECTS[pair[0]].trial_forwards
        with suppress(MissingError):
            return tune(
                play, Cell("probe", *pair, TUNING_SEED),
                lambda rate: Cell("trial", *pair, TUNING_SEED, forwards, rate), args.trials,
            )  # fmt: skip
        return None

    def result(cell: Cell) -> Result | None:
        with suppress(MissingError):
            return play(cell)
        return None

    encoders = {name for name, s in SUBJECTS.items() if load_config(Path(s.config)).model.kind == "encoder"}
    pairs = [
        (model, method)
        for model in args.models.split(",")
        for method in args.methods.split(",")
        if method != "head" or model in encoders
    ]
    with ThreadPoolExecutor(args.jobs) as threads:
        # Both lists are short: a thread waits for one process at a time.
        rates = dict(zip(pairs, threads.map(tuned, pairs), strict=True))
        # By seed, so that a comparison that was stopped holds every method on the first ones.
        cells = [
            Cell("run", *pair, int(seed), args.forwards or SUBJECTS[pair[0]].forwards, rate)
            for seed in filter(None, args.seeds.split(","))
            for pair, rate in rates.items()
            if rate is not None
        ]
        results = dict(zip(cells, threads.map(result, cells), strict=True))
    rows = []
    for pair, rate in rates.items():
        runs = [r for cell, r in results.items() if r is not None and (cell.subject, cell.method) == pair]
        if rate is not None and runs:
            rows.append(row(pair, rate, runs))
    if rows:
        write_atomically(args.out / "table.md", table(rows))
        plot(rows, args.out / "accuracy.png")
        print(table(rows))
    missing = [cell.name for cell, result in results.items() if result is None]
    missing += [f"{model}-{method}" for (model, method), rate in rates.items() if rate is None]
    print(json.dumps({"batch_size": BATCH, "clients": CLIENTS, "missing": missing, "rows": rows}))
    if missing and not args.report:
        sys.exit(1)


if __name__ == "__main__":
    main()
