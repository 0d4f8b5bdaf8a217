"""Directions in random subspaces: small Gaussian matrices between orthonormal bases that are kept for a while."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedzo.directions import finite_coefficient
from fedzo.structures.factored import Factored, FactoredStructure, Place, gaussian
from fedzo.structures.product import multiply, orthonormal

# A matrix with a shorter side than this is taken as the most nearly square one of as many entries.
_THIN = 32


@dataclass(frozen=True)
class SubspaceDirections(Factored):
    """A matrix has r * r own draws, Y row after row, and r * (rows + columns) kept ones, those of U and then of V, each
    column after column.
    """

    @staticmethod
    def shape(shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = Factored.shape(shape)
        size = rows * columns
        if not 1 < min(rows, columns) < _THIN:
            return rows, columns
        short = next(side for side in range(math.isqrt(size), 1, -1) if size % side == 0)
        return short, size // short

    @staticmethod
    def draws(rows: int, columns: int, rank: int) -> tuple[int, int]:
        return rank * rank, rank * (rows + columns)

    def needed(self, place: Place, rows: range) -> range:
        return range(place.rank**2)

    def factors(self, place: Place) -> tuple[Tensor, ...]:
        """s U [rows, r] and V^T [r, columns]."""
        of_rows = orthonormal(gaussian((place.rank, place.rows), self.kept, place.kept))
        of_columns = orthonormal(gaussian((place.rank, place.columns), self.kept, place.kept + place.rank * place.rows))
        scale = finite_coefficient(math.sqrt(place.rows * place.columns) / place.rank)
        return of_rows.t().mul(scale).contiguous(), of_columns

    def left(self, place: Place, rows: range, drawn: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Rows of s U Y."""
        product = torch.empty(len(rows) * place.rank, device=drawn.device)
        multiply(product, factors[0][rows.start : rows.stop], drawn.view(place.rank, place.rank))
        return product.view(len(rows), place.rank)


class Subspace(FactoredStructure):
    """Z = s U Y V^T for each matrix [m, n], Y [r, r] Gaussian, U [m, r] and V [n, r] with orthonormal columns, the same
    for ``refresh`` steps, s = sqrt(m n) / r.

    r is ``rank``, or the matrix's shorter side. U and V are Gram-Schmidt's of Gaussian draws. s, the paper's code's
    too, makes the mean square of Z's entries 1: given U and V, E z z^T is s^2 times the projection on their subspace;
    over their draws it is the identity. Vectors have isotropic Gaussian directions. A matrix with a side below 32 (an
    adapter's, a prompt's) is taken as the most nearly square one of as many entries, as the paper does for adapters.

    Until the bases are drawn anew a matrix moves in r^2 of its m n dimensions, and the estimate's variance is that much
    smaller. (An example of the authors' has r = 24 and 1000 steps.) Beside theta there are the bases, r (m + n) numbers
    a matrix, of two periods at most.
    """

    source: ClassVar[str] = "SubZero, arXiv 2410.08989"
    product: ClassVar[type[Factored]] = SubspaceDirections
