"""Noise on an integer grid, drawn by OpenDP from the operating system's entropy, and the clipping that it needs.

A unit's vector is clipped to a norm of at most the bound, and cut towards zero onto a grid of `levels` steps from 0 to
the bound: its integer norm is at most `levels`, exactly, whatever the arithmetic before it. Sums are of integers, and
noise is added to integers, so no bit of a released number depends on how floating-point addition rounds (Mironov 2012,
On significance of the least significant bits for differential privacy).
"""

import importlib.util
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedzo.errors import ConfigError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LEVELS = 2**20
# Of noise in grid steps: far more would not fit into 64 bits, where OpenDP saturates and sums wrap around.
MOST_SCALE = 2.0**52
# Standard deviations beyond which the grid's slack leaves the noise out: a chance of less than 1e-100.
_TAIL = 22.0


def require_opendp() -> None:
    """Raises ConfigError when OpenDP, the only source of privacy noise, is not installed."""
    if importlib.util.find_spec("opendp") is None:
        raise ConfigError(
            'privacy noise is drawn by opendp, which is not installed: pip install "fedzo[privacy]". No other '
            "generator is used in its place"
        )


@dataclass(frozen=True)
class Mechanism(ABC):
    """Additive noise for vectors whose norm is bounded.

    Attributes:
        order: p of the norm.
        noise_multiplier: standard deviation (scale) of the noise over the bound.
        levels: steps of the grid from 0 to the bound.
    """

    order: ClassVar[int]
    noise_multiplier: float
    levels: int = LEVELS

    @property
    @abstractmethod
    def slack(self) -> float:
        """What drawing a coordinate's noise on the grid may add to a release's epsilon beyond the accountant's."""

    @abstractmethod
    def _draw(self, count: int, scale: float) -> list[int]:
        """`count` independent draws at a scale in grid steps."""

    @property
    @abstractmethod
    def deviation(self) -> float:
        """Standard deviation of the noise over the bound."""

    def draw(self, count: int, multiplier: float | None = None) -> Ints:
        """Noise int64 [count] in grid steps.

        Args:
            multiplier: over the bound; None: `noise_multiplier`.

        Raises:
            ConfigError: OpenDP is not installed.
        """
        require_opendp()
        scale = (self.noise_multiplier if multiplier is None else multiplier) * self.levels
        if not 0.0 < scale < MOST_SCALE:
            raise ConfigError(f"noise of {scale:.3g} grid steps, wanted above 0 and below {MOST_SCALE:.3g}")
        return np.array(self._draw(count, scale), dtype=np.int64)

    def clip(self, values: Floats, bound: float) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Vectors float64 [d, n], clipped each to the bound -> grid steps int64 [d, n], and whether each was within.

        A vector with an entry that is not finite becomes zero, and counts as not within.
        """
        finite = np.isfinite(values).all(axis=0)
        kept = np.where(finite, values, 0.0)
        largest = np.abs(kept).max(axis=0, initial=0.0)
        # Relative to its largest entry, so that no square overflows or underflows, and no quotient is 0 times infinity,
        # whatever bound a server asks for.
        unit = kept / np.where(largest > 0.0, largest, 1.0)
        size = np.linalg.norm(unit, ord=self.order, axis=0) if len(kept) else np.zeros(kept.shape[1])
        with np.errstate(over="ignore"):
            ratio = largest / bound
            within = finite & (ratio * size <= 1.0)
        scaled = unit * (np.minimum(ratio, 1.0 / np.where(size > 0.0, size, 1.0)) * self.levels)
        steps = np.trunc(scaled).astype(np.int64)
        while (over := self._exceeds(steps)).any():  # by the rounding of the scaling
            scaled = np.where(over, scaled * (1.0 - 2.0**-40), scaled)
            steps = np.trunc(scaled).astype(np.int64)
        return steps, within

    def _exceeds(self, steps: Ints) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = (np.abs(steps) ** self.order).sum(axis=0) > self.levels**self.order
        return found

    def values(self, steps: Ints, bound: float) -> Floats:
        """Grid steps as float64 numbers."""
        return steps.astype(np.float64) * (bound / self.levels)


class Gaussian(Mechanism):
    """The discrete Gaussian (Canonne, Kamath, Steinke, arXiv 2004.00010).

    Shifted by whole numbers its privacy loss is that of the continuous one at the same point, and each point's chance
    is that of the continuous one's rounding within a factor exp(+-(t^2 + 1) / (24 s^2)), s its standard deviation in
    grid steps, up to t standard deviations from 0: so its release is that of a rounded Gaussian but for `slack`.
    """

    order: ClassVar[int] = 2

    @property
    def slack(self) -> float:
        return 2.0 * (_TAIL**2 + 1.0) / (24.0 * (self.noise_multiplier * self.levels) ** 2)

    @property
    def deviation(self) -> float:
        return self.noise_multiplier

    def _draw(self, count: int, scale: float) -> list[int]:
        import opendp.prelude as dp

        dp.enable_features("contrib")
        space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="i64")
        drawn: list[int] = dp.m.make_gaussian(*space, scale=scale)([0] * count)
        return drawn


class Laplace(Mechanism):
    """The discrete Laplace (Ghosh, Roughgarden, Sundararajan, arXiv 0811.2841): 1 / `noise_multiplier` is epsilon."""

    order: ClassVar[int] = 1

    @property
    def slack(self) -> float:
        return 0.0

    @property
    def deviation(self) -> float:
        return math.sqrt(2.0) * self.noise_multiplier

    def _draw(self, count: int, scale: float) -> list[int]:
        import opendp.prelude as dp

        dp.enable_features("contrib")
        space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
        drawn: list[int] = dp.m.make_laplace(*space, scale=scale)([0] * count)
        return drawn


MECHANISMS: dict[str, type[Mechanism]] = {"gaussian": Gaussian, "laplace": Laplace}
