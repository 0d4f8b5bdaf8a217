"""Tables and plots of zo_bench.py: rows of figures in, Markdown and PNG out."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from cells import Result, curve

from fedzo.methods import METHODS

Pair = tuple[str, str, str]  # task, scheme, method

SHARE = 0.95  # of a reference's gain
NAMED = 5  # methods of a plot that are named


def row(pair: Pair, reference: bool, rate: float, runs: Sequence[Result], long: Result | None) -> Result:
    """The figures of a method on a task with a scheme, over its seeds; `long` is a run of many more forwards."""
    first, figures = runs[0], dict[str, Any](zip(("task", "scheme", "method"), pair, strict=True))
    figures |= {"reference": reference, "seeds": len(runs), "learning_rate": rate}
    for name in ("trainable", "queries", "forwards_a_step", "rounds", "bytes_sent", "state"):
        figures[name] = first[name]
    figures["forwards"] = first["forwards_a_step"] * first["rounds"]
    for split, name in product(("validation", "test"), ("accuracy", "loss")):
        points = curve(runs, split, name, first["forwards_a_step"])
        figures[f"{split}_{name}_before"] = points[0][1]
        for suffix, value in zip(("", "_min", "_max"), points[-1][1:], strict=True):
            figures[f"{split}_{name}{suffix}"] = value
    figures["peak_mib"] = max(run["peak_bytes"] for run in runs) / 2**20
    figures["cpu_seconds_a_step"] = statistics.median(run["cpu_seconds_a_round"] for run in runs)
    figures["curve"] = curve(runs, "validation", "accuracy", first["forwards_a_step"])
    if long is not None:
        figures["long_curve"] = curve([long], "validation", "accuracy", long["forwards_a_step"])
    return figures


def pair_of(row: Result) -> Pair:
    return row["task"], row["scheme"], row["method"]


def ranked(rows: Sequence[Result], task: str, scheme: str, reference: bool) -> list[Result]:
    """The references, or the others, on a task with a scheme: lowest validation loss first."""
    found = [r for r in rows if (r["task"], r["scheme"], r["reference"]) == (task, scheme, reference)]
    return sorted(found, key=lambda r: float(r["validation_loss"]))


def best(rows: Sequence[Result], count: int) -> list[Result]:
    """Of each task the best methods by validation loss, and the references with their schemes."""
    found: list[Result] = []
    for task in dict.fromkeys(r["task"] for r in rows):
        methods = [r for r in rows if r["task"] == task and not r["reference"]]
        chosen = sorted(methods, key=lambda r: float(r["validation_loss"]))[:count]
        found += [r for scheme in dict.fromkeys(c["scheme"] for c in chosen) for r in ranked(rows, task, scheme, True)]
        found += chosen
    return found


def scalars(rows: Sequence[Result]) -> list[Result]:
    """Those of methods that send no gradients."""
    return [r for r in rows if r["method"] not in METHODS or not METHODS[r["method"]].open]


def reach(points: Sequence[Sequence[float]], level: float) -> float | None:
    """Forwards at which a curve of (forwards, value, ...) first has a level, linear between evaluations, or None."""
    if points[0][1] >= level:
        return points[0][0]
    for (f0, v0, *_), (f1, v1, *_) in pairwise(points):
        if v1 >= level:
            return f0 + (f1 - f0) * (level - v0) / (v1 - v0)
    return None


def goals(rows: Sequence[Result]) -> list[Result]:
    """Of each task, how many forwards its best method of scalars alone needs for `SHARE` of what its scheme's reference
    gains.

    Both by validation loss; the gain is in validation accuracy. Forwards are None where the level is not reached.
    """
    found: list[Result] = []
    for task in dict.fromkeys(r["task"] for r in rows):
        schemes = dict.fromkeys(r["scheme"] for r in rows if r["task"] == task)
        pairs = [(scalars(ranked(rows, task, scheme, False)), ranked(rows, task, scheme, True)) for scheme in schemes]
        firsts = [(methods[0], references[0]) for methods, references in pairs if methods and references]
        if not firsts:
            continue
        method, reference = min(firsts, key=lambda pair: float(pair[0]["validation_loss"]))
        before, after = reference["validation_accuracy_before"], reference["validation_accuracy"]
        level = before + SHARE * (after - before)
        points = method.get("long_curve", method["curve"])
        found.append({
            "task": task, "scheme": method["scheme"], "method": method["method"], "reference": reference["method"],
            "before": before, "after": after, "level": level, "forwards": reach(points, level),
            "within": points[-1][0], "reference_forwards": reach(reference["curve"], level),
        })  # fmt: skip
    return found


def unreached(rows: Sequence[Result]) -> list[Result]:
    """The methods of which a longer run is wanted, to tell how many forwards they need."""
    wanted = [pair_of(goal) for goal in goals(rows) if goal["forwards"] is None]
    return [r for r in rows if pair_of(r) in wanted and "long_curve" not in r]


def spread(row: Result, name: str, form: str) -> str:
    """The mean and, over several seeds, the range."""
    mean, least, largest = (form.format(row[f"{name}{suffix}"]) for suffix in ("", "_min", "_max"))
    return f"{mean} ({least} to {largest})" if row["seeds"] > 1 else mean


COLUMNS: dict[str, Callable[[Result], str]] = {
    "Method": lambda r: f"*{r['method']}*" if r["reference"] else str(r["method"]),
    "Test accuracy": lambda r: spread(r, "test_accuracy", "{:.1%}"),
    "Validation loss": lambda r: spread(r, "validation_loss", "{:.3f}"),
    "Forwards": lambda r: f"{r['forwards']:.0f}",
    "a step": lambda r: f"{r['forwards_a_step']:g}",
    "Learning rate": lambda r: f"{r['learning_rate']:.2g}",
    "Peak memory, MiB": lambda r: f"{r['peak_mib']:.0f}",
    "CPU s a step": lambda r: f"{r['cpu_seconds_a_step']:.3f}",
    "Bytes sent": lambda r: f"{r['bytes_sent']:,}",
    "State / theta": lambda r: f"{r['state']:.3g}",
}


def table(rows: Sequence[Result], reasons: Mapping[Pair, str]) -> str:
    """Markdown: of each task an overview and its goal, then a table of each scheme, its methods by validation loss.

    Args:
        reasons: why there is no row of a pair.
    """
    lines: list[str] = []
    places = dict.fromkeys(pair[:2] for pair in (*map(pair_of, rows), *reasons))
    for task in dict.fromkeys(task for task, _ in places):
        lines += [f"## {task}", "", *_overview(rows, reasons, task), ""]
        lines += [part for goal in goals(rows) if goal["task"] == task for part in (_sentence(goal), "")]
        for scheme in (scheme for of, scheme in places if of == task):
            lines += _of_scheme(rows, reasons, task, scheme)
    return "\n".join(lines)


def _overview(rows: Sequence[Result], reasons: Mapping[Pair, str], task: str) -> list[str]:
    """Test accuracy of a task's methods with each scheme; bold has the lowest validation loss of a scheme."""
    found = {pair_of(r): r for r in rows if r["task"] == task}
    pairs = [pair for pair in (*found, *reasons) if pair[0] == task]
    schemes = dict.fromkeys(scheme for _, scheme, _ in pairs)
    winners = [pair_of(r) for scheme in schemes for r in ranked(rows, task, scheme, False)[:1]]

    def text(pair: Pair) -> str:
        accuracy = f"{found[pair]['test_accuracy']:.1%}" if pair in found else "-"
        return f"**{accuracy}**" if pair in winners else accuracy

    lines = [f"| Test accuracy | {' | '.join(schemes)} |", "|---" * (len(schemes) + 1) + "|"]
    for method in dict.fromkeys(method for _, _, method in pairs):
        lines.append(f"| {method} | {' | '.join(text((task, scheme, method)) for scheme in schemes)} |")
    return lines


def _sentence(goal: Result) -> str:
    forwards = goal["forwards"]
    said = f"not within {goal['within']:.0f} forward passes" if forwards is None else f"after {forwards:.0f}"
    return (
        f"{SHARE:.0%} of what {goal['reference']} gains in validation accuracy with {goal['scheme']} is a level of "
        f"{goal['level']:.1%}, which it reaches after the cost of {goal['reference_forwards']:.0f} forward passes and "
        f"{goal['method']}, the best method, {said}."
    )


def _of_scheme(rows: Sequence[Result], reasons: Mapping[Pair, str], task: str, scheme: str) -> list[str]:
    lines = [f"### {task}, {scheme}", ""]
    found = ranked(rows, task, scheme, True) + ranked(rows, task, scheme, False)
    if found:
        lines += [
            "{trainable:,} values; before: test accuracy {test_accuracy_before:.1%}, validation loss "
            "{validation_loss_before:.3f}.".format(**found[0]),
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
        ]
    lines += [f"| {' | '.join(cell(r) for cell in COLUMNS.values())} |" for r in found]
    absent = {method: reason for (of, among, method), reason in reasons.items() if (of, among) == (task, scheme)}
    if found:
        lines += [f"| {method} {'| - ' * (len(COLUMNS) - 1)}|" for method in absent]
    return [*lines, "", *(f"- {method}: {reason}" for method, reason in absent.items()), ""]


def plot(rows: Sequence[Result], task: str, path: Path) -> None:
    """Validation accuracy over a client's forward passes, a panel a scheme: mean and, shaded, range over the seeds.

    The references and the best methods are named, the others are grey.
    """
    from matplotlib.figure import Figure

    schemes = list(dict.fromkeys(r["scheme"] for r in rows if r["task"] == task))
    figure = Figure(figsize=(4.6 * len(schemes), 4.4), dpi=120, layout="constrained")
    for axes, scheme in zip(figure.subplots(1, len(schemes), squeeze=False, sharey=True)[0], schemes, strict=True):
        methods, references = ranked(rows, task, scheme, False), ranked(rows, task, scheme, True)
        for r in methods[NAMED:]:
            axes.plot([p[0] for p in r["curve"]], [p[1] for p in r["curve"]], color="0.8", linewidth=0.8, zorder=1)
        named = [(r, f"C{i}", "-") for i, r in enumerate(methods[:NAMED])]
        named += [(r, "black", style) for r, style in zip(references, ("--", ":"), strict=False)]
        for r, color, style in named:
            forwards, mean, least, largest = zip(*r["curve"], strict=True)
            axes.plot(forwards, mean, style, color=color, marker="o", markersize=3, label=r["method"])
            axes.fill_between(forwards, least, largest, color=color, alpha=0.12, linewidth=0)
        axes.set(title=f"{task}, {scheme}", xlabel="forward passes of a client")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.axes[0].set_ylabel("validation accuracy")
    figure.savefig(path)
