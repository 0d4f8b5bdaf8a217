"""Examples dealt to clients by flwr-datasets' partitioners."""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzo.errors import ConfigError, DataError
from fedzo.registry import lookup
from fedzo.tasks.data import permutation
from fedzo.tasks.prompts import Example

Ints = npt.NDArray[np.int64]


def _iid(clients: int, alpha: float, seed: int, min_size: int) -> Any:
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(clients)


def _linear(clients: int, alpha: float, seed: int, min_size: int) -> Any:
    from flwr_datasets.partitioner import LinearPartitioner

    return LinearPartitioner(clients)


def _dirichlet(clients: int, alpha: float, seed: int, min_size: int) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner

    return DirichletPartitioner(
        clients, "key", float(alpha), min_partition_size=min_size, self_balancing=False, shuffle=False, seed=seed
    )


def _pathological(clients: int, alpha: float, seed: int, min_size: int) -> Any:
    from flwr_datasets.partitioner import PathologicalPartitioner

    return PathologicalPartitioner(clients, "key", 2, class_assignment_mode="deterministic", shuffle=False)


def _natural(clients: int, alpha: float, seed: int, min_size: int) -> Any:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    return NaturalIdPartitioner("key")


OWN = "own"  # no partition: every client brings its own examples
PARTITIONERS: dict[str, Callable[[int, float, int, int], Any]] = {
    "iid": _iid,
    "linear": _linear,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "natural": _natural,
}
_BY_COLUMN = ("dirichlet", "pathological", "natural")


def partition(
    examples: Sequence[Example],
    clients: int,
    *,
    kind: str = "iid",
    alpha: float = 0.5,
    column: str = "",
    seed: int = 0,
    min_size: int = 1,
) -> list[Ints]:
    """Deal every example to exactly one client.

    Args:
        examples: n examples.
        clients: number of clients; 0 with "natural": as many as there are ids.
        kind: "iid" (equal sizes, shuffled), "linear" (sizes growing with the client's number, shuffled), "dirichlet"
            (each label spread over the clients by a draw from Dirichlet(alpha)), "pathological" (two labels a client),
            "natural" (by the ids in `column`; where there are more ids than clients the ids, shuffled, are dealt in
            turn, so that all examples of an id stay together).
        alpha: Dirichlet concentration, above 0; smaller is more skewed.
        column: the column of labels or ids; empty: "label", and "natural" needs one.
        seed: the partition is a function of it (and, with "dirichlet", of the NumPy version's generator); no global
            generator is read or written.
        min_size: fewest examples of a client.

    Returns:
        For each client int64 indices into `examples`, ascending.

    Raises:
        ConfigError: unknown kind, or an impossible value.
        DataError: the examples do not allow it.
    """
    build = lookup(PARTITIONERS, kind, "partition")
    if alpha <= 0:
        raise ConfigError(f"alpha is {alpha}, but must be above 0; 0.1 is very skewed, 100 nearly even")
    if clients < (0 if kind == "natural" else 1):
        raise ConfigError(f"clients is {clients}, but must be at least 1")
    if kind == "natural" and not column:
        raise ConfigError('partition "natural" needs the name of the column with the client ids; set data.column')
    if clients > len(examples):
        raise DataError(f"{len(examples)} examples cannot be dealt to {clients} clients; ask for fewer clients")
    shuffled = permutation(seed, len(examples))
    keys = _keys(examples, column or "label") if kind in _BY_COLUMN else None
    parts = _parts(build(clients, alpha, seed, min_size), shuffled, keys, kind)
    if kind == "natural" and clients:
        if clients > len(parts):
            raise DataError(
                f"column {column!r} has {len(parts)} different ids, but there are {clients} clients; set clients to "
                f"{len(parts)} or fewer"
            )
        turn = permutation(seed, len(parts))
        parts = [np.concatenate([parts[i] for i in turn[client::clients]]) for client in range(clients)]
    if sum(map(len, parts)) != len(examples):
        raise DataError(f"partition {kind!r} with {clients} clients leaves examples out; ask for more clients")
    smallest = min(map(len, parts))
    if smallest < min_size:
        raise DataError(
            f"partition {kind!r}: a client has {smallest} examples, but every client needs {min_size}; ask for fewer "
            "clients or a less skewed partition"
        )
    return [np.sort(part) for part in parts]


def _keys(examples: Sequence[Example], column: str) -> list[str]:
    missing = sum(example.get(column) is None for example in examples)
    if missing:
        found = ", ".join(map(str, examples[0]))
        raise DataError(f"column {column!r} is missing in {missing} of {len(examples)} examples; columns: {found}")
    return [str(example[column]) for example in examples]


def _parts(partitioner: Any, shuffled: Ints, keys: list[str] | None, kind: str) -> list[Ints]:
    """Index arrays of all partitions of a data set that holds nothing but the shuffled examples' keys."""
    from datasets import Dataset

    columns: dict[str, Any] = {"index": shuffled}
    if keys is not None:
        columns["key"] = [keys[i] for i in shuffled]
    data: Any = Dataset.from_dict(columns)
    # What is selected are the indices themselves: to make a Dataset of each client's takes a millisecond.
    data.select = lambda indices, **_: shuffled[np.asarray(indices, dtype=np.int64)]
    partitioner.dataset = data
    try:
        # The natural partitioner draws a progress bar, Dirichlet warns at each new draw.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return [partitioner.load_partition(number) for number in range(partitioner.num_partitions)]
    except ValueError:
        if kind == "dirichlet":
            raise DataError(
                "partition 'dirichlet': each of its draws left a client with too few examples; raise alpha, or ask "
                "for fewer clients"
            ) from None
        # Not the partitioner's own words: they may hold values of the data.
        raise DataError(f"partition {kind!r} leaves a client without examples; ask for fewer clients") from None
