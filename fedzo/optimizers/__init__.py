"""Replayable update rules: records -> theta. A new rule is one class in one file and one line in `OPTIMIZERS`."""

from fedzo.optimizers.adam import Adam, AdamW
from fedzo.optimizers.base import Records, Rule, Scalars, Seeds, Setup, State, theta_array
from fedzo.optimizers.conservative import Conservative
from fedzo.optimizers.dizo import DiZO
from fedzo.optimizers.hiso import HiSo
from fedzo.optimizers.hizoo import HiZOO
from fedzo.optimizers.hybrid import Hybrid
from fedzo.optimizers.momentum import Momentum
from fedzo.optimizers.quantised import QZO, QuZO
from fedzo.optimizers.schedule import SCHEDULES, Schedule
from fedzo.optimizers.sgd import SGD, PoolSGD
from fedzo.optimizers.sign import Sign
from fedzo.optimizers.svrg import SVRG

OPTIMIZERS: dict[str, type[Rule]] = {
    "sgd": SGD,
    "sign": Sign,
    "momentum": Momentum,
    "adam": Adam,
    "adamw": AdamW,
    "conservative": Conservative,
    "dizo": DiZO,
    "hizoo": HiZOO,
    "hiso": HiSo,
    "svrg": SVRG,
    "qzo": QZO,
    "quzo": QuZO,
}

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "SVRG",
    "HiSo",
    "HiZOO",
    "Hybrid",
    "PoolSGD",
    "Records",
    "Rule",
    "Scalars",
    "Schedule",
    "Seeds",
    "Setup",
    "State",
    "theta_array",
]
