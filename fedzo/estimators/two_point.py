"""The two-point (central difference) estimator, Spall's SPSA."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedzo.estimators.base import Estimate, Estimator, Query
from fedzo.evaluation import LossRequest, Request


@dataclass(frozen=True)
class TwoPoint(Estimator):
    """g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps), for each example and direction."""

    source: ClassVar[str] = "MeZO, arXiv 2305.17333, definition 1; Spall 1992"
    together: ClassVar[bool] = False

    def forwards(self, queries: int) -> float:
        return 2 * queries

    def estimate(self, query: Query) -> Generator[Request, Tensor, Estimate]:
        eps = query.eps
        losses = yield LossRequest(query.theta, query.batch, (eps, -eps), query.seeds, query.directions, self.together)
        plus, minus = losses.numpy().astype(np.float64).transpose(1, 0, 2)
        with np.errstate(invalid="ignore"):  # infinite losses: the worker refuses what is not finite
            projected = (plus - minus) / (2.0 * eps)
        return Estimate(projected, float((plus + minus).mean()) / 2.0)
