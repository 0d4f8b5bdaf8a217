"""Learning-rate schedules: pure functions of the step, the same float64 on every machine."""

from collections.abc import Callable
from dataclasses import dataclass

from fedzo.errors import ConfigError
from fedzo.registry import lookup

_PI = 3.141592653589793


def _cosine(x: float) -> float:
    """cos(pi x) for x in [0, 1] by IEEE additions and multiplications only: libm's cosine differs between systems.

    The Taylor series on [0, pi/4], doubled twice by cos(2a) = 2 cos(a)^2 - 1; absolute error below 1e-15.
    """
    square = (_PI * x / 4.0) * (_PI * x / 4.0)
    term, total = 1.0, 1.0
    for k in range(1, 12):
        term = -term * square / ((2.0 * k - 1.0) * (2.0 * k))
        total += term
    for _ in range(2):
        total = 2.0 * total * total - 1.0
    return total


_DECAY: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + _cosine(x)),
}
SCHEDULES: tuple[str, ...] = tuple(_DECAY)


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a step: linear warm-up from 0, then constant, linear or cosine decay to 0.

    Attributes:
        kind: "constant", "linear" or "cosine".
        learning_rate: the peak.
        total_steps: steps of the whole run (rounds x local steps).
        warmup_steps: steps of the linear rise; 0 for none.
    """

    kind: str
    learning_rate: float
    total_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        lookup(_DECAY, self.kind, "learning-rate schedule")
        if not 0 <= self.warmup_steps < max(self.total_steps, 1):
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; wanted 0 <= warmup_steps < {self.total_steps}")

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., total_steps - 1."""
        if step < self.warmup_steps:
            return self.learning_rate * ((step + 1) / (self.warmup_steps + 1))
        return self.learning_rate * _DECAY[self.kind](
            (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        )
