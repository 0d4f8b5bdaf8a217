"""Aggregation: the scalars of n clients -> the records of a round.

All take scalars float64 [n, K, P] in the order of client numbers and weights float64 [n] that sum to 1, and return
float64 [K, P]. Sums run in that order, so that every machine gets the same bits.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _weighted(scalars: Array, weights: Array) -> Array:
    total = np.zeros(scalars.shape[1:], dtype=np.float64)
    for row, weight in zip(scalars, weights, strict=True):
        total += row * weight
    return total


def _uniform(scalars: Array) -> Array:
    return _weighted(scalars, np.full(len(scalars), 1.0 / len(scalars)))


def mean(scalars: Array, weights: Array, trim: float) -> Array:
    """Weighted by example counts (FedAvg)."""
    return _weighted(scalars, weights)


def uniform(scalars: Array, weights: Array, trim: float) -> Array:
    """Every client counts the same."""
    return _uniform(scalars)


def median(scalars: Array, weights: Array, trim: float) -> Array:
    """Coordinate-wise median (Yin et al., arXiv 1803.01498)."""
    ordered = np.sort(scalars, axis=0)
    n = len(ordered)
    middle: Array = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2.0
    return middle


def trimmed_mean(scalars: Array, weights: Array, trim: float) -> Array:
    """Coordinate-wise mean without the floor(trim n) lowest and highest values (Yin et al., arXiv 1803.01498)."""
    cut = int(trim * len(scalars))
    ordered = np.sort(scalars, axis=0)
    return _uniform(ordered[cut : len(ordered) - cut])


AGGREGATORS: dict[str, Callable[[Array, Array, float], Array]] = {
    "mean": mean,
    "uniform": uniform,
    "median": median,
    "trimmed-mean": trimmed_mean,
}
# These combine the clients' answers to one seed, so all clients must have tried the same seeds.
NEEDS_SHARED_SEEDS: frozenset[str] = frozenset({"median", "trimmed-mean"})
