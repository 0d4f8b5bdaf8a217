"""What is known of the named methods, derived from their parts: for `fedzo methods` and docs/methods.md."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

from fedzo.config import Config, SpaceSection, flatten
from fedzo.estimators import ESTIMATORS, Estimator
from fedzo.federation.spec import SEED_SCHEDULES
from fedzo.limits import PRIVACY_MODES, Condition, Value
from fedzo.methods import METHODS, Method
from fedzo.optimizers import OPTIMIZERS, Rule
from fedzo.registry import lookup
from fedzo.structures import STRUCTURES, Structure

SPACES: tuple[str, ...] = get_args(SpaceSection.model_fields["kind"].annotation)
_PLAIN = METHODS["zo-sgd"]  # whose parts are those of a configuration that names none
T = TypeVar("T", bound=Value)


@dataclass(frozen=True)
class Part:
    """One of the parts that make a method what it is.

    Attributes:
        kind: "estimator", "structure" or "optimizer".
        name: in the kind's registry.
        source: paper and equation.
        formula: what it computes, the first paragraph of its documentation.
    """

    kind: str
    name: str
    source: str
    formula: str


@dataclass(frozen=True)
class Facts:
    """What there is to know of a method before it is used.

    Attributes:
        name, title: as in `METHODS`.
        keys: of the configuration, that make it, but for those that are plain ZO-SGD's.
        parts: that differ from plain ZO-SGD's; of that its estimator and rule.
        paper: where it comes from, if not from its parts' sources.
        forwards: forward passes a step with P queries, over the default settings, on average over a run.
        scalars: that a query sends.
        state: what its state takes in the memory of a theta.
        local_steps: the K that it is valid for: "any" or "1".
        seeds, spaces, private: seed schedules, kinds of space and privacy modes that it is valid under.
        limits: its conditions, with their reasons.
    """

    name: str
    title: str
    keys: Mapping[str, Value]
    parts: tuple[Part, ...]
    paper: str
    forwards: str
    scalars: int
    state: int
    local_steps: str
    seeds: tuple[str, ...]
    spaces: tuple[str, ...]
    private: tuple[str, ...]
    limits: tuple[Condition, ...]


def facts(name: str) -> Facts:
    """Those of a method.

    Raises:
        ConfigError: the method is unknown; the message offers the nearest one.
    """
    method = lookup(METHODS, name, "method")
    classes = _classes(method)
    values = flatten(Config()) | method.keys
    limits = tuple(dict.fromkeys(limit for part in classes.values() for limit in part.limits))

    def allowed(key: str, candidates: Sequence[T]) -> tuple[T, ...]:
        fixed = [value for value in candidates if method.keys.get(key, value) == value]
        kept = [limit for limit in limits if limit.key == key]
        return tuple(value for value in fixed if not any(limit.fault(values | {key: value}) for limit in kept))

    own = [kind for kind in classes if values[f"method.{kind}"] != _PLAIN.keys[f"method.{kind}"]]
    parts = tuple(_part(kind, getattr(method, kind), classes[kind]) for kind in own or ["estimator", "optimizer"])
    return Facts(
        name=name,
        title=method.title,
        keys={key: value for key, value in method.keys.items() if value != _PLAIN.keys.get(key)},
        parts=parts,
        paper=method.paper,
        forwards=_forwards(method, values),
        scalars=ESTIMATORS[method.estimator].scalars,
        state=OPTIMIZERS[method.optimizer].state_vectors,
        local_steps="any" if len(allowed("federation.local_steps", (1, 2))) == 2 else "1",
        seeds=allowed("federation.seeds", SEED_SCHEDULES),
        spaces=allowed("space.kind", SPACES),
        private=tuple(mode for mode in PRIVACY_MODES if all(mode in part.private for part in classes.values())),
        limits=limits,
    )


def _classes(method: Method) -> dict[str, type[Estimator] | type[Structure] | type[Rule]]:
    return {
        "estimator": ESTIMATORS[method.estimator],
        "structure": STRUCTURES[method.structure],
        "optimizer": OPTIMIZERS[method.optimizer],
    }


def _part(kind: str, name: str, part: type[Estimator] | type[Structure] | type[Rule]) -> Part:
    paragraph = (inspect.getdoc(part) or "").split("\n\n")[0]
    return Part(kind, name, part.source, " ".join(paragraph.split()))


def _forwards(method: Method, values: Mapping[str, Value]) -> str:
    """As a formula in P."""
    part, beside = ESTIMATORS[method.estimator], OPTIMIZERS[method.optimizer].forwards
    estimator = part({name: values[f"method.{name}"] for name in part.settings})
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
        "made of": ", ".join(f"{key.partition('.')[2]} {value}" for key, value in found.keys.items()),
        "forwards": found.forwards,
        "scalars": str(found.scalars),
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
        lines += [f"- {part.kind} `{part.name}`: {part.formula} {part.source}." for part in found.parts]
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


if __name__ == "__main__":
    print(markdown(), end="")
