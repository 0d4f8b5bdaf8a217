"""What an estimator is: queries in, projected gradients out."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedzo.evaluation import Batch, LossRequest


@dataclass(frozen=True)
class Estimate:
    """What the queries of one step yielded.

    Attributes:
        projected: float64 [P, B], the projected gradient of each example along each direction. Per example, so that
            a privacy mechanism can clip each before they are averaged.
        loss: mean loss over the batch and the points evaluated.
    """

    projected: npt.NDArray[np.float64]
    loss: float


class Estimator(Protocol):
    """Asks for losses and turns them into projected gradients; never calls a model."""

    def forwards(self, queries: int) -> int:
        """Forward passes over a batch for this many queries."""
        ...

    def estimate(
        self, theta: Tensor, batch: Batch, seeds: Sequence[int], eps: float, family: str
    ) -> Generator[LossRequest, Tensor, Estimate]:
        """Yields loss requests, is sent losses float32 [len(seeds), len(offsets), B]; P = len(seeds)."""
        ...
