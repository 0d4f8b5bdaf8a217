"""HiZOO's estimator: projected gradients and curvatures from three losses."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedzo.estimators.base import Estimate, Estimator, Query
from fedzo.evaluation import LossRequest, Request
from fedzo.limits import Condition, Limit


@dataclass(frozen=True)
class ThreePoint(Estimator):
    """g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps) and, as a second scalar,
    h = (loss(theta + eps z) + loss(theta - eps z) - 2 loss(theta)) / (2 eps^2), for each example and direction.

    h is half the curvature along z, with its sign: the paper's |.| is left to the update rule. A mean of h over
    examples and clients is then the h of their mean loss, as in the paper. Magnitudes taken before the mean would add
    up the rounding errors of single losses, 2^-24 loss / eps^2 each, where signed ones cancel. The loss at theta serves
    all directions.
    """

    source: ClassVar[str] = "HiZOO, arXiv 2402.15173, algorithm 1"
    limits: ClassVar[tuple[Condition, ...]] = (
        Limit("method.optimizer", ("hizoo",), "no other update rule reads curvatures"),
    )
    scalars: ClassVar[int] = 2

    def forwards(self, queries: int) -> float:
        return 2 * queries + 1

    def estimate(self, query: Query) -> Generator[Request, Tensor, Estimate]:
        eps = query.eps
        answer = yield LossRequest(query.theta, query.batch, (eps, -eps), query.seeds, query.directions, origin=True)
        losses = answer.numpy().astype(np.float64)
        here, plus, minus = losses[0], losses[1::2], losses[2::2]
        with np.errstate(invalid="ignore"):  # infinite losses: the worker refuses what is not finite
            projected, curvature = (plus - minus) / (2.0 * eps), (plus + minus - 2.0 * here) / (2.0 * eps * eps)
        return Estimate(projected, float(losses.mean()), curvature)
