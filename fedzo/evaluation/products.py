"""The products that layers are made of, chosen so that a row's result does not depend on the rows beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# oneDNN's product gives every row the same bits in a batch of any size and on any number of threads, which the matrix
# product that torch takes for float32 on a CPU does not; on some processors it is faster, too.
_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out]."""
    rows = x.numel() // x.shape[-1]
    if not _ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or not rows:
        return functional.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if rows == 1:  # a single row would go through another kernel
        flat = flat.repeat(2, 1)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return product[:rows].view(*x.shape[:-1], weight.shape[0])


@dataclass(frozen=True)
class SparsePattern:
    """Where the entries of a sparse [out, in] matrix are, by rows.

    Attributes:
        shape: (out, in).
        rows: [r] int64, the rows that have entries, ascending.
        starts: [r + 1] int64, where each of them begins among the entries.
        columns: [n] int64.
    """

    shape: tuple[int, int]
    rows: Tensor
    starts: Tensor
    columns: Tensor

    @staticmethod
    def of(indices: Tensor, shape: tuple[int, int], transposed: bool = False) -> tuple["SparsePattern", Tensor | None]:
        """The pattern of sorted flat indices [n] into a matrix, and the order of its entries when it is not theirs.

        Args:
            shape: of the matrix that the indices are flat in.
            transposed: the pattern is that of the matrix's transpose.
        """
        rows, columns = indices // shape[1], indices % shape[1]
        order = None
        if transposed:
            order = torch.argsort(columns, stable=True)
            rows, columns, shape = columns[order], rows[order], (shape[1], shape[0])
        distinct, counts = torch.unique_consecutive(rows, return_counts=True)
        starts = functional.pad(torch.cumsum(counts, 0), (1, 0))
        return SparsePattern(shape, distinct, starts, columns.contiguous()), order


def add_sparse(y: Tensor, x: Tensor, pattern: SparsePattern, values: Tensor) -> None:
    """y [t, out] += x [t, in] S^T in place, S the sparse matrix with these values [n] float32.

    On a CPU each row's sum is taken in the order of the entries, so it depends neither on threads nor on other rows.
    """
    if x.device.type == "cpu" and y.is_contiguous() and y.dtype == torch.float32:
        from fedzo.evaluation import sparse_cpu

        sparse_cpu.add(y, x.contiguous(), pattern, values)
        return
    columns = x.float().t().contiguous()  # [in, t]: a "table" whose rows the entries look up
    sums = functional.embedding_bag(
        pattern.columns, columns, pattern.starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )
    if len(pattern.rows) == pattern.shape[0]:
        y.add_(sums.t())
    else:
        y.index_add_(1, pattern.rows, sums.t().to(y.dtype))
