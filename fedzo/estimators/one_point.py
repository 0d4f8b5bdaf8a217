"""The one-point estimator with a shared loss at theta: forward differences."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedzo.estimators.base import Estimate, Estimator, Query
from fedzo.evaluation import LossRequest, Request


@dataclass(frozen=True)
class OnePoint(Estimator):
    """g = (loss(theta + eps z) - loss(theta)) / eps, for each example and direction.

    The loss at theta serves all P directions, so that a query takes little more than one forward. Its error is of order
    eps, where that of the two-point estimator is of order eps^2.
    """

    source: ClassVar[str] = "Nesterov and Spokoiny 2017, Random gradient-free minimization, section 3"

    def forwards(self, queries: int) -> float:
        return queries + 1

    def estimate(self, query: Query) -> Generator[Request, Tensor, Estimate]:
        answer = yield LossRequest(query.theta, query.batch, (query.eps,), query.seeds, query.directions, origin=True)
        losses = answer.numpy().astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinite losses: the worker refuses what is not finite
            projected = (losses[1:] - losses[0]) / self.scale(losses[1:], query.eps)
        return Estimate(projected, float(losses.mean()))

    def scale(self, losses: npt.NDArray[np.float64], eps: float) -> float:
        """What the differences of the losses [P, B] at theta + eps z to those at theta are divided by."""
        return eps
