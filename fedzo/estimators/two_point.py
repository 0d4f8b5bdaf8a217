"""The two-point (central difference) estimator, Spall's SPSA (MeZO, arXiv 2305.17333, definition 1)."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedzo.estimators.base import Estimate
from fedzo.evaluation import Batch, LossRequest


@dataclass(frozen=True)
class TwoPoint:
    """g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps), for each example and direction."""

    def forwards(self, queries: int) -> int:
        return 2 * queries

    def estimate(
        self, theta: Tensor, batch: Batch, seeds: Sequence[int], eps: float, family: str
    ) -> Generator[LossRequest, Tensor, Estimate]:
        losses = yield LossRequest(theta, batch, (eps, -eps), tuple(seeds), family)
        plus, minus = losses.numpy().astype(np.float64).transpose(1, 0, 2)
        with np.errstate(invalid="ignore"):  # infinite losses: the worker refuses what is not finite
            projected = (plus - minus) / (2.0 * eps)
        return Estimate(projected, float((plus + minus).mean()) / 2.0)
