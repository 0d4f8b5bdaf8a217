"""What a run is and did: its figures, its verification, its plots."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedzo.engine import best_round
from fedzo.errors import LedgerError, RunError
from fedzo.events import read_events
from fedzo.experiment import Experiment
from fedzo.federation.ledger import Ledger
from fedzo.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Traffic:
    """Cumulative payload of an average client after each round, in bytes.

    Attributes:
        up, down: sent and received by fedzo.
        weights_up: sent, had every asked client returned the trainable weights in float32.
        model_up: sent, had it returned the whole model in float32.
    """

    up: list[float]
    down: list[float]
    weights_up: list[float]
    model_up: list[float]


def traffic(ledger: Ledger) -> Traffic:
    """The bytes of a run, from its summaries; empty for a private run whose ledger hides how many took part."""
    spec, result = ledger.spec, Traffic([], [], [], [])
    up = down = asked = 0
    for summary in ledger.summaries():
        if summary["sampled"] is None:
            break
        up, down, asked = up + summary["bytes_up"], down + summary["bytes_down"], asked + summary["sampled"]
        for series, total in (
            (result.up, up),
            (result.down, down),
            (result.weights_up, 4 * spec.size * asked),
            (result.model_up, 4 * spec.parameters * asked),
        ):
            series.append(total / spec.clients)
    return result


def summarise(ledger: Ledger) -> dict[str, Any]:
    """The figures of a run by name; those not measured are absent."""
    spec, rounds, sent = ledger.spec, ledger.summaries(), traffic(ledger)
    dropped: Counter[str] = Counter()
    for summary in rounds:
        dropped.update(summary["dropped"] or {})
    last = list(ledger.read(ledger.rounds - 1)) if ledger.rounds else []
    figures: dict[str, Any] = {
        "ledger_hash": ledger.head.hex(),
        "theta_digest": last[0].digest.hex() if last else spec.theta0,
        "rounds": ledger.rounds,
        "rounds_planned": spec.rounds,
        "clients": spec.clients,
        "trainable": spec.size,
        "parameters": spec.parameters,
        "records": sum(summary["scalars"] for summary in rounds),
    }
    if sent.up or not rounds:
        figures["accepted"] = sum(summary["accepted"] for summary in rounds)
        figures["dropped"] = dict(sorted(dropped.items()))
    if spec.mask:
        figures["mask"] = spec.mask
    if members := ledger.members():
        figures["bases"] = dict(sorted(Counter(_base(member) for member in members.values()).items()))
    if sent.up:
        figures |= {
            "bytes_up_per_client": round(sent.up[-1]),
            "bytes_down_per_client": round(sent.down[-1]),
            "artifact_bytes": sum(summary["artifact_bytes"] for summary in rounds),
            "weights_up_per_client": round(sent.weights_up[-1]),
            "model_up_per_client": round(sent.model_up[-1]),
        }
    for split in ("validation", "test"):
        evaluations = ledger.evaluations(split)
        if evaluations:
            first, final = min(evaluations), max(evaluations)
            for name in evaluations[final]:
                figures[f"{split}_{name}_before"] = evaluations[first].get(name)
                figures[f"{split}_{name}"] = evaluations[final][name]
    if ledger.evaluations("validation"):
        figures["best_round"] = best_round(ledger)
    return figures


def _base(member: Mapping[str, Any]) -> str:
    """ "nf4", and "nf4 in bfloat16" where that is not float32."""
    dtype = "" if member["compute_dtype"] == "float32" else f" in {member['compute_dtype']}"
    return f"{member['quantisation']}{dtype}"


def follow(folder: RunFolder, pause: float = 0.5) -> Iterator[dict[str, Any]]:
    """Rounds and evaluations of a run, as in metrics.jsonl, in order, those to come as they are committed by whichever
    process runs it; ends with the run. The ledger is only read, and waited for.

    Args:
        pause: seconds between two looks.

    Raises:
        RunError: the run stopped before its end while it was followed.
    """
    while not folder.ledger.exists():
        time.sleep(pause)
    rounds, seen = 0, set[tuple[str, int]]()
    _, at = read_events(folder.event_log)
    while True:
        events, at = read_events(folder.event_log, at)
        with Ledger(folder.ledger) as ledger:
            # Evaluations first: the rounds that they come after are there then.
            evaluations = {split: ledger.evaluations(split) for split in ("validation", "test")}
            new = [(one["round"] + 1, {"event": "round", **one}) for one in ledger.summaries(rounds)]
            rounds += len(new)
            over = bool(ledger.ended) or rounds == ledger.spec.rounds
        for split, found in evaluations.items():
            for after in sorted(found.keys() - {after for known, after in seen if known == split}):
                seen.add((split, after))
                new.append((after, {"event": "evaluation", "rounds": after, "split": split, **found[after]}))
        yield from (one for _, one in sorted(new, key=lambda pair: pair[0]))
        # A run with test data is evaluated on it first and last.
        if over and rounds in evaluations["validation"] and (rounds in evaluations["test"] or not evaluations["test"]):
            return
        for event in events:
            if event.get("event") in ("run-failed", "run-interrupted"):
                why = event.get("message") or event.get("error") or "it was interrupted"
                raise RunError(f"the run in {folder.path} stopped after {rounds} rounds: {why}")
        time.sleep(pause)


def verify(ledger: Ledger, experiment: Experiment | None, progress: Callable[[int], None] = lambda _: None) -> int:
    """Re-hashes a ledger and, given the base model, replays it and compares every recorded digest of theta.

    Returns the number of digests compared.

    Raises:
        LedgerError: names the first bad round.
    """
    for name in filter(None, (ledger.spec.initial, ledger.spec.mask)):
        ledger.artifact(name)
    replica = None
    if experiment is not None:
        replica = experiment.replica(ledger.spec)
        if replica.digest().hex() != ledger.spec.theta0 and ledger.spec.initial:
            replica.reset(ledger.artifact(ledger.spec.initial))
        if replica.digest().hex() != ledger.spec.theta0:
            raise LedgerError(f"{ledger.path} belongs to another model: theta0 of this one is not the ledger's")
    compared = 0
    for entry in ledger.read():
        if replica is not None:
            replica.apply([entry.records()])
            if any(entry.digest):
                compared += 1
                if replica.digest() != entry.digest:
                    raise LedgerError(
                        f"{ledger.path}: round {entry.round} replays to another theta than its digest says"
                    )
        progress(entry.round + 1)
    return compared


def plot(ledger: Ledger, directory: Path) -> list[Path]:
    """Draws loss.png, accuracy.png and bytes.png; returns those drawn.

    Raises:
        RunError: matplotlib is missing, or nothing has been run yet.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError('plots need matplotlib: pip install "fedzo[plots]"') from error
    rounds = ledger.summaries()
    if not rounds:
        raise RunError(f"{ledger.path} has no rounds to plot yet")
    paths: list[Path] = []

    def draw(name: str, ylabel: str, fill: Callable[["Axes"], None]) -> None:
        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.subplots()
        fill(axes)
        axes.set(xlabel="round", ylabel=ylabel)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        path = directory / f"{name}.png"
        try:
            figure.savefig(path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error
        paths.append(path)

    def loss(axes: "Axes") -> None:
        points = [(s["round"] + 1, s["loss"]) for s in rounds if s["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color="C7", linewidth=0.8, label="clients' batches")
        _evaluations(axes, ledger, "loss")

    def quality(name: str) -> Callable[["Axes"], None]:
        return lambda axes: _evaluations(axes, ledger, name)

    def bytes_(axes: "Axes") -> None:
        sent, xs = traffic(ledger), range(1, len(rounds) + 1)
        axes.plot(xs, sent.model_up, color="C3", linestyle="--", label="whole model, sent")
        axes.plot(xs, sent.weights_up, color="C1", linestyle="--", label="trainable weights, sent")
        axes.plot(xs, sent.down, color="C0", label="fedzo, received")
        axes.plot(xs, sent.up, color="C2", label="fedzo, sent")
        axes.set_yscale("log")

    draw("loss", "loss", loss)
    measured = {name for split in ("validation", "test") for m in ledger.evaluations(split).values() for name in m}
    for name in sorted(measured - {"loss"}):
        draw(name, name, quality(name))
    if traffic(ledger).up:
        draw("bytes", "bytes of an average client, cumulative", bytes_)
    return paths


def _evaluations(axes: "Axes", ledger: Ledger, name: str) -> None:
    for split, style in (("validation", "C0o-"), ("test", "C3D")):
        points = [(rounds, m[name]) for rounds, m in ledger.evaluations(split).items() if name in m]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=split)
