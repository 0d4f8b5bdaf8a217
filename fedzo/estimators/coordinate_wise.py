"""Forward differences along single entries of theta."""

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedzo.estimators.base import Estimate, Query
from fedzo.estimators.one_point import OnePoint
from fedzo.evaluation import Request
from fedzo.limits import Condition, Limit


@dataclass(frozen=True)
class CoordinateWise(OnePoint):
    """g = sqrt(d) (loss(theta + eps e_i) - loss(theta)) / eps, for each example and entry i of d.

    That is `OnePoint` along z = sqrt(d) e_i, at the distance eps along e_i, so that 1/P sum g z is the sum over the
    entries that were tried of d / P times their partial derivatives.
    """

    source: ClassVar[str] = "DeepZero, arXiv 2310.02025, section 3 (CGE)"
    limits: ClassVar[tuple[Condition, ...]] = (
        Limit("method.structure", ("coordinate",), "its points are along single entries of theta"),
    )

    def estimate(self, query: Query) -> Generator[Request, Tensor, Estimate]:
        return (yield from super().estimate(replace(query, eps=query.eps / math.sqrt(len(query.theta)))))
