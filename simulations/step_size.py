"""How good is learning_rate = "auto"? Its pick against the best learning rate of a sweep, for methods and spaces.

    python simulations/step_size.py [--config FILE] [-o KEY=VALUE]... [--spaces NAMES] [--methods NAMES]

For each space and method the rates auto, 4 auto and auto / 4 are tried, then factors of 2 on either side of the best so
far, until both neighbours of the best are worse by validation loss at the end of the run. All runs of a space and
method are the configuration's own, with its seed; a run that diverges counts as infinitely bad. No test data is used.

Results are kept in --out, one line a run: a sweep that is stopped goes on where it was. Ends with one line of JSON.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedzo import engine
from fedzo.config import Config, flatten, from_flat, load_config
from fedzo.errors import DivergedError
from fedzo.experiment import Experiment
from fedzo.run_folder import RunFolder, strict_json
from fedzo.runtime import keep_memory

SPACES: dict[str, dict[str, Any]] = {
    "as configured": {},
    "full": {"space.kind": "full"},
    "lora": {"space.kind": "adapter", "space.adapter": "lora"},
    "sparse": {"space.kind": "sparse", "space.mask": "sensitive", "space.density": 0.01},
}
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"method.optimizer": "sgd"},
    "sign": {"method.optimizer": "sign"},
    "momentum": {"method.optimizer": "momentum"},
    "adam": {"method.optimizer": "adam"},
    "fzoo": {"method.estimator": "fzoo"},
}
WIDEST = 8  # powers of two at most between a rate that is tried and the pick

Metrics = dict[str, float]


def last_evaluation(experiment: Experiment) -> Metrics:
    """Of a run with the experiment's configuration, at its end."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with engine.run(experiment, RunFolder.create(Path(folder) / "run", experiment.config)) as ledger:
                return ledger.evaluations("validation")[ledger.rounds]
        except DivergedError:
            return {"loss": math.inf}


def sweep(play: Callable[[int], float]) -> dict[int, float]:
    """Losses by exponent of two, until the best has two worse neighbours."""
    found = {exponent: play(exponent) for exponent in (0, 2, -2)}
    while True:
        best = min(found, key=lambda k: found[k])
        missing = [k for k in (best - 1, best + 1) if k not in found and abs(k) <= WIDEST]
        if not missing:
            return found
        found |= {k: play(k) for k in missing}


class Sweeps:
    """The sweeps of a configuration; runs are read from, and added to, a file of JSON lines."""

    def __init__(self, base: Config, path: Path) -> None:
        self.base, self.path = base, path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.done = {(r["space"], r["method"], r["exponent"]): r for r in map(json.loads, lines)}

    def config(self, space: str, method: str) -> Config:
        fixed = {"data.test": "", "evaluation.every": 0, "method.learning_rate": "auto"}
        return from_flat(flatten(self.base) | fixed | SPACES[space] | METHODS[method])

    def row(self, space: str, method: str, experiment: Experiment) -> dict[str, Any]:
        """Auto and best of one space and method."""
        chosen = self.config(space, method)
        experiment.config = chosen
        auto = self.done.get((space, method, 0), {}).get("learning_rate") or experiment.step_size.learning_rate

        def play(exponent: int) -> float:
            key = (space, method, exponent)
            if key not in self.done:
                rate = float(f"{auto * 2.0**exponent:.3g}")
                experiment.config = chosen.with_learning_rate(rate)
                self.done[key] = {"space": space, "method": method, "exponent": exponent, "learning_rate": rate}
                self.done[key] |= last_evaluation(experiment)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(strict_json(self.done[key]) + "\n")
                print(self.done[key], flush=True)
            loss = self.done[key]["loss"]
            return math.inf if loss is None else float(loss)

        losses = sweep(play)
        best = min(losses, key=lambda k: losses[k])
        start, end = (self.done[space, method, k] for k in (0, best))
        return {
            "space": space, "method": method, "auto": auto, "best": end["learning_rate"], "factor": 2.0**best,
            "auto_loss": start["loss"], "best_loss": end["loss"], "auto_accuracy": start.get("accuracy"),
            "best_accuracy": end.get("accuracy"), "runs": len(losses),
        }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| Space | Method | Auto | Best of the sweep | Validation loss: auto | best | Accuracy: auto | best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        losses = ("diverged" if r[key] is None or math.isinf(r[key]) else f"{r[key]:.3f}" for key in LOSSES)
        shares = ("" if r[key] is None else f"{100 * r[key]:.1f}%" for key in ("auto_accuracy", "best_accuracy"))
        best = f"{r['best']:.2g} ({r['factor']:g} x auto)"
        lines.append(f"| {r['space']} | {r['method']} | {r['auto']:.2g} | {best} | {' | '.join((*losses, *shares))} |")
    return "\n".join(lines)


LOSSES = ("auto_loss", "best_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("-o", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--spaces", default="full,lora,sparse", help=f"of {', '.join(SPACES)}")
    parser.add_argument("--methods", default="sgd,sign,adam", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/step-size.jsonl"))
    args = parser.parse_args()
    keep_memory()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sweeps = Sweeps(load_config(args.config, args.changes).resolved(), args.out)
    rows = []
    for space in args.spaces.split(","):
        methods = args.methods.split(",")
        experiment = Experiment(sweeps.config(space, methods[0]))
        rows += [sweeps.row(space, method, experiment) for method in methods]
    print(table(rows))
    print(strict_json({"config": str(args.config), "changes": args.changes, "rows": rows}))


if __name__ == "__main__":
    main()
