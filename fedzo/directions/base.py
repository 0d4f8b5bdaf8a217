"""What directions are to those who use them: seed -> z, added to theta entry by entry."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions import axpy, fill, finite_coefficient, replay

# Entries that are filled at a time where a whole direction is not needed at once.
_CHUNK = 2**22


class Directions(Protocol):
    """The directions of one step, z [size] by seed. Pure: the same seed gives the same bits, on every device."""

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        """Write z[offset : offset + n] into ``out`` [n] float32 and return it."""
        ...

    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        """Write fl32(theta + fl32(c z[offset : offset + n])) into ``out`` (None: theta) [n] float32 and return it."""
        ...

    def replay(self, theta: Tensor, seeds: npt.NDArray[np.uint64], coefficients: npt.NDArray[np.float32]) -> Tensor:
        """Add records [R] to the whole of theta in place, in their order; return theta."""
        ...


@dataclass(frozen=True)
class Isotropic:
    """Independent entries of mean 0 and variance 1, see :mod:`fedzo.directions`."""

    family: str = "rademacher"

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        return fill(out, seed, self.family, offset=offset)

    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        return axpy(theta, seed, coefficient, self.family, offset=offset, out=out)

    def replay(self, theta: Tensor, seeds: npt.NDArray[np.uint64], coefficients: npt.NDArray[np.float32]) -> Tensor:
        return replay(theta, seeds, coefficients, self.family)


class Filled(ABC):
    """Directions that are known by their entries: a step is c times them, rounded, then added, rounded."""

    @abstractmethod
    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        """As `Directions.fill`. Entries must not depend on where a range begins or ends."""

    @torch.no_grad()
    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        out, c = theta if out is None else out, finite_coefficient(coefficient)
        for start in range(0, len(theta), _CHUNK):
            part = theta[start : start + _CHUNK]
            z = self.fill(torch.empty_like(part), seed, offset=offset + start)
            torch.add(part, z.mul_(c), out=out[start : start + _CHUNK])
        return out

    def replay(self, theta: Tensor, seeds: npt.NDArray[np.uint64], coefficients: npt.NDArray[np.float32]) -> Tensor:
        for seed, coefficient in zip(seeds.tolist(), coefficients.tolist(), strict=True):
            self.axpy(theta, seed, coefficient)
        return theta


@dataclass(frozen=True)
class Scaled(Filled):
    """The entries of other directions times a vector [size] float32."""

    inner: Directions
    scale: Tensor

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        return self.inner.fill(out, seed, offset=offset).mul_(self.scale[offset : offset + len(out)])
