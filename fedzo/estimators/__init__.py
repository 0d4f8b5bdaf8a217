"""Estimators: queries -> scalars. A new estimator is one class in one file and one line in `ESTIMATORS`."""

from fedzo.estimators.base import Estimate, Estimator, Query
from fedzo.estimators.coordinate_wise import CoordinateWise
from fedzo.estimators.forward_gradient import ForwardGradient
from fedzo.estimators.fzoo import FZOO
from fedzo.estimators.hizoo import ThreePoint
from fedzo.estimators.one_point import OnePoint
from fedzo.estimators.p_rge import PRGE
from fedzo.estimators.svrg import ControlVariate
from fedzo.estimators.two_point import TwoPoint

ESTIMATORS: dict[str, type[Estimator]] = {
    "two-point": TwoPoint,
    "one-point": OnePoint,
    "p-rge": PRGE,
    "fzoo": FZOO,
    "forward-gradient": ForwardGradient,
    "hizoo": ThreePoint,
    "svrg": ControlVariate,
    "coordinate-wise": CoordinateWise,
}

__all__ = [
    "ESTIMATORS",
    "FZOO",
    "PRGE",
    "ControlVariate",
    "CoordinateWise",
    "Estimate",
    "Estimator",
    "ForwardGradient",
    "OnePoint",
    "Query",
    "ThreePoint",
    "TwoPoint",
]
