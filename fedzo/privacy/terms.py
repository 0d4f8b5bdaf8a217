"""What a run promises of everything that leaves its clients: the terms, which are part of the ledger's header."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedzo.errors import LedgerError
from fedzo.limits import Value
from fedzo.privacy.accounting import Law, Release, Sampling
from fedzo.privacy.mechanisms import LEVELS, MECHANISMS, MOST_SCALE, Mechanism

# Modes in which a client noises what it sends by itself, and each client has a budget of its own.
LOCAL_MODES = ("example-local", "client-local")
# Modes in which only a sum over clients is noised, so that all must have tried the same seeds.
SUM_MODES = ("client-central", "client-secagg")


@dataclass(frozen=True)
class Terms:
    """The terms of a private run.

    Attributes:
        mode: one of `fedzo.limits.PRIVACY_MODES`.
        mechanism: name of the noise.
        epsilon, delta: the budget of a unit (an example or a client), never exceeded.
        noise_multiplier: standard deviation (scale, of Laplace) of a release's noise over the bound on a unit's part,
            as the accountant takes it.
        clip: the first bound on the norm of a unit's scalars, L2 (L1 for Laplace).
        clipping: "fixed", or "adaptive": the bound follows a quantile of the units' norms.
        quantile, clip_rate, clip_share: of adaptive clipping: which quantile, the step of its logarithm, and the share
            of the budget that finding it takes.
        sampling: how the units of a release are drawn: "none", "poisson" or "fixed".
        rate: probability or share of that draw, as the noise was planned; an example-local client has its own.
        releases: that were planned of one unit.
        tolerance: clients of a round that may drop out, or tell others their noise, with the noise as planned.
        asked: clients of a round, where their number is fixed; else 0.
        levels: steps of the grid from 0 to the bound.
        nonce: drawn for the run, so that no two runs have the same header.
    """

    mode: str
    mechanism: Law
    epsilon: float
    delta: float
    noise_multiplier: float
    clip: float
    clipping: str
    quantile: float
    clip_rate: float
    clip_share: float
    sampling: Sampling
    rate: float
    releases: int
    tolerance: int
    asked: int
    levels: int
    nonce: str

    def to_header(self) -> dict[str, Value]:
        """As the ledger's header holds them."""
        return asdict(self)

    @staticmethod
    def from_header(values: Mapping[str, Any]) -> "Terms":
        """Inverse of `to_header`.

        Raises:
            LedgerError: fields are missing, unknown or of no known value.
        """
        try:
            terms = Terms(**values)
            right = terms._possible()
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise LedgerError("the header's privacy terms are not those of this version of fedzo")
        return terms

    def _possible(self) -> bool:
        """Whether a client can hold a server to them: a header may come from one that nobody trusts."""
        sampled = self.mode in ("example-local", "client-central")  # by a draw that the budget may count on
        numbers = self.noise_multiplier, self.clip, self.epsilon, self.clip_rate
        return (
            self.mode in LOCAL_MODES + SUM_MODES
            and self.mechanism in MECHANISMS
            and self.clipping in ("fixed", "adaptive")
            and all(0.0 < value < math.inf for value in numbers)
            and 0.0 <= self.delta < 1.0
            and (self.delta > 0.0 or self.mechanism == "laplace")
            and 0.0 < self.quantile < 1.0
            and 0.0 < self.clip_share < 1.0
            and self.sampling in (("none", "poisson", "fixed") if sampled else ("none",))
            and 0.0 < self.rate <= 1.0
            and (self.sampling != "none" or self.rate == 1.0)
            and all(isinstance(value, int) for value in (self.levels, self.releases, self.tolerance, self.asked))
            and 1 <= self.levels <= LEVELS
            and self.releases >= 1
            and self.tolerance >= 0
            and (self.mode != "client-secagg" or self.tolerance <= self.asked - 2)
            and max(self.noise.noise_multiplier, self.count_noise.noise_multiplier) * self.levels < MOST_SCALE
        )

    @property
    def local(self) -> bool:
        """Whether a client noises what it sends."""
        return self.mode in LOCAL_MODES

    @property
    def sums(self) -> bool:
        """Whether only a sum over clients is noised."""
        return self.mode in SUM_MODES

    @property
    def secret(self) -> bool:
        """Whether the guarantee rests on nobody but the server knowing who took part in a round. The budget is then the
        run's; else each client keeps one of its own."""
        return self.mode == "client-central"

    @property
    def survivors(self) -> int:
        """Clients that a secure sum must be of, so that it has all its noise."""
        return self.asked - self.tolerance

    @property
    def of_examples(self) -> bool:
        """Whether the unit is an example; else it is a client."""
        return self.mode == "example-local"

    @property
    def adaptive(self) -> bool:
        return self.clipping == "adaptive"

    @property
    def order(self) -> int:
        """p of the norm that is bounded: 2, or 1 for Laplace."""
        return MECHANISMS[self.mechanism].order

    @property
    def noise(self) -> Mechanism:
        """The noise on the scalars. What adaptive clipping spends makes it larger than the accountant's:
        z^-p = z_scalars^-p + z_counts^-p (Andrew et al., arXiv 1905.03871, theorem 1, for p = 2)."""
        share = self.clip_share if self.adaptive else 0.0
        return MECHANISMS[self.mechanism](self.noise_multiplier / (1.0 - share) ** (1.0 / self.order), self.levels)

    @property
    def count_noise(self) -> Mechanism:
        """The noise on counts of units within the bound, each of which adds or takes one half."""
        return MECHANISMS[self.mechanism](self.noise_multiplier / self.clip_share ** (1.0 / self.order), self.levels)

    def release(self, coordinates: int, rate: float | None = None, units: int = 0) -> Release:
        """One release to a unit's accountant.

        Args:
            coordinates: numbers that it consists of, which the grid's slack counts.
            rate: of the draw; None: as planned.
            units: of which a fixed number is drawn.
        """
        slack = coordinates * self.noise.slack
        of = units if self.sampling == "fixed" else 0
        chosen = self.rate if rate is None else rate
        return Release(self.mechanism, self.noise_multiplier, self.sampling, chosen, of, slack)
