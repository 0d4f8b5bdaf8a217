"""The forward gradient: exact directional derivatives by forward-mode differentiation."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedzo.estimators.base import Estimate, Estimator, Query
from fedzo.evaluation import DerivativeRequest, Request
from fedzo.limits import Condition, Limit


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """g = grad loss(theta) . z, for each example and direction: the limit of the two-point estimator for eps -> 0.

    Each direction takes one pass with dual numbers theta + z d, d^2 = 0. It counts as two forwards, as a two-point
    query does: one for the losses, one for their tangents (the latter takes two products in a trained layer, one in a
    frozen one). ``eps`` has no part in it. All spaces but that of quantised codes, which are whole numbers.
    """

    source: ClassVar[str] = "Baydin et al., Gradients without Backpropagation, arXiv 2202.08587, eq. 1"
    limits: ClassVar[tuple[Condition, ...]] = (
        Limit("space.kind", ("full", "sparse", "adapter", "scales"), "codes are whole numbers and have no derivative"),
    )

    def forwards(self, queries: int) -> float:
        return 2 * queries

    def estimate(self, query: Query) -> Generator[Request, Tensor, Estimate]:
        answer = yield DerivativeRequest(query.theta, query.batch, query.seeds, query.directions)
        found = answer.numpy().astype(np.float64)
        return Estimate(found[1:], float(found[0].mean()))
