"""Entries of a product of two thin matrices: the same bits on every device, whichever of them are asked for.

left [rows, r], right [r, columns]: entry (i, j) is the sum over k = 0, 1, ... of fl32(left[i, k] right[k, j]), rounded
to float32 after each addition. All tensors are float32 and contiguous.
"""

import torch
from torch import Tensor

# Entries that plain torch works on together, a bound on its scratch.
_CHUNK = 2**22


def multiply(out: Tensor, left: Tensor, right: Tensor, first: int = 0) -> Tensor:
    """Write entries first ... of the product, row after row, into ``out`` [n] and return it."""
    if out.device.type == "cpu":
        from fedzo.structures import product_cpu

        product_cpu.multiply(out, left, right, first)
        return out
    return multiply_plainly(out, left, right, first)


def multiply_plainly(out: Tensor, left: Tensor, right: Tensor, first: int = 0) -> Tensor:
    """`multiply` by torch's own operations, for any device."""
    columns = right.shape[1]
    for at in range(0, len(out), _CHUNK):
        places = torch.arange(first + at, first + min(at + _CHUNK, len(out)), device=out.device)
        out[at : at + _CHUNK] = entries(left, right, places // columns, places % columns)
    return out


def entries(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Entries (rows[t], columns[t]) [n] of the product."""
    found = left[rows, 0] * right[0, columns]
    for k in range(1, left.shape[1]):
        found.add_(left[rows, k] * right[k, columns])
    return found


def orthonormal(draws: Tensor) -> Tensor:
    """Orthonormal columns [r, n], one a row, that span those given; 0 for one that depends on those before it.

    Gram-Schmidt in float64, one term of a sum after the other, rounded to float32 in the end; on the CPU.
    """
    from fedzo.structures import product_cpu

    return torch.from_numpy(product_cpu.orthonormal(draws.numpy()))
