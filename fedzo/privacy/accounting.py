"""Accounting: how many releases with how much noise make which (epsilon, delta).

The authority is dp-accounting: its privacy loss distributions, and for draws of a fixed number its Renyi accountant; of
Laplace noise the exact composition of its pure epsilon.
Opacus' accountants are cross-checks behind the same interface. Its Gaussian accountant (GDP) is not among them: a limit
theorem, whose value is below the true one.
"""

import importlib.util
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from fedzo.errors import ConfigError

Mechanism = Literal["gaussian", "laplace"]
Sampling = Literal["none", "poisson", "fixed"]

# How finely the privacy loss of one of n releases is discretised: this share of the rough epsilon over the square root
# of n, but no coarser than so. The error that adds up is then of order 1e-4 of epsilon.
_FINENESS, _COARSEST = 3e-3, 5e-3
# Beyond this epsilon nothing is promised, and the rough bound is exact enough.
_ABSURD = 200.0
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 768, 1024)
# Relative, of a calibrated noise multiplier, and its digits.
_WIDTH, _DIGITS = 1e-4, 6


@dataclass(frozen=True)
class Release:
    """One noised release, as an accountant sees it.

    Attributes:
        mechanism: law of the noise.
        noise_multiplier: standard deviation (Gaussian) or scale (Laplace) of the noise over the bound on the L2 (L1)
            norm of one unit's part.
        sampling: how the units that take part are drawn.
        rate: probability that a unit takes part (poisson), or share of the units that do (fixed).
        units: of which a fixed number, `rate` times as many, is drawn; 0 unless sampling is "fixed".
        slack: added to epsilon for each release: the noise is drawn on a grid (`Gaussian.slack`).
    """

    mechanism: Mechanism
    noise_multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0
    units: int = 0
    slack: float = 0.0

    @property
    def relation(self) -> str:
        """Which data sets are neighbours: a unit gives its part or nothing, or another unit's part."""
        return "replace-one" if self.sampling == "fixed" else "zero-out"

    @property
    def chance(self) -> float:
        """The probability of taking part that amplification may count on: 1 where it may not."""
        return self.rate if self.sampling == "poisson" else 1.0

    @property
    def pure(self) -> float:
        """epsilon of one release of Laplace noise with delta = 0, without slack.

        Under Poisson sampling log(1 + q (e^epsilon - 1)) (Balle, Barthe, Gaboardi, arXiv 1807.01647, theorem 8).
        Replacing one unit by another moves a sum twice as far; of fixed draws no amplification is claimed.
        """
        one = (2.0 if self.sampling == "fixed" else 1.0) / self.noise_multiplier
        return math.log1p(self.chance * math.expm1(one)) if one < 700.0 else one + math.log(self.chance)


class Accountant(ABC):
    """Composes equal releases.

    Attributes:
        name: in `ACCOUNTANTS`.
        source: what it computes, and by whose code.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def limit(self, release: Release, delta: float) -> str | None:
        """Why it does not cover such releases; None: it does."""

    @abstractmethod
    def epsilon(self, release: Release, count: int, delta: float) -> float:
        """epsilon of at least one release at a delta; inf where there is none. Slack is not in it."""


class PrivacyLoss(Accountant):
    """Privacy loss distributions, discretised so that epsilon is not below the truth.

    Gaussian noise on a vector counts as on one coordinate with the whole shift, which it is by rotation.
    """

    name = "pld"
    source = "privacy loss distributions, dp-accounting (Doroshenko et al., Connect the Dots, arXiv 2207.04380)"

    def limit(self, release: Release, delta: float) -> str | None:
        if release.mechanism != "gaussian" or release.sampling == "fixed":
            return "it is of Gaussian noise, with Poisson sampling or none"
        return "delta = 0 has no privacy loss distribution" if delta == 0.0 else None

    def epsilon(self, release: Release, count: int, delta: float) -> float:
        rough = _rough(release, count, delta)
        if not rough < _ABSURD:
            return rough
        _require("dp_accounting", "dp-accounting")
        from dp_accounting.pld import privacy_loss_distribution as losses

        one = losses.from_gaussian_mechanism(
            release.noise_multiplier, sampling_prob=release.chance, use_connect_dots=True,
            value_discretization_interval=min(rough * _FINENESS / math.sqrt(count), _COARSEST),
        )  # fmt: skip
        return min(float(one.self_compose(count).get_epsilon_for_delta(delta)), rough)


class Pure(Accountant):
    """Pure epsilons: they add up, and at a delta above 0 compose as randomised response does, the worst of them.

    It does not matter how the shift is spread over the vector: only the pure epsilon of a release counts.
    """

    name = "pure"
    source = "exact composition of pure epsilon (Kairouz, Oh, Viswanath, arXiv 1311.0776, theorem 3.3)"

    def limit(self, release: Release, delta: float) -> str | None:
        return None if release.mechanism == "laplace" else "Gaussian noise has no pure epsilon"

    def epsilon(self, release: Release, count: int, delta: float) -> float:
        pure, whole = release.pure, count * release.pure
        if delta == 0.0 or not pure < _ABSURD:
            return whole
        _require("scipy", "scipy")
        from scipy.special import gammaln

        # Of `count` answers each a lie with probability 1 / (1 + e^pure), by the number of lies.
        lies = np.arange(count + 1, dtype=np.float64)
        ways = gammaln(count + 1) - gammaln(lies + 1) - gammaln(count - lies + 1)
        chance = np.exp(ways + (count - lies) * pure - count * np.logaddexp(0.0, pure))
        loss = (count - 2.0 * lies) * pure
        low, high = 0.0, whole
        while high - low > 1e-9 * whole:
            middle = (low + high) / 2.0
            above = loss > middle
            if float((chance[above] * -np.expm1(middle - loss[above])).sum()) > delta:
                low = middle
            else:
                high = middle
        return high


class Renyi(Accountant):
    """Renyi differential privacy: by Opacus, and of draws of a fixed number by dp-accounting.

    The latter (Wang, Balle, Kasiviswanathan, arXiv 1808.00087, theorem 27) is for one unit that is replaced by another,
    which moves a sum by up to twice the bound: the noise counts half there.
    """

    name = "rdp"
    source = "Renyi differential privacy, Opacus; of draws of a fixed number dp-accounting (arXiv 1808.00087)"

    def limit(self, release: Release, delta: float) -> str | None:
        if release.mechanism != "gaussian":
            return "it is of Gaussian noise"
        return "delta = 0 has no bound by Renyi divergence" if delta == 0.0 else None

    def epsilon(self, release: Release, count: int, delta: float) -> float:
        if release.sampling == "fixed":
            return _rough(release, count, delta)
        _require("opacus", "opacus")
        from opacus.accountants.analysis import rdp

        spent = rdp.compute_rdp(
            q=release.chance, noise_multiplier=release.noise_multiplier, steps=count, orders=list(_ORDERS)
        )
        return float(rdp.get_privacy_spent(orders=list(_ORDERS), rdp=spent, delta=delta)[0])


class PRV(Accountant):
    """Privacy random variables (Gopi, Lee, Wutschitz, arXiv 2106.02848), an upper bound within its error of 0.01."""

    name = "prv"
    source = "privacy random variables, Opacus (arXiv 2106.02848)"

    def limit(self, release: Release, delta: float) -> str | None:
        if release.mechanism != "gaussian" or release.sampling == "fixed":
            return "it is of Gaussian noise, with Poisson sampling or none"
        return "delta = 0 has no bound by privacy random variables" if delta == 0.0 else None

    def epsilon(self, release: Release, count: int, delta: float) -> float:
        _require("opacus", "opacus")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(release.noise_multiplier, release.chance, count)]
        with np.errstate(divide="ignore"):  # at rate 1
            return float(accountant.get_epsilon(delta, eps_error=0.01, delta_error=delta / 1000.0))


ACCOUNTANTS: dict[str, Accountant] = {one.name: one for one in (PrivacyLoss(), PRV(), Renyi(), Pure())}


def authority(release: Release, delta: float) -> Accountant:
    """The accountant whose word counts."""
    if release.mechanism == "laplace":
        return ACCOUNTANTS["pure"]
    return ACCOUNTANTS["rdp" if release.sampling == "fixed" else "pld"]


@lru_cache(maxsize=4096)
def epsilon(release: Release, count: int, delta: float, accountant: str = "") -> float:
    """epsilon after so many releases.

    Args:
        delta: at which; 0 for Laplace noise alone.
        accountant: in `ACCOUNTANTS`; "": the authority.

    Raises:
        ConfigError: a value is impossible, the accountant does not cover it, or its library is not installed.
    """
    _check(release, delta)
    if count == 0:
        return 0.0
    chosen = ACCOUNTANTS[accountant] if accountant else authority(release, delta)
    if reason := chosen.limit(release, delta):
        raise ConfigError(f"the accountant {chosen.name} cannot tell epsilon: {reason}")
    found = chosen.epsilon(release, count, delta) + count * release.slack
    return math.inf if math.isnan(found) else max(found, 0.0)


def calibrate(release: Release, count: int, target: float, delta: float) -> float:
    """The least noise multiplier, with which `count` releases stay within epsilon and delta.

    Args:
        release: whose own multiplier does not matter.
        target: epsilon.

    Raises:
        ConfigError: as `epsilon`; or no noise is enough for the slack of its grid.
    """
    if not target > 0.0:
        raise ConfigError(f"epsilon is {target:g}, wanted a number above 0")
    if count * release.slack >= target:
        raise ConfigError(
            f"{count:,} releases take epsilon {count * release.slack:.3g} by the grid alone, wanted {target:g}"
        )

    def at(multiplier: float, rough: bool = False) -> float:
        made = replace(release, noise_multiplier=multiplier)
        if rough:
            return _rough(made, count, delta) + count * release.slack
        return epsilon(made, count, delta)

    _check(replace(release, noise_multiplier=1.0), delta)
    low = high = 1.0
    while at(high, rough=True) > target:
        low, high = high, 2.0 * high
    while at(low, rough=True) <= target and low > 1e-6:
        low, high = low / 2.0, low
    high = _bisect(lambda z: at(z, rough=True) <= target, low, high, 1e-3)
    low = high
    while at(low) <= target and low > 1e-6:
        low, high = 0.9 * low, low
    found = _rounded_up(_bisect(lambda z: at(z) <= target, low, high, _WIDTH))
    while at(found) > target:  # by the discretisation, which differs from noise to noise
        found = _rounded_up(found * (1.0 + _WIDTH))
    return found


def affordable(release: Release, target: float, delta: float, most: int) -> int:
    """The largest number of releases, up to `most`, that stays within epsilon and delta."""
    if epsilon(release, most, delta) <= target:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon(release, middle, delta) <= target:
            low = middle
        else:
            high = middle
    return low


def cross_check(release: Release, count: int, delta: float) -> dict[str, float]:
    """epsilon by every accountant that covers such releases."""
    covering = [name for name, one in ACCOUNTANTS.items() if one.limit(release, delta) is None]
    return {name: epsilon(release, count, delta, name) for name in covering}


def _rough(release: Release, count: int, delta: float) -> float:
    """An upper bound on epsilon without slack, quickly: Renyi with whole orders, or pure composition."""
    if release.mechanism == "laplace":
        return count * release.pure
    _require("dp_accounting", "dp-accounting")
    import dp_accounting as dp

    fixed = release.sampling == "fixed"
    relation = dp.NeighboringRelation.REPLACE_ONE if fixed else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    event: Any = dp.GaussianDpEvent(release.noise_multiplier / (2.0 if fixed else 1.0))
    if fixed and release.rate < 1.0:
        drawn = max(1, round(release.rate * release.units))
        event = dp.SampledWithoutReplacementDpEvent(release.units, drawn, event)
    elif release.chance < 1.0:
        event = dp.PoissonSampledDpEvent(release.chance, event)
    accountant = dp.rdp.RdpAccountant(_ORDERS, relation)
    found = float(accountant.compose(event, count).get_epsilon(delta))
    return math.inf if math.isnan(found) else found


def _bisect(fits: Any, low: float, high: float, width: float) -> float:
    """The smallest value that fits, from above, within a relative width; `high` fits and `low` does not."""
    while high / low > 1.0 + width:
        middle = math.sqrt(low * high)
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def _rounded_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - _DIGITS + 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{_DIGITS}g}")


def _check(release: Release, delta: float) -> None:
    least = 0.0 if release.mechanism == "laplace" else None
    if not 0.0 < delta < 1.0 and delta != least:
        raise ConfigError(f"delta is {delta:g}, wanted above 0 and below 1 (0 for Laplace noise alone)")
    if not 0.0 < release.rate <= 1.0:
        raise ConfigError(f"a sampling rate is {release.rate:g}, wanted above 0 and at most 1")
    if not 0.0 < release.noise_multiplier < math.inf:
        raise ConfigError(f"a noise multiplier is {release.noise_multiplier:g}, wanted a number above 0")


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f'accounting needs {package}, which is not installed: pip install "fedzo[privacy]"')
