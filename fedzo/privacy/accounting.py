"""Accounting: how many releases with how much noise make which (epsilon, delta).

The authority is dp-accounting: its privacy loss distributions, and for draws of a fixed number its Renyi accountant; of
Laplace noise the exact composition of its pure epsilon.
Opacus' accountants are cross-checks behind the same interface. Its Gaussian accountant (GDP) is not among them: a limit
theorem, whose value is below the true one.
"""

import importlib.util
import logging
import math
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from fedzo.errors import ConfigError

Law = Literal["gaussian", "laplace"]
Sampling = Literal["none", "poisson", "fixed"]

# How finely the privacy loss of one of n releases is discretised: this share of epsilon over the square root of n, but
# no coarser and no finer than so, and in at most so many points. The error that adds up is of order 1e-4 of epsilon.
_FINENESS, _COARSEST, _FINEST, _POINTS = 3e-3, 5e-3, 1e-7, 60_000
# What may be cut off the tails, of delta: it counts as if it told everything.
_CUT = 1e-6
# Beyond this epsilon nothing is promised, and the rough bound is exact enough.
_ABSURD = 200.0
_ORDERS = (1.5, *range(2, 65), 80, 96, 128, 192, 256, 384, 512, 768, 1024)
# The logarithm of a moment near 1 is rounded to this: without it next to no loss would count as none.
_ROUNDING = 4e-16
# Relative, of a calibrated noise multiplier, and its digits; the least and the most that is looked at.
_WIDTH, _DIGITS = 2e-4, 4
_STEP = 0.2  # of its logarithm, by which it is bracketed
_LEAST_NOISE, _MOST_NOISE = 1e-6, 1e6


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

    mechanism: Law
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
        return _amplified((2.0 if self.sampling == "fixed" else 1.0) / self.noise_multiplier, self.chance)


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
        found, rough = math.inf, _rough(release, count, delta)
        if not 0.0 < rough < _ABSURD:
            return rough
        if release.chance == 1.0:  # so many releases are one with less noise
            release, count = replace(release, noise_multiplier=release.noise_multiplier / math.sqrt(count)), 1
        interval = math.inf
        while True:
            finer = self._interval(release, count, delta, min(rough, found))
            if not finer < interval / 2.0:
                return found
            interval, before = finer, found
            found = min(before, rough, self._composed(release, count, delta, interval))
            if 3.0 * found > min(rough, before):  # else it is so small that the interval was too coarse for it
                return found

    def _composed(self, release: Release, count: int, delta: float, interval: float) -> float:
        _require("dp_accounting", "dp-accounting")
        from dp_accounting.pld import privacy_loss_distribution as losses

        one = losses.from_gaussian_mechanism(
            release.noise_multiplier, sampling_prob=release.chance, use_connect_dots=True,
            value_discretization_interval=interval, log_mass_truncation_bound=math.log(_CUT * delta / count),
        )  # fmt: skip
        whole = one.self_compose(count, tail_mass_truncation=max(_CUT * delta, 1e-15)) if count > 1 else one
        return float(whole.get_epsilon_for_delta(delta))

    def _interval(self, release: Release, count: int, delta: float, scale: float) -> float:
        """For an epsilon of this scale."""
        # The tail of a normal beyond x is below exp(-x^2 / 2), and the loss there:
        x = math.sqrt(-2.0 * math.log(_CUT * delta / count))
        most = (x + 0.5 / release.noise_multiplier) / release.noise_multiplier
        span = 2.0 * _amplified(most, release.chance)
        return max(min(_FINENESS * scale / math.sqrt(count), _COARSEST), _FINEST, span / _POINTS)


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
            if float((chance[above] * -np.expm1(middle - loss[above])).sum()) > delta * (1.0 - 1e-7):  # it is rounded
                low = middle
            else:
                high = middle
        return high


class Renyi(Accountant):
    """Renyi differential privacy: by Opacus, and of draws of a fixed number by dp-accounting.

    The latter (Wang, Balle, Kasiviswanathan, arXiv 1808.00087, theorem 27) is for one unit that is replaced by another.
    dp-accounting takes its noise over the distance by which that moves the sum and does not double it by itself; the
    parts of two units are up to twice the bound apart, so the noise counts half. It knows no epsilon much below
    log(1 / delta) / 1000 but 0, for lack of higher orders.
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

        orders = list(_ORDERS)
        with warnings.catch_warnings():  # of the best order being the highest, and of overflows
            warnings.simplefilter("ignore")
            spent = rdp.compute_rdp(
                q=release.chance, noise_multiplier=release.noise_multiplier, steps=count, orders=orders
            )
            return float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)[0])


class PRV(Accountant):
    """Privacy random variables (Gopi, Lee, Wutschitz, arXiv 2106.02848).

    An upper bound, above the truth by up to twice the error that is asked for: 0.3% of epsilon, but no less than what
    takes it some seconds, 0.003 for 10,000 releases. Without sampling, at rate 1, it works as well.
    """

    name = "prv"
    source = "privacy random variables, Opacus (arXiv 2106.02848)"

    def limit(self, release: Release, delta: float) -> str | None:
        if release.mechanism != "gaussian" or release.sampling == "fixed":
            return "it is of Gaussian noise, with Poisson sampling or none"
        return "delta = 0 has no bound by privacy random variables" if delta == 0.0 else None

    def epsilon(self, release: Release, count: int, delta: float) -> float:
        rough = _rough(release, count, delta)
        if not 0.0 < rough < _ABSURD:
            return rough
        _require("opacus", "opacus")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(release.noise_multiplier, release.chance, count)]
        error = max(3e-3 * rough, 3e-5 * math.sqrt(count))
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # of log 0 at rate 1
            warnings.simplefilter("ignore")
            try:
                return float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta / 1000.0))
            except (RuntimeError, ValueError):  # it could not discretise that well enough
                return math.inf


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
    if count < 0:
        raise ConfigError(f"the number of releases is {count:,}, wanted 0 or more")
    if accountant and accountant not in ACCOUNTANTS:
        raise ConfigError(f"the accountant is {accountant!r}, wanted one of {', '.join(ACCOUNTANTS)}")
    if count == 0:
        return 0.0
    chosen = ACCOUNTANTS[accountant] if accountant else authority(release, delta)
    if reason := chosen.limit(release, delta):
        raise ConfigError(f"the accountant {chosen.name} cannot tell epsilon: {reason}")
    if release.mechanism == "gaussian":
        if release.noise_multiplier < _LEAST_NOISE:
            return math.inf
        # More counts as so much: beyond, differences drown in rounding.
        release = replace(release, noise_multiplier=min(release.noise_multiplier, _MOST_NOISE))
    found = chosen.epsilon(release, count, delta) + count * release.slack
    return math.inf if math.isnan(found) else max(found, 0.0)


def calibrate(release: Release, count: int, target: float, delta: float) -> float:
    """The least noise multiplier, rounded up to four digits, with which `count` releases stay within epsilon and delta.

    Args:
        release: whose own multiplier does not matter.
        target: epsilon.

    Raises:
        ConfigError: as `epsilon`; or no noise is enough.
    """
    _check_target(target)
    if count < 1:
        raise ConfigError(f"the number of releases is {count:,}, wanted 1 or more")
    left = target - count * release.slack
    if not left > 0.0:
        raise ConfigError(
            f"{count:,} releases take epsilon {count * release.slack:.3g} by the grid alone, wanted {target:g}"
        )
    _check(replace(release, noise_multiplier=1.0), delta)

    _require("scipy", "scipy")
    from scipy.optimize import brentq

    def at(multiplier: float) -> float:
        return epsilon(replace(release, noise_multiplier=multiplier), count, delta)

    def excess(log_multiplier: float) -> float:
        """How far epsilon is above its target, logarithmically; bounded, for epsilons of 0 and inf."""
        return math.log(min(max(at(math.exp(log_multiplier)) / target, 1e-20), 1e20))

    most = math.log(_MOST_NOISE) if release.mechanism == "gaussian" else math.inf
    low = high = math.log(min(max(_guess(release, count, left, delta), _LEAST_NOISE), _MOST_NOISE))
    while excess(high) > 0.0:
        if high >= most:
            hint = ", or draw each unit by chance (poisson)" if release.sampling == "fixed" else ""
            raise ConfigError(
                f"no noise multiplier up to {_MOST_NOISE:g} keeps {count:,} releases within epsilon {target:g} at "
                f"delta {delta:g}: raise epsilon or delta, or make fewer releases{hint}"
            )
        low, high = high, min(high + _STEP, most)
    while excess(low) <= 0.0:
        if low <= math.log(_LEAST_NOISE):
            return _LEAST_NOISE
        low, high = low - _STEP, low
    found = _rounded_up(math.exp(brentq(excess, low, high, xtol=_WIDTH)))
    while at(found) > target:  # by the discretisation, which differs from noise to noise
        found = _rounded_up(found * (1.0 + _WIDTH))
    return found


def affordable(release: Release, target: float, delta: float, most: int) -> int:
    """The largest number of releases, up to `most`, that stays within epsilon and delta.

    Raises:
        ConfigError: as `epsilon`; or the epsilon is not above 0.
    """
    _check_target(target)

    if epsilon(release, most, delta) <= target:  # as it is of a run that goes as planned
        return most
    return bisect_right(range(1, most + 1), target, key=lambda count: epsilon(release, count, delta))


def cross_check(release: Release, count: int, delta: float) -> dict[str, float]:
    """epsilon by every accountant that covers such releases."""
    covering = [name for name, one in ACCOUNTANTS.items() if one.limit(release, delta) is None]
    return {name: epsilon(release, count, delta, name) for name in covering}


def _rough(release: Release, count: int, delta: float) -> float:
    """An upper bound on epsilon of Gaussian noise, without slack, quickly: Renyi divergences of whole orders."""
    _require("dp_accounting", "dp-accounting")
    import dp_accounting as dp
    from dp_accounting.rdp import rdp_privacy_accountant as renyi

    # It says through absl that it leaves out orders, which only loosens the bound.
    logging.getLogger("absl").setLevel(logging.ERROR)
    fixed = release.sampling == "fixed"
    relation = dp.NeighboringRelation.REPLACE_ONE if fixed else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    event: Any = dp.GaussianDpEvent(release.noise_multiplier / (2.0 if fixed else 1.0))
    if fixed and release.rate < 1.0:
        drawn = max(1, round(release.rate * release.units))
        event = dp.SampledWithoutReplacementDpEvent(release.units, drawn, event)
    elif release.chance < 1.0:
        event = dp.PoissonSampledDpEvent(release.chance, event)
    with np.errstate(all="ignore"):
        spent = renyi.RdpAccountant(_ORDERS, relation).compose(event, count).rdp
        spent = np.where(np.isnan(spent), math.inf, spent) + count * _ROUNDING
        return float(renyi.compute_epsilon(_ORDERS, spent, delta)[0])


def _amplified(pure: float, rate: float) -> float:
    """log(1 + rate (e^pure - 1))."""
    return math.log1p(rate * math.expm1(pure)) if pure < 700.0 else pure + math.log(rate)


def _guess(release: Release, count: int, target: float, delta: float) -> float:
    """About the noise multiplier that is needed: of many small privacy losses, which are normal."""
    twice = 2.0 if release.sampling == "fixed" else 1.0
    if release.mechanism == "laplace":
        pure = min(target / count, 600.0)
        return twice / math.log1p(math.expm1(pure) / release.chance)
    rate = release.rate if release.sampling != "none" else 1.0
    distance = math.sqrt(2.0 * (target - math.log(delta))) - math.sqrt(-2.0 * math.log(delta))
    each = distance / math.sqrt(count)
    return twice / (each if rate == 1.0 else math.sqrt(math.log1p((each / rate) ** 2)))


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
    if release.sampling == "fixed" and release.rate < 1.0 and release.units < 1:
        raise ConfigError(f"a fixed number is drawn of {release.units} units, wanted how many there are")
    if not release.slack >= 0.0:
        raise ConfigError(f"the slack of a release is {release.slack:g}, wanted 0 or more")


def _check_target(target: float) -> None:
    if not target > 0.0:
        raise ConfigError(f"epsilon is {target:g}, wanted a number above 0")


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f'accounting needs {package}, which is not installed: pip install "fedzo[privacy]"')
