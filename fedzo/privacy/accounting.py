"""Accounting: how many releases with how much noise make which (epsilon, delta)."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

from fedzo.errors import ConfigError

Mechanism = Literal["gaussian", "laplace"]
Sampling = Literal["none", "poisson", "fixed"]


@dataclass(frozen=True)
class Release:
    """One noised release, as an accountant sees it."""

    mechanism: Mechanism
    noise_multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0
    units: int = 0
    slack: float = 0.0

    @property
    def relation(self) -> str:
        return "replace-one" if self.sampling == "fixed" else "zero-out"


class Accountant(ABC):
    name: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def limit(self, release: Release, delta: float) -> str | None: ...

    @abstractmethod
    def epsilon(self, release: Release, count: int, delta: float) -> float: ...


class PLD(Accountant):
    name, source = "pld", "privacy loss distributions (Google's dp-accounting)"

    def limit(self, release: Release, delta: float) -> str | None:
        return None if release.sampling != "fixed" and delta > 0 else "no"

    def epsilon(self, release: Release, count: int, delta: float) -> float:
        from dp_accounting.pld import common, privacy_loss_distribution as pld

        if release.mechanism == "gaussian":
            q = release.rate if release.sampling == "poisson" else 1.0
            one = pld.from_gaussian_mechanism(
                release.noise_multiplier, sampling_prob=q, use_connect_dots=True, value_discretization_interval=1e-4
            )
        else:
            one = pld.from_privacy_parameters(common.DifferentialPrivacyParameters(_pure(release), 0.0))
        return float(one.self_compose(count).get_epsilon_for_delta(delta)) + count * release.slack


def _pure(release: Release) -> float:
    one = 1.0 / release.noise_multiplier
    if release.sampling == "fixed":
        return 2 * one
    return math.log1p(release.rate * math.expm1(one)) if release.sampling == "poisson" else one


class Pure(Accountant):
    name, source = "pure", "exact composition of pure epsilon"

    def limit(self, release: Release, delta: float) -> str | None:
        return None if release.mechanism == "laplace" else "no"

    def epsilon(self, release: Release, count: int, delta: float) -> float:
        return count * (_pure(release) + release.slack)


class RDP(Accountant):
    name, source = "rdp", "Renyi differential privacy"

    def limit(self, release: Release, delta: float) -> str | None:
        return None if release.mechanism == "gaussian" and delta > 0 else "no"

    def epsilon(self, release: Release, count: int, delta: float) -> float:
        import dp_accounting as dp

        fixed = release.sampling == "fixed"
        relation = dp.NeighboringRelation.REPLACE_ONE if fixed else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
        accountant = dp.rdp.RdpAccountant(neighboring_relation=relation)
        inner = dp.GaussianDpEvent(release.noise_multiplier / (2 if fixed else 1))
        if fixed and release.rate < 1:
            event = dp.SampledWithoutReplacementDpEvent(
                release.units, max(1, round(release.rate * release.units)), inner
            )
        elif release.sampling == "poisson":
            event = dp.PoissonSampledDpEvent(release.rate, inner)
        else:
            event = inner
        return float(accountant.compose(event, count).get_epsilon(delta)) + count * release.slack


ACCOUNTANTS: dict[str, Accountant] = {"pld": PLD(), "rdp": RDP(), "pure": Pure()}


def authority(release: Release, delta: float) -> Accountant:
    for name in ("pure", "rdp") if delta == 0 or release.sampling == "fixed" else ("pld",):
        if ACCOUNTANTS[name].limit(release, delta) is None:
            return ACCOUNTANTS[name]
    raise ConfigError("no accountant")


@lru_cache(maxsize=4096)
def epsilon(release: Release, count: int, delta: float, accountant: str = "") -> float:
    if count == 0:
        return 0.0
    return (ACCOUNTANTS[accountant] if accountant else authority(release, delta)).epsilon(release, count, delta)


def calibrate(release: Release, count: int, epsilon_: float, delta: float) -> float:
    rough = "rdp" if release.mechanism == "gaussian" else "pure"
    low, high = 0.05, 0.1
    while epsilon(replace(release, noise_multiplier=high), count, delta, rough) > epsilon_:
        low, high = high, high * 2
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if epsilon(replace(release, noise_multiplier=middle), count, delta, rough) > epsilon_:
            low = middle
        else:
            high = middle
    low = high * 0.8
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        if epsilon(replace(release, noise_multiplier=middle), count, delta) > epsilon_:
            low = middle
        else:
            high = middle
    return high


def affordable(release: Release, epsilon_: float, delta: float, most: int) -> int:
    low, high = 0, most
    if epsilon(release, most, delta) <= epsilon_:
        return most
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon(release, middle, delta) <= epsilon_:
            low = middle
        else:
            high = middle
    return low


def cross_check(release: Release, count: int, delta: float) -> dict[str, float]:
    return {n: epsilon(release, count, delta, n) for n, a in ACCOUNTANTS.items() if a.limit(release, delta) is None}
