"""What privacy costs in accuracy: SST-2 with two models at several budgets, with one query a step and with many.

    python simulations/privacy_utility.py [--models NAMES] [--modes NAMES] [--seeds N] [--out DIR] [--quick] [--report]

For each model and mode (`example-local`: 10 clients, Poisson draws of examples; `client-central`: 400 clients, Poisson
draws of clients) runs with epsilon = 1, 2, 6 (Gaussian, delta = 1e-5), pure epsilon = 4 (Laplace, delta = 0) and
without privacy, with P = 1 (DPZero) and P = 16 (DP-AggZO) queries a step, clipped together. Nothing is tuned: 1,000
training sentences are set aside as public, and give the clipping bound (`fedzo privacy clip`, their median norm; for
Laplace in L1) and the learning rate ("auto", with the variance of the noise); both once for each model, mode and P,
with seed 0.
minilm-l6 trains its head on frozen features, reviews-6m all but its token embeddings; with reviews-6m runs of P = 16
have a quarter of the rounds and of the examples, so that all runs take as many forward passes.

Accuracy is on SST-2's dev sentences, after the last round. Results are JSON files under --out: what was stopped goes on
where it was. Writes table.md and MODE.png there, and ends with one line of JSON.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cells import Clock, MissingError, Player, Result, train
from matplotlib.figure import Figure

from fedzo.clip import suggest
from fedzo.config import Config, from_flat
from fedzo.experiment import Experiment
from fedzo.privacy_report import spent
from fedzo.run_folder import BUDGETS, RunFolder, strict_json
from fedzo.step_size import Probe

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
PUBLIC = 1000
QUERIES = (1, 16)
# Name of a budget -> keys of the configuration.
BUDGETS_OF: dict[str, dict[str, Any]] = {
    "none": {"privacy.mode": "none"},
    "6": {"privacy.epsilon": 6.0, "privacy.delta": 1e-5},
    "2": {"privacy.epsilon": 2.0, "privacy.delta": 1e-5},
    "1": {"privacy.epsilon": 1.0, "privacy.delta": 1e-5},
    "pure 4": {"privacy.epsilon": 4.0, "privacy.delta": 0.0, "privacy.mechanism": "laplace"},
}
MODELS: dict[str, dict[str, Any]] = {
    "minilm-l6": {
        "model.source": str(SHARED / "models/minilm-l6"),
        "model.kind": "encoder",
        "model.max_length": 64,
        "space.include": "head.*",
    },
    "reviews-6m": {
        "model.source": str(SHARED / "models/reviews-6m"),
        "model.max_length": 64,
        "space.exclude": "*embed_tokens*",
        "task.template": "{sentence} it was",
        "task.verbalizers": " terrible| great",
    },
}


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        clients: of the run.
        rate: chance of a client to be asked in a round; 0: all are asked.
        examples: of all clients together.
        batch, rounds: of a run with one query a step.
        shrink: how many times fewer rounds, and examples a batch, a run with many queries has.
    """

    clients: int
    rate: float
    examples: int
    batch: int
    rounds: int
    shrink: int = 1

    def keys(self, queries: int) -> dict[str, Any]:
        by = self.shrink if queries > 1 else 1
        return {
            "data.clients": self.clients,
            "data.limit": self.examples,
            "federation.client_rate": self.rate,
            "federation.rounds": max(2, self.rounds // by),
            "method.batch_size": max(2, self.batch // by),
            "method.queries": queries,
        }


SIZES = {
    ("minilm-l6", "example-local"): Size(10, 0.0, 8000, 32, 150),
    ("minilm-l6", "client-central"): Size(400, 0.1, 8000, 20, 150),
    ("reviews-6m", "example-local"): Size(10, 0.0, 20000, 16, 32, 4),
    ("reviews-6m", "client-central"): Size(400, 0.05, 20000, 8, 32, 4),
}


@dataclass(frozen=True)
class Cell:
    """A run."""

    model: str
    mode: str
    queries: int
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}_{self.mode}_p{self.queries}_{self.budget.replace(' ', '')}_s{self.seed}"


@dataclass(frozen=True)
class Start:
    """What a model, mode and P are given, from public data: the bound (of the L2 and the L1 norm)."""

    model: str
    mode: str
    queries: int

    @property
    def name(self) -> str:
        return f"{self.model}_{self.mode}_p{self.queries}_start"


def set_public_apart(folder: Path, tests: int | None) -> None:
    """SST-2 with the first `PUBLIC` training sentences in a file apart, and the first `tests` of dev (None: all)."""
    lines = (SHARED / "data/sst2/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "public.jsonl").write_text("".join(lines[:PUBLIC]), encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(lines[PUBLIC:]), encoding="utf-8")
    dev = (SHARED / "data/sst2/dev.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(dev[:tests]), encoding="utf-8")


class Comparison:
    """Plays cells; holds one experiment, of the last model, mode and seed, which a cell's process inherits.

    Args:
        data: as `set_public_apart` makes it.
        out: folder of the results.
        quick: runs of two rounds over 400 examples.
    """

    def __init__(self, data: Path, out: Path, quick: bool) -> None:
        self._data, self._quick = data, quick
        self._held: tuple[tuple[str, str, int], Experiment] | None = None
        self._starts: dict[Start, Result] = {}
        self._probes: dict[Start, Probe] = {}
        self._play = Player(out, self._work, "fork", lambda found: json.dumps(found)[:100])

    def __call__(self, cell: Cell) -> Result:
        self._hold(cell.model, cell.mode, cell.seed)
        return self._play(cell)

    def start(self, start: Start) -> None:
        """Finds out what the cells of a model, mode and P start from."""
        self._hold(start.model, start.mode, 0)
        self._starts[start] = self._play(start)
        assert self._held is not None
        experiment = self._held[1]
        experiment.config = self._config(start.model, start.mode, start.queries, 0)
        experiment.__dict__.pop("probe", None)
        self._probes[start] = experiment.probe

    def _hold(self, model: str, mode: str, seed: int) -> None:
        """Loads what is not held; with the features of a frozen encoder, which each cell then has."""
        if self._held is not None and self._held[0] == (model, mode, seed):
            return
        self._held = None
        experiment = Experiment(self._config(model, mode, 1, seed))
        for number in range(experiment.config.data.clients):
            experiment.client_data(number)
        _ = experiment.validation, experiment.test, experiment.theta0_digest
        self._held = (model, mode, seed), experiment

    def _config(self, model: str, mode: str, queries: int, seed: int, **more: Any) -> Config:
        size = SIZES[model, mode]
        if self._quick:
            size = replace(size, clients=min(size.clients, 20), examples=400, batch=4, rounds=2, shrink=1)
        keys = {
            "seed": seed, "task.name": "sst2", "data.source": str(self._data), "data.validation": "public",
            "data.partition": "iid", "evaluation.every": 0, "evaluation.limit": 40 if self._quick else 200,
            "runtime.device": "cpu", "runtime.threads": 1, **MODELS[model], **size.keys(queries), **more,
        }  # fmt: skip
        return from_flat(keys)

    def _work(self, cell: Any) -> Result:
        assert self._held is not None
        torch.set_num_threads(1)
        experiment = self._held[1]
        return self._look(cell, experiment) if isinstance(cell, Start) else self._run(cell, experiment)

    def _look(self, start: Start, experiment: Experiment) -> Result:
        found = {}
        for law, budget in (("gaussian", "2"), ("laplace", "pure 4")):
            keys = {"privacy.mode": start.mode, **BUDGETS_OF[budget]}
            experiment.config = self._config(start.model, start.mode, start.queries, 0, **keys)
            found[law] = suggest(experiment).clip
        return found

    def _run(self, cell: Cell, experiment: Experiment) -> Result:
        keys: dict[str, Any] = {"privacy.mode": cell.mode, "method.learning_rate": "auto", **BUDGETS_OF[cell.budget]}
        start = Start(cell.model, cell.mode, cell.queries)
        if cell.budget != "none":
            keys["privacy.clip"] = self._starts[start][keys.get("privacy.mechanism", "gaussian")]
        experiment.__dict__["probe"] = self._probes[start]
        experiment.config = self._config(cell.model, cell.mode, cell.queries, cell.seed, **keys)
        with TemporaryDirectory() as scratch:
            folder = RunFolder.create(Path(scratch) / "run", experiment.config)
            result, ledger = train(experiment, folder, Clock())
            with ledger:
                each = spent(ledger, folder.path / BUDGETS)
                tests = ledger.evaluations("test")
                terms, rate = ledger.spec.terms, ledger.spec.learning_rate
        first, last = tests[min(tests)], tests[max(tests)]
        return {
            "accuracy_before": first["accuracy"],
            "accuracy": last["accuracy"],
            "loss_before": first["loss"],
            "loss": last["loss"],
            "epsilon_spent": max((one.epsilon for one in each), default=None),
            "noise_multiplier": None if terms is None else terms.noise_multiplier,
            "clip": None if terms is None else terms.clip,
            "learning_rate": rate,
            "rounds": result["rounds"],
        }


def rows_of(results: dict[Cell, Result]) -> list[Result]:
    """One row for each model, mode, P and budget: means and, of accuracies, the lowest and highest over the seeds."""
    rows = []
    for model, mode, queries, budget in dict.fromkeys((c.model, c.mode, c.queries, c.budget) for c in results):
        own = [
            r for c, r in results.items() if (c.model, c.mode, c.queries, c.budget) == (model, mode, queries, budget)
        ]
        accuracies = [r["accuracy"] for r in own]
        rows.append(
            {
                "model": model,
                "mode": mode,
                "queries": queries,
                "budget": budget,
                "seeds": len(own),
                "accuracy": statistics.fmean(accuracies),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "accuracy_before": statistics.fmean(r["accuracy_before"] for r in own),
                "loss": statistics.fmean(r["loss"] for r in own),
                "loss_before": statistics.fmean(r["loss_before"] for r in own),
                "epsilon_spent": max((r["epsilon_spent"] for r in own if r["epsilon_spent"] is not None), default=None),
                "noise_multiplier": own[0]["noise_multiplier"],
                "clip": own[0]["clip"],
            }
        )
    return rows


def table(rows: Sequence[Result]) -> str:
    """Markdown."""
    lines = [
        "| model | mode | P | epsilon | noise | clip | loss before | loss | accuracy before | accuracy (range) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        noise, clip = ("-" if r[key] is None else f"{r[key]:.3g}" for key in ("noise_multiplier", "clip"))
        accuracy = f"{r['accuracy']:.1%} ({r['lowest']:.1%} to {r['highest']:.1%})"
        cells = [r["model"], r["mode"], str(r["queries"]), r["budget"], noise, clip, f"{r['loss_before']:.4f}"]
        cells += [f"{r['loss']:.4f}", f"{r['accuracy_before']:.1%}", accuracy]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Result], mode: str, path: Path) -> None:
    """Accuracy over the budgets, a panel for each model."""
    own = [r for r in rows if r["mode"] == mode]
    models = list(dict.fromkeys(r["model"] for r in own))
    figure = Figure(figsize=(5.2 * len(models), 4.0), dpi=150, layout="constrained")
    names = ["1", "2", "6", "pure 4", "none"]
    for model, axes in zip(models, figure.subplots(1, len(models), squeeze=False)[0], strict=True):
        for queries, marker in zip(QUERIES, "os", strict=True):
            found = {r["budget"]: r for r in own if (r["model"], r["queries"]) == (model, queries)}
            at = [names.index(name) + (0.05 if queries > 1 else -0.05) for name in names if name in found]
            mean = [found[name]["accuracy"] for name in names if name in found]
            low = [max(0.0, found[name]["accuracy"] - found[name]["lowest"]) for name in names if name in found]
            high = [max(0.0, found[name]["highest"] - found[name]["accuracy"]) for name in names if name in found]
            axes.errorbar(at, mean, [low, high], fmt=f"{marker}-", capsize=3, markersize=4, label=f"P = {queries}")
        before = statistics.fmean(r["accuracy_before"] for r in own if r["model"] == model)
        axes.axhline(before, color="C7", linestyle="--", linewidth=0.8, label="base model")
        axes.set(xlabel="epsilon (none: no privacy)", ylabel="accuracy on SST-2 dev", title=f"{model}, {mode}")
        axes.set_xticks(range(len(names)), names)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--modes", default="example-local,client-central", help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/privacy_utility"))
    parser.add_argument("--quick", action="store_true", help="two rounds, one seed, 64 test sentences")
    parser.add_argument("--report", action="store_true", help="plays nothing: table and plots of what is there")
    options = parser.parse_args()
    if not SHARED.is_dir():
        parser.error(f"{SHARED} with SST-2 and the models is absent")
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[Cell, Result] = {}
    pairs = list(product(options.models.split(","), options.modes.split(",")))
    with TemporaryDirectory() as data:
        set_public_apart(Path(data), 64 if options.quick else None)
        play = Comparison(Path(data), options.out, options.quick)
        for model, mode in pairs if not options.report else []:
            for queries in QUERIES:
                play.start(Start(model, mode, queries))
            for seed in range(1 if options.quick else options.seeds):
                for queries, budget in product(QUERIES, BUDGETS_OF):
                    play(Cell(model, mode, queries, budget, seed))
    read = Player(options.out, None)
    for (model, mode), queries, budget in product(pairs, QUERIES, BUDGETS_OF):
        for seed in range(options.seeds):
            cell = Cell(model, mode, queries, budget, seed)
            try:
                results[cell] = read(cell)
            except MissingError:
                continue
    rows = rows_of(results)
    (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    for mode in dict.fromkeys(r["mode"] for r in rows):
        plot(rows, mode, options.out / f"{mode}.png")
    print(table(rows))
    print(strict_json({"rows": rows}))


if __name__ == "__main__":
    main()
