"""Low-rank directions: the product of a factor of the direction's own and one that is kept for a while."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedzo.directions import finite_coefficient
from fedzo.structures.factored import Factored, FactoredStructure, Place, gaussian


@dataclass(frozen=True)
class LowRankDirections(Factored):
    """A matrix has rows * r own draws, U row after row, and r * columns kept ones, V column after column."""

    @staticmethod
    def draws(rows: int, columns: int, rank: int) -> tuple[int, int]:
        return rows * rank, rank * columns

    def needed(self, place: Place, rows: range) -> range:
        return range(rows.start * place.rank, rows.stop * place.rank)

    def factors(self, place: Place) -> tuple[Tensor, ...]:
        """V^T / sqrt(r)."""
        drawn = gaussian((place.rank, place.columns), self.kept, place.kept)
        return (drawn.mul_(finite_coefficient(1.0 / math.sqrt(place.rank))),)

    def left(self, place: Place, rows: range, drawn: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Rows of U."""
        return drawn.view(len(rows), place.rank)


class LowRank(FactoredStructure):
    """Z = U V^T / sqrt(r) for each matrix [m, n], U [m, r] and V [n, r] Gaussian, V the same for ``refresh`` steps.

    r is ``rank``, or the matrix's shorter side. Vectors have isotropic Gaussian directions. Given V, E z z^T is
    V V^T / r for every row; over the draws of V it is the identity. g Z is the paper's estimate for an eps of
    eps / sqrt(r): it perturbs by U V^T and divides by r. (Its code does not divide: a learning rate from there is r
    times as large here.)

    Between two draws of V the rows of a matrix move in the span of V alone, as the gradients of large models lie near
    few directions. Beside theta there is V, r n numbers a matrix, of two periods at most.
    """

    source: ClassVar[str] = "LOZO, arXiv 2410.07698, algorithm 1"
    product: ClassVar[type[Factored]] = LowRankDirections
