"""Aggregation: the scalars of n clients -> the records of a round.

All take scalars float64 [n, K, P] in the order of client numbers, weights float64 [n] that sum to 1, and settings. Sums
run in that order, so that every machine gets the same bits.

Weighings return a factor for each client, float64 [n]: the aggregate is the sum of the clients' scalars times these,
and clients may have tried seeds of their own. Combinations compare the clients' answers to one seed, and return float64
[K, P].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """What aggregations read.

    Attributes:
        trim: part cut at each end, for trimmed-mean.
        norm_bound: L2 norm of a client's scalars at most, for norm-bound; 0: the median of the round's norms.
    """

    trim: float = 0.0
    norm_bound: float = 0.0


Aggregate = Callable[[Array, Array, Settings], Array]


def mean(scalars: Array, weights: Array, settings: Settings) -> Array:
    """Weighted by example counts (FedAvg)."""
    return weights


def uniform(scalars: Array, weights: Array, settings: Settings) -> Array:
    """Every client counts the same."""
    return np.full(len(scalars), 1.0 / len(scalars))


def norm_bound(scalars: Array, weights: Array, settings: Settings) -> Array:
    """As uniform, of scalars scaled down to a norm at most (Sun et al., arXiv 1911.07963).

    Of an even number of norms the median is the lower of the two in the middle, so that half of the clients cannot
    raise it. Scalars are finite and of float32's range, so that no norm overflows.
    """
    norms = np.array([np.sqrt(np.cumsum(np.square(row))[-1]) for row in scalars])
    bound = settings.norm_bound or np.sort(norms)[(len(norms) - 1) // 2]
    factors = np.ones(len(norms))
    np.divide(bound, norms, out=factors, where=norms > bound)
    return factors / len(norms)


def median(scalars: Array, weights: Array, settings: Settings) -> Array:
    """Coordinate-wise median (Yin et al., arXiv 1803.01498)."""
    ordered = np.sort(scalars, axis=0)
    n = len(ordered)
    middle: Array = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2.0
    return middle


def trimmed_mean(scalars: Array, weights: Array, settings: Settings) -> Array:
    """Coordinate-wise mean without the floor(trim n) lowest and highest values (Yin et al., arXiv 1803.01498)."""
    cut = int(settings.trim * len(scalars))
    kept = np.sort(scalars, axis=0)[cut : len(scalars) - cut]
    return _sum(kept, np.full(len(kept), 1.0 / len(kept)))


def _sum(scalars: Array, factors: Array) -> Array:
    total = np.zeros(scalars.shape[1:], dtype=np.float64)
    for row, factor in zip(scalars, factors, strict=True):
        total += row * factor
    return total


def _summed(weighing: Aggregate) -> Aggregate:
    return lambda scalars, weights, settings: _sum(scalars, weighing(scalars, weights, settings))


WEIGHINGS: dict[str, Aggregate] = {"mean": mean, "uniform": uniform, "norm-bound": norm_bound}
COMBINATIONS: dict[str, Aggregate] = {"median": median, "trimmed-mean": trimmed_mean}
AGGREGATORS: dict[str, Aggregate] = {name: _summed(made) for name, made in WEIGHINGS.items()} | COMBINATIONS
