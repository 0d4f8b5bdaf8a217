"""Coordinate directions: each query moves one entry of theta alone."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions import finite_coefficient, philox
from fedzo.directions.base import Directions
from fedzo.errors import ConfigError
from fedzo.limits import ISOTROPIC_BFLOAT16, SHARED_OUT, Condition, Limit
from fedzo.spaces.selection import choose
from fedzo.structures.base import Frame, Seeds, Structure

# As many entries as a step can have queries.
_LARGEST = 65_535


@dataclass(frozen=True)
class Coordinates:
    """sqrt(d) in one entry of d, the seed modulo d; 0 in the others, which stay as they are."""

    size: int

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        place = seed % self.size - offset
        out.zero_()
        if 0 <= place < len(out):
            out[place] = self._length
        return out

    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        place = seed % self.size - offset
        out = theta if out is None else out.copy_(theta)
        if 0 <= place < len(out):
            out[place] += finite_coefficient(finite_coefficient(coefficient) * self._length)
        return out

    def replay(self, theta: Tensor, seeds: npt.NDArray[np.uint64], coefficients: npt.NDArray[np.float32]) -> Tensor:
        """As `Directions.replay`: the entries that are moved go to the CPU and back, records to one in their order."""
        places, which = np.unique((seeds % np.uint64(self.size)).astype(np.int64), return_inverse=True)
        moved = torch.from_numpy(places).to(theta.device)
        values = theta[moved].cpu().numpy()
        np.add.at(values, which, coefficients * np.float32(self._length))
        theta[moved] = torch.from_numpy(values).to(theta.device)
        return theta

    @property
    def _length(self) -> float:
        return finite_coefficient(math.sqrt(self.size))


class Coordinate(Structure):
    """z = sqrt(d) e_i for the i-th of theta's d entries, i the seed modulo d.

    The P queries of a step take P different entries, drawn from their seeds; with P = d all of them, and the step is
    gradient descent by the gradient, entry by entry. ``directions`` has no part in it. For small spaces (a prompt, a
    head, a small mask) where the gradient is worth P + 1 forwards. Beside theta it holds nothing.

    Raises:
        ConfigError: theta is too large, or has fewer entries than a step has queries.
    """

    source: ClassVar[str] = "DeepZero, arXiv 2310.02025, section 3 (CGE)"
    limits: ClassVar[tuple[Condition, ...]] = (
        Limit(
            "method.estimator", ("coordinate-wise",), "others would move an entry by eps times the root of theta's size"
        ),
        SHARED_OUT,
        ISOTROPIC_BFLOAT16,
    )
    settings: ClassVar[tuple[str, ...]] = ("queries",)
    steady: ClassVar[bool] = True

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        self.size = frame.layout.size
        queries = int(frame.values["queries"])
        if self.size > _LARGEST:
            raise ConfigError(
                f'method.structure = "coordinate" moves one entry of theta a query, and is for at most {_LARGEST:,} '
                f"entries, found {self.size:,}: train less (space.kind, space.include, space.density)"
            )
        if queries > self.size:
            raise ConfigError(
                f"method.queries is {queries}, but theta has {self.size} entries, one for each query of a step: set "
                f"method.queries to {self.size} or less"
            )

    def at(self, step: int) -> Directions:
        return Coordinates(self.size)

    def assign(self, seeds: Seeds) -> Seeds:
        """The numbers of the entries."""
        return choose(self.size, len(seeds), philox.substream(seeds[0], 1)).astype(np.uint64)
