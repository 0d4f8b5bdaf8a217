"""The sparse product on the CPU: one compiled loop over tokens and entries, on torch's thread count."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from torch import Tensor

from fedzo.evaluation.products import SparsePattern

# Multiply-adds below which a second thread costs more than it saves.
_ENOUGH = 200_000
_SIGNATURE = "void(float32[:, ::1], float32[:, ::1], int64[::1], int64[::1], int64[::1], float32[::1])"


def _add(y: Any, x: Any, rows: Any, starts: Any, columns: Any, values: Any) -> None:
    together = x.shape[0] // 4 * 4  # four tokens share the loads of an entry, and their sums do not wait for each other
    for t in range(0, together, 4):
        for r in range(rows.size):
            a = b = c = d = numba.float32(0.0)
            for entry in range(starts[r], starts[r + 1]):
                column, value = columns[entry], values[entry]
                a += x[t, column] * value
                b += x[t + 1, column] * value
                c += x[t + 2, column] * value
                d += x[t + 3, column] * value
            row = rows[r]
            y[t, row] += a
            y[t + 1, row] += b
            y[t + 2, row] += c
            y[t + 3, row] += d
    for t in range(together, x.shape[0]):
        for r in range(rows.size):
            a = numba.float32(0.0)
            for entry in range(starts[r], starts[r + 1]):
                a += x[t, columns[entry]] * values[entry]
            y[t, rows[r]] += a


def _compile() -> Any:
    options = {"nogil": True, "fastmath": False, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.njit(_SIGNATURE, cache=True, **options)(_add)
    except RuntimeError:  # no cache directory can be written
        return numba.njit(_SIGNATURE, **options)(_add)


_kernel = _compile()


def add(y: Tensor, x: Tensor, pattern: SparsePattern, values: Tensor) -> None:
    """As `products.add_sparse`; all contiguous float32 on the CPU."""
    out, inputs = y.numpy(), x.numpy()
    where = pattern.rows.numpy(), pattern.starts.numpy(), pattern.columns.numpy(), values.contiguous().numpy()
    threads = min(torch.get_num_threads(), len(out), len(out) * len(where[2]) // _ENOUGH + 1)
    if threads <= 1:
        _kernel(out, inputs, *where)
        return
    cut = [len(out) * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: _kernel(out[cut[i] : cut[i + 1]], inputs[cut[i] : cut[i + 1]], *where), range(threads)))
