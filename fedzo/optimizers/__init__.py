"""Replayable update rules: records -> theta. A new rule is one class in one file and one line in `OPTIMIZERS`."""

from fedzo.optimizers.base import Records, Rule, Scalars, Seeds, Setup, State, theta_array
from fedzo.optimizers.quantised import QZO, QuZO
from fedzo.optimizers.schedule import SCHEDULES, Schedule
from fedzo.optimizers.sgd import SGD, PoolSGD

OPTIMIZERS: dict[str, type[Rule]] = {"sgd": SGD, "qzo": QZO, "quzo": QuZO}

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
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
