"""Draws of units from the operating system's entropy: one that a known seed repeats would hide nobody."""

import os
import random

import numpy as np
import numpy.typing as npt

_WORDS = 2.0**64


def poisson(total: int, rate: float) -> npt.NDArray[np.int64]:
    """Each index below `total` with probability `rate`, independently; int64, ascending."""
    if rate >= 1.0:
        return np.arange(total, dtype=np.int64)
    words = np.frombuffer(os.urandom(8 * total), dtype="<u8")
    return np.flatnonzero(words < np.uint64(int(rate * _WORDS))).astype(np.int64)


def fixed(total: int, count: int) -> npt.NDArray[np.int64]:
    """`count` different indices below `total` (all, where there are not more), each set of them equally likely."""
    return np.sort(np.array(random.SystemRandom().sample(range(total), min(count, total)), dtype=np.int64))
