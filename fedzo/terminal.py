"""What the commands share: their options, and how figures are printed."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

errors = Console(stderr=True, soft_wrap=True, highlight=False)
console = Console(soft_wrap=True, highlight=False)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON, and nothing else.")]
Override = Annotated[
    list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Set a key of the configuration.")
]


def human_bytes(count: float) -> str:
    """A number of bytes, with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def human_seconds(seconds: float) -> str:
    """A span of time, in the unit that it is one or more of."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 1.0 else f"{1000.0 * seconds:.3g} ms"


def shown_quality(metrics: Mapping[str, float]) -> str:
    """What a task is judged by first."""
    name = next((name for name in ("accuracy", "f1") if name in metrics), "perplexity")
    return f"{name} {metrics[name]:.3f}" if name == "perplexity" else f"{name} {metrics[name]:.1%}"


def shown_event(event: Mapping[str, Any], rounds: int) -> str:
    """A round of so many, or an evaluation, in a line; what a private run keeps to itself is left out."""
    from fedzo.federation.coordinator import RoundSummary

    if event["event"] == "evaluation":
        return f"after {event['rounds']} rounds: {event['split']} {shown_quality(event)}, loss {event['loss']:.4f}"
    summary = RoundSummary(**{name: value for name, value in event.items() if name != "event"})
    parts = [f"round {summary.round + 1}/{rounds}", summary.told]
    if event["sampled"] is not None:
        dropped = ", ".join(f"{reason} {count}" for reason, count in event["dropped"].items())
        up, down = human_bytes(event["bytes_up"]), human_bytes(event["bytes_down"])
        parts += [f"{event['accepted']} of {event['sampled']} clients", f"{up} up", f"{down} down"]
        parts += [f"dropped: {dropped}"] if dropped else []
    return "  ".join(parts)


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Rows with the same columns, a line each, however long: nothing is cut."""
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    for row in [{column: column for column in widths}, *rows]:
        console.print("  ".join(f"{row[column]:{width}}" for column, width in widths.items()).rstrip(), markup=False)


_NAMES = {
    "weights_up_per_client": "had it sent the weights",
    "model_up_per_client": "had it sent the whole model",
}


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Figures by name, a line each, or as one line of JSON."""
    if as_json:
        from fedzo.files import strict_json

        print(strict_json(figures))
        return
    names = {name: _NAMES.get(name, name.replace("_", " ")) for name in figures}
    width = max(map(len, names.values()))
    for name, value in figures.items():  # a line each, however long: hashes are there to be copied
        console.print(f"{names[name]:{width}}  {_shown(name, value)}", markup=False)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
    if name == "learning_rate":
        return f"{value:.3g}"
    if name.endswith("_seconds"):
        return human_seconds(value)
    if isinstance(value, float):
        share = any(part in name for part in ("accuracy", "f1", "exact_match"))
        return f"{value:.2%}" if share else f"{value:.4f}"
    if isinstance(value, int):
        if name.endswith(("_per_client", "_bytes")):
            return f"{value} bytes" if value < 1000 else f"{value:,} bytes ({human_bytes(value)})"
        return f"{value:,}"
    return str(value)
