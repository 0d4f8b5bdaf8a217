"""Estimators: queries -> scalars. A new estimator is one class in one file and one line in `ESTIMATORS`."""

from collections.abc import Callable

from fedzo.estimators.base import Estimate, Estimator
from fedzo.estimators.two_point import TwoPoint

ESTIMATORS: dict[str, Callable[[], Estimator]] = {"two-point": TwoPoint}

__all__ = ["ESTIMATORS", "Estimate", "Estimator", "TwoPoint"]
