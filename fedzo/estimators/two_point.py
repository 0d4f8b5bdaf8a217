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
        projected = np.empty((len(seeds), len(batch)), dtype=np.float64)
        total = 0.0
        for p, seed in enumerate(seeds):
            losses = yield LossRequest(theta, batch, (eps, -eps), seed, family)
            plus, minus = losses.numpy().astype(np.float64)
            with np.errstate(invalid="ignore"):  # infinite losses: the worker refuses what is not finite
                projected[p] = (plus - minus) / (2.0 * eps)
            total += float((plus + minus).mean()) / 2.0
        return Estimate(projected, total / len(seeds))
