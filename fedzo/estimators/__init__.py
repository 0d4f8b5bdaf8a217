"""Estimators: queries -> scalars. A new estimator is one class in one file and one line in `ESTIMATORS`."""

from fedzo.estimators.base import Estimate, Estimator, Query
from fedzo.estimators.forward_gradient import ForwardGradient
from fedzo.estimators.two_point import TwoPoint

ESTIMATORS: dict[str, type[Estimator]] = {"two-point": TwoPoint, "forward-gradient": ForwardGradient}

__all__ = ["ESTIMATORS", "Estimate", "Estimator", "ForwardGradient", "Query", "TwoPoint"]
