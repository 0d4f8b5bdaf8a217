"""Products and orthonormal columns on the CPU: compiled loops whose order of operations is fixed."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedzo.directions.numba_cpu import CHUNK, share

# Columns of the right factor that are worked on together: rank times 4 KiB stay in the first-level cache.
_TILE = 1024
# What of a column is left by rounding alone, where it depends on those before it.
_DEPENDENT = 1e-9


def _multiply(out: Any, left: Any, right: Any, first: Any) -> None:
    """out[t] = sum_k left[i, k] right[k, j] for (i, j) = divmod(first + t, columns), added in the order of k."""
    rank, columns = right.shape
    row, column, at = first // columns, first % columns, 0
    while at < out.size:
        width = min(columns - column, out.size - at)
        for start in range(0, width, _TILE):
            stop = min(start + _TILE, width)
            target, source, factor = out[at + start : at + stop], right[0, column + start : column + stop], left[row, 0]
            for j in range(target.size):
                target[j] = factor * source[j]
            for k in range(1, rank):
                source, factor = right[k, column + start : column + stop], left[row, k]
                for j in range(target.size):
                    target[j] += factor * source[j]
        at += width
        row += 1
        column = 0


def _orthonormalise(columns: Any) -> None:
    """Modified Gram-Schmidt in place, each column twice against those before it; columns [r, n], one a row."""
    for k in range(columns.shape[0]):
        own = columns[k]
        before = 0.0
        for i in range(own.size):
            before += own[i] * own[i]
        for _ in range(2):
            for j in range(k):
                other = columns[j]
                dot = 0.0
                for i in range(own.size):
                    dot += own[i] * other[i]
                for i in range(own.size):
                    own[i] -= dot * other[i]
        after = 0.0
        for i in range(own.size):
            after += own[i] * own[i]
        norm = np.sqrt(after)
        if norm <= _DEPENDENT * np.sqrt(before):
            own[:] = 0.0
        else:
            for i in range(own.size):
                own[i] /= norm


def _compile(function: Callable[..., Any], signature: str) -> Any:
    options = {"nogil": True, "fastmath": False, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no cache directory can be written
        return numba.njit(signature, **options)(function)


_product = _compile(_multiply, "void(float32[::1], float32[:, ::1], float32[:, ::1], int64)")
_columns = _compile(_orthonormalise, "void(float64[:, ::1])")


def multiply(out: Tensor, left: Tensor, right: Tensor, first: int) -> None:
    """As `product.multiply`; all contiguous float32 on the CPU. Entries do not depend on the number of threads."""
    target, factors = out.numpy(), (left.numpy(), right.numpy())
    share(len(target), lambda at: _product(target[at : at + CHUNK], *factors, first + at))


def orthonormal(draws: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Orthonormal columns [r, n], one a row, that span those given; 0 for one that depends on those before it.

    In float64, one term of a sum after the other, rounded to float32 in the end.
    """
    columns = draws.astype(np.float64)
    _columns(columns)
    return columns.astype(np.float32)
