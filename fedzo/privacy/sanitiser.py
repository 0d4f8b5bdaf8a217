"""What may leave a party of a private run: clips what a unit gives, and noises what is released."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
import numpy.typing as npt

from fedzo.privacy.mechanisms import Floats, Ints, Mechanism
from fedzo.privacy.terms import Terms

Scalars = npt.NDArray[np.float32]
# The bound follows the norms no further than this from where it began.
_FURTHEST = 1e4


@dataclass(frozen=True)
class Sanitiser:
    """Clipping and noise under a run's terms.

    Behind the scalars come counts, of adaptive clipping only: the sum over a release's units of one half for each whose
    norm is within the bound and less one half for each that is not (Andrew et al., arXiv 1905.03871, section 2.2).

    Attributes:
        terms: of the run.
        local_steps: K.
        width: scalars of a step, C P.
        batch_size: expected number of examples of a step.
        clients: of the run.
    """

    terms: Terms
    local_steps: int
    width: int
    batch_size: int
    clients: int

    @property
    def counts(self) -> int:
        """Counts of a contribution: one for each release of its own noise; none where the bound is fixed."""
        return (self.local_steps if self.terms.local else 1) if self.terms.adaptive else 0

    @property
    def coordinates(self) -> int:
        """Numbers of one of a unit's releases."""
        if self.terms.of_examples:
            return self.width + min(self.counts, 1)
        return self.local_steps * self.width + self.counts

    @property
    def releases(self) -> int:
        """Releases of a unit in a round that it takes part in."""
        return self.local_steps if self.terms.of_examples else 1

    @property
    def expected(self) -> float:
        """Units that a release is divided by: expected, never counted."""
        terms = self.terms
        if terms.of_examples:
            return float(self.batch_size)
        if terms.mode == "client-local":
            return 1.0
        return float(terms.asked or terms.rate * self.clients)

    @property
    def error(self) -> float:
        """Standard deviation of the noise in a scalar that is released with the first bound."""
        return self.terms.noise.deviation * self.terms.clip / self.expected

    def examples(self, values: Floats, bound: float) -> tuple[Scalars, float]:
        """A local step's release over single examples.

        Args:
            values: float64 [C P, B], of each example; B may be 0.
            bound: on the norm of an example's.

        Returns:
            Noised means float32 [C P], and the noised mean of the counts.
        """
        steps, within = self.terms.noise.clip(values, bound)
        total = steps.sum(axis=1) + self.terms.noise.draw(self.width)
        count = self._noised_count(self._halves(within), 1.0) if self.terms.adaptive else 0.0
        return (self.terms.noise.values(total, bound) / self.expected).astype(np.float32), count / self.expected

    def step(self, values: Floats, bound: float) -> tuple[Scalars, float]:
        """A client's release of one of its K local steps; all K of them together are one release at `bound`.

        Each is clipped to bound / K^(1/p) and has the noise of the whole.

        Args:
            values: float64 [C P].
        """
        parts = self.local_steps ** (1.0 / self.terms.order)
        own = bound / parts
        steps, within = self.terms.noise.clip(values[:, None], own)
        noise = self.terms.noise.draw(self.width, self.terms.noise.noise_multiplier * parts)
        count = self._noised_count(self._halves(within), parts) if self.terms.adaptive else 0.0
        return self.terms.noise.values(steps[:, 0] + noise, own).astype(np.float32), count

    def clipped(self, values: Floats, bound: float) -> tuple[Scalars, Scalars]:
        """A client's part of a sum that the server noises.

        Args:
            values: float64 [K, C P].

        Returns:
            Scalars float32 [K, C P] of at most the bound, and counts float32 [0 or 1].
        """
        steps, within = self.terms.noise.clip(values.reshape(-1, 1), bound)
        halves = np.where(within, 0.5, -0.5).astype(np.float32)[: self.counts]
        return self.terms.noise.values(steps.reshape(values.shape), bound).astype(np.float32), halves

    def total(self, parts: Sequence[tuple[Scalars, Scalars]], bound: float) -> tuple[Floats, Floats]:
        """The server's release: the noised sum of the clients' parts over the number expected.

        Args:
            parts: as `clipped` makes them; each is clipped again, and a count taken by its sign.

        Returns:
            Scalars float64 [K, C P] and counts float64 [0 or 1].
        """
        shape = self.local_steps, self.width
        size = self.local_steps * self.width
        vectors = np.array([scalars.reshape(-1) for scalars, _ in parts], dtype=np.float64).reshape(len(parts), size)
        steps, _ = self.terms.noise.clip(vectors.T, bound)
        total = steps.sum(axis=1) + self.terms.noise.draw(size)
        halves = self._halves(np.array([count[0] > 0 for _, count in parts], dtype=bool)) if self.counts else 0
        counts = [self._noised_count(halves, 1.0) / self.expected] if self.counts else []
        return self.terms.noise.values(total, bound).reshape(shape) / self.expected, np.array(counts)

    def share(self, values: Floats, bound: float) -> Ints:
        """A client's vector for a secure sum, with its share of the noise: int64 [K C P + counts] grid steps.

        The shares of those that remain when `tolerance` clients drop out add up to the planned noise.

        Args:
            values: float64 [K, C P].
        """
        part = sqrt(self.terms.survivors)
        steps, within = self.terms.noise.clip(values.reshape(-1, 1), bound)
        noised = steps[:, 0] + self.terms.noise.draw(steps.size, self.terms.noise.noise_multiplier / part)
        if not self.counts:
            return noised
        count, noise = self._halves(within), self.terms.count_noise
        return np.append(noised, count + noise.draw(1, noise.noise_multiplier / 2.0 / part))

    def unpack(self, total: Ints, bound: float) -> tuple[Floats, Floats]:
        """The secure sum of `share`s: scalars float64 [K, C P] over the number of clients asked, counts [0 or 1]."""
        scalars = self.terms.noise.values(total[: self.local_steps * self.width], bound) / self.expected
        counts = total[self.local_steps * self.width :] / (self.terms.levels * self.expected)
        return scalars.reshape(self.local_steps, self.width), counts

    def next_bound(self, bound: float, count: float) -> float:
        """The bound of the round after: nearer to the quantile, by a step of its logarithm.

        Args:
            count: noised mean of the units' counts, about the share that is within the bound less one half.
        """
        terms = self.terms
        away = min(max(count + 0.5, 0.0), 1.0) - terms.quantile
        moved = bound * exp(-terms.clip_rate * away)
        return min(max(moved, terms.clip / _FURTHEST), terms.clip * _FURTHEST)

    def _halves(self, within: npt.NDArray[np.bool_]) -> int:
        """The sum of halves, in steps of 1 / levels."""
        return int(np.where(within, 1, -1).sum()) * (self.terms.levels // 2)

    def _noised_count(self, halves: int, parts: float) -> float:
        noise: Mechanism = self.terms.count_noise
        # One unit changes the count by a half: its bound is levels / 2 steps.
        return float(halves + noise.draw(1, noise.noise_multiplier / 2.0 * parts)[0]) / noise.levels
