"""Isotropic directions: all entries of theta, independent, the same family at every step."""

from typing import ClassVar

from fedzo.directions.base import Directions, Isotropic
from fedzo.structures.base import Structure


class IsotropicStructure(Structure):
    """z with independent entries of mean 0 and variance 1: Rademacher signs or Gaussian values."""

    source: ClassVar[str] = "MeZO, arXiv 2305.17333, definition 1"
    steady: ClassVar[bool] = True

    def at(self, step: int) -> Directions:
        return Isotropic(self.frame.family)
