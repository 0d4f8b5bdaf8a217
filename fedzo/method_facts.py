"""What is known of the named methods, derived from their parts: for `fedzo methods` and docs/methods.md."""

import inspect
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

from fedzo.config import Config, MethodSection, SpaceSection, flatten, from_flat
from fedzo.errors import ConfigError
from fedzo.estimators import ESTIMATORS, Estimator
from fedzo.federation.spec import POOLS, SEED_SCHEDULES
from fedzo.limits import PRIVACY_MODES, Condition, Value
from fedzo.methods import METHODS
from fedzo.optimizers import Hybrid, PoolSGD, Rule
from fedzo.registry import lookup
from fedzo.structures import Structure

SPACES: tuple[str, ...] = get_args(SpaceSection.model_fields["kind"].annotation)
_PLAIN = METHODS["zo-sgd"].keys  # what a configuration that names none is made of
T = TypeVar("T", bound=Value)
MARK = "<!-- Below: written by `python -m fedzo.method_facts docs/methods.md`; a test compares. -->"


@dataclass(frozen=True)
class Part:
    """One of the parts that make a method what it is.

    Attributes:
        kind: name of the key that chooses it: "estimator", "structure", "optimizer", ...
        name: the key's value.
        source: paper and equation.
        formula: what it computes, the first paragraph of its documentation.
        remarks: its further paragraphs.
    """

    kind: str
    name: str
    source: str
    formula: str
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What there is to know of a method before it is used.

    Attributes:
        name, title: as in `METHODS`.
        keys: of the configuration, that make it, but for those that are plain ZO-SGD's.
        open: keys that it needs as well, and that are the user's to give.
        parts: that differ from plain ZO-SGD's; of that its estimator and rule.
        paper: where it comes from, if not from its parts' sources.
        forwards: forward passes a step with P queries, over the default settings, on average over a run.
        scalars: that a query sends.
        arrays: a client sends the gradient of a part of theta as well.
        state: what its state takes in the memory of a theta.
        local_steps: the K that it is valid for: "any" or "1".
        seeds, spaces, private: seed schedules, kinds of space and privacy modes that it is valid under.
        limits: its conditions, with their reasons.
    """

    name: str
    title: str
    keys: Mapping[str, Value]
    open: tuple[str, ...]
    parts: tuple[Part, ...]
    paper: str
    forwards: str
    scalars: int
    arrays: bool
    state: int
    local_steps: str
    seeds: tuple[str, ...]
    spaces: tuple[str, ...]
    private: tuple[str, ...]
    limits: tuple[Condition, ...]


def facts(name: str) -> Facts:
    """Those of a method.

    Raises:
        ConfigError: the method is unknown (the message offers the nearest one), or its own parts contradict each other.
    """
    method = lookup(METHODS, name, "method")
    values: dict[str, Value] = flatten(Config()) | method.keys | dict.fromkeys(method.open, "*")
    parts = _classes(values)
    spaces = tuple(kind for kind in SPACES if not _fault(name, _space(kind)))
    if not spaces:
        raise ConfigError(f'method "{name}" is valid for no kind of space. {_fault(name, _space(SPACES[0]))}')

    def allowed(key: str, candidates: Sequence[T]) -> tuple[T, ...]:
        kept = [value for value in candidates if method.keys.get(key, value) == value]
        return tuple(value for value in kept if not _fault(name, {**_space(spaces[0]), key: value}))

    own = [kind for kind in parts if values[kind] != _PLAIN.get(kind)] or ["method.estimator", "method.optimizer"]
    estimator = ESTIMATORS[method.estimator]
    rules = [part for part in parts.values() if issubclass(part, Rule)]
    return Facts(
        name=name,
        title=method.title,
        keys={key: value for key, value in method.keys.items() if value != _PLAIN.get(key)},
        open=method.open,
        parts=tuple(_part(kind, str(values[kind]), parts[kind]) for kind in own),
        paper=method.paper,
        forwards=_forwards(estimator, values, sum(rule.forwards for rule in rules)),
        scalars=estimator.scalars,
        arrays=Hybrid in rules,
        state=sum(rule.state_vectors for rule in rules),
        local_steps="any" if len(allowed("federation.local_steps", (1, 2))) == 2 else "1",
        seeds=allowed("federation.seeds", SEED_SCHEDULES),
        spaces=spaces,
        private=tuple(mode for mode in PRIVACY_MODES if all(mode in part.private for part in parts.values())),
        limits=tuple(dict.fromkeys(limit for part in parts.values() for limit in part.limits)),
    )


def _space(kind: str) -> dict[str, Value]:
    """The keys that choose a kind of space."""
    quantisation = {"scales": "nf4", "codes": "int8"}.get(kind, "none")
    return {"space.kind": kind, "model.quantisation": quantisation}


def _fault(name: str, keys: Mapping[str, Value]) -> str | None:
    """Why a configuration that names a method and gives further keys is refused; None: it is not."""
    try:
        from_flat({"method.name": name, **dict.fromkeys(METHODS[name].open, "*"), **keys}, name)
    except ConfigError as error:
        return str(error)
    return None


def _classes(values: Mapping[str, Value]) -> dict[str, type[Estimator] | type[Structure] | type[Rule]]:
    """What a method is made of, by the key that names it."""
    section = {key.removeprefix("method."): value for key, value in values.items() if key.startswith("method.")}
    config = Config.model_construct(method=MethodSection.model_validate(section))
    found = {f"method.{name}": part for part, name in config.parts()}
    return found | ({"federation.seeds": PoolSGD} if values["federation.seeds"] in POOLS else {})


def _part(kind: str, name: str, part: type[Estimator] | type[Structure] | type[Rule]) -> Part:
    paragraphs = [" ".join(text.split()) for text in (inspect.getdoc(part) or "").split("\n\n")]
    formula, *remarks = [text for text in paragraphs if not text.startswith(("Args:", "Attributes:", "Raises:"))]
    return Part(kind.partition(".")[2], name, part.source, formula, tuple(remarks))


def _forwards(kind: type[Estimator], values: Mapping[str, Value], beside: int) -> str:
    """As a formula in P."""
    estimator = kind({name: values[f"method.{name}"] for name in kind.settings})
    one, two, three = (estimator.forwards(queries) + beside for queries in (1, 2, 3))
    slope = two - one
    if abs(three - two - slope) > 1e-9:
        return f"{one:g} for P = 1, {two:g} for P = 2"
    terms = [f"{'' if slope == 1 else f'{slope:g} '}P"] if slope else []
    terms += [f"{one - slope:g}"] if one != slope else []
    return " + ".join(terms)


def named(chosen: Sequence[str], known: Sequence[str]) -> str:
    """Some of the known names, in few words: "all", "none", "all but a", "a, b"."""
    left = [name for name in known if name not in chosen]
    if len(left) <= 1:
        return f"all but {left[0]}" if left else "all"
    return ", ".join(chosen) or "none"


def row(found: Facts) -> dict[str, str]:
    """A method's line of the table, by column."""
    return {
        "method": found.name,
        "made of": ", ".join(
            f"{key.partition('.')[2]} {value}"
            for key, value in {**found.keys, **dict.fromkeys(found.open, "...")}.items()
        ),
        "forwards": found.forwards,
        "scalars": f"{found.scalars}{' + gradient' if found.arrays else ''}",
        "state": str(found.state),
        "K": found.local_steps,
        "seeds": named(found.seeds, SEED_SCHEDULES),
        "spaces": named(found.spaces, SPACES),
        "private": named(found.private, PRIVACY_MODES),
    }


def markdown() -> str:
    """The generated part of docs/methods.md: the methods in a table, their formulas, their limits with reasons."""
    every = [facts(name) for name in METHODS]
    lines = ["## All methods", "", *_table([row(found) for found in every]), "", "## Formulas and sources"]
    for found in every:
        title = f"{found.title[:1].upper()}{found.title[1:]}"
        lines += ["", f"### {found.name}", "", f"{title}{f' ({paper})' if (paper := found.paper) else ''}.", ""]
        for part in found.parts:
            text = f"- {part.kind} `{part.name}`: {part.formula} {part.source}."
            lines += textwrap.wrap(text, 125, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    limits = dict.fromkeys(limit for found in every for limit in found.limits)
    reasons = [
        {
            "needs": f"`{limit.wanted}`",
            "because": limit.because,
            "methods": named([found.name for found in every if limit in found.limits], list(METHODS)),
        }
        for limit in limits
    ]
    return "\n".join([*lines, "", "## Limits and their reasons", "", *_table(reasons)]) + "\n"


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(cells.values()) for cells in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def rewrite(text: str) -> str:
    """docs/methods.md with its generated part as it should be."""
    return text.partition(MARK)[0] + f"{MARK}\n\n{markdown()}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
