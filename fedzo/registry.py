"""Looking a name up, with the nearest valid one offered when it is unknown."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from fedzo.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as `` Did you mean 'sgd'?``, or the list of what is known when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."


def lookup(registry: Mapping[str, T], name: str, what: str) -> T:
    """The entry of a registry.

    Raises:
        ConfigError: the name is unknown; the message offers the nearest one.
    """
    if name not in registry:
        raise ConfigError(f"unknown {what} {name!r}. {nearest(name, registry)}")
    return registry[name]
