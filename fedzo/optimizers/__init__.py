"""Replayable update rules: records -> theta. A new rule is one class in one file and one line in `OPTIMIZERS`."""

from collections.abc import Callable

from fedzo.optimizers.base import Records, Scalars, Seeds, UpdateRule
from fedzo.optimizers.schedule import SCHEDULES, Schedule
from fedzo.optimizers.sgd import SGD, PoolSGD, theta_array

# From schedule, queries, direction family and rounding seed.
OPTIMIZERS: dict[str, Callable[[Schedule, int, str, int], SGD]] = {"sgd": SGD}

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "PoolSGD",
    "Records",
    "Scalars",
    "Schedule",
    "Seeds",
    "UpdateRule",
    "theta_array",
]
