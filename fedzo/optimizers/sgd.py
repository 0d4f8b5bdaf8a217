"""ZO-SGD: theta <- theta - lr / P sum_p g_p z_p.

MeZO, arXiv 2305.17333, algorithm 1; ZO-Bench, arXiv 2402.11592, equation 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo import directions
from fedzo.directions import philox
from fedzo.errors import ConfigError, ProtocolError
from fedzo.optimizers.base import Records, Seeds
from fedzo.optimizers.schedule import Schedule


def theta_array(theta: Tensor) -> npt.NDArray[np.generic]:
    """theta's values as a little-endian array on CPU: float32, or uint16 with the bits of bfloat16."""
    if theta.dtype == torch.bfloat16:
        return theta.detach().cpu().view(torch.uint16).numpy().astype("<u2", copy=False)
    return theta.detach().cpu().numpy().astype("<f4", copy=False)


def _expect(data: bytes, length: int) -> None:
    if len(data) != length:
        raise ProtocolError(f"snapshot has {len(data)} bytes, wanted {length}")


@dataclass(frozen=True)
class SGD:
    """Plain ZO-SGD; no state, so any run of records is one fused pass over theta.

    A step on a bfloat16 theta adds its records in float32 and rounds once, stochastically
    (`directions.replay_rounded`), by the stream whose seed is the first two words, the low one first, of block `step`
    of the Philox stream `rounding`: a function of the rule and the step's index alone.

    Attributes:
        schedule: learning rate of a step.
        queries: P, the queries that a step's records average over.
        family: direction family.
        rounding: seed of the streams that round a bfloat16 theta; a float32 theta does not depend on it.
    """

    schedule: Schedule
    queries: int
    family: str
    rounding: int = 0

    def coefficients(self, records: Records) -> npt.NDArray[np.float64]:
        """c [S, R] float64 with theta <- theta + sum c z: minus learning rate over P, times the scalar."""
        steps = range(records.step, records.step + records.seeds.shape[0])
        rates = np.array([-self.schedule(step) / self.queries for step in steps], dtype=np.float64)
        scaled: npt.NDArray[np.float64] = rates[:, None] * records.scalars.astype(np.float64)
        return scaled

    def init(self, theta0: Tensor) -> None:
        return None

    def apply(self, theta: Tensor, state: object, records: Sequence[Records]) -> None:
        if theta.dtype == torch.bfloat16:
            self._apply_rounded(theta, records)
        elif records:
            seeds = np.concatenate([r.seeds.ravel() for r in records])
            coefficients = np.concatenate([self.coefficients(r).ravel() for r in records])
            directions.replay(theta, seeds, coefficients.astype(np.float32), self.family)

    def _apply_rounded(self, theta: Tensor, records: Sequence[Records]) -> None:
        """One pass over theta for each run of steps with equally many records."""
        for _, group in groupby(records, key=lambda r: r.seeds.shape[1]):
            same = list(group)
            directions.replay_rounded(
                theta,
                np.concatenate([r.seeds for r in same]),
                np.concatenate([self.coefficients(r) for r in same]).astype(np.float32),
                self.family,
                np.concatenate([self.streams(r.step, r.seeds.shape[0]) for r in same]),
            )

    def streams(self, step: int, count: int) -> Seeds:
        """The seeds [count] of the streams that round steps `step`, `step` + 1, ..."""
        words = philox.words(self.rounding, 4 * count, step).astype(np.uint64).reshape(count, 4)
        seeds: Seeds = words[:, 0] | (words[:, 1] << np.uint64(32))
        return seeds

    def local(self) -> "SGD":
        return self

    def snapshot(self, theta: Tensor, state: object) -> bytes:
        return theta_array(theta).tobytes()

    def snapshot_bytes(self, theta: Tensor) -> int:
        return theta.numel() * theta.element_size()

    def restore(self, theta: Tensor, state: object, data: bytes) -> None:
        _expect(data, self.snapshot_bytes(theta))
        if theta.dtype == torch.bfloat16:
            values = torch.from_numpy(np.frombuffer(data, dtype="<u2").astype(np.uint16)).view(torch.bfloat16)
        else:
            values = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
        theta.copy_(values)


@dataclass(frozen=True)
class PoolState:
    """theta0 float32 [size] and the accumulated coefficients float64 [N], one for each seed of the pool."""

    theta0: Tensor
    coefficients: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PoolSGD:
    """ZO-SGD over a fixed pool of seeds (FedKSeed, arXiv 2312.06353, eq. 6): theta = theta0 + sum_j c_j z_j.

    The coefficients accumulate in float64 and theta is rebuilt from theta0 in pool order, so a late client needs the N
    coefficients and no history.

    Attributes:
        sgd: turns records into coefficients.
        pool: the seeds, uint64 [N], all different.
    """

    sgd: SGD
    pool: Seeds

    @cached_property
    def _place(self) -> dict[int, int]:
        return {int(seed): j for j, seed in enumerate(self.pool)}

    def init(self, theta0: Tensor) -> PoolState:
        """As `UpdateRule.init`.

        Raises:
            ConfigError: theta0 is not float32.
        """
        if theta0.dtype != torch.float32:
            raise ConfigError(
                f'theta is {theta0.dtype}, but the seed schedule "pool" needs float32: it rebuilds theta from theta0 '
                "and all coefficients in one go, where bfloat16 is rounded at every step; choose shared or independent"
            )
        return PoolState(theta0.clone(), np.zeros(self.pool.size, dtype=np.float64))

    def apply(self, theta: Tensor, state: object, records: Sequence[Records]) -> PoolState:
        """As `UpdateRule.apply`.

        Raises:
            ProtocolError: a record's seed is not in the pool; theta is then unchanged.
        """
        assert isinstance(state, PoolState)
        place, total = self._place, state.coefficients.copy()
        for r in records:
            for seed, c in zip(r.seeds.ravel().tolist(), self.sgd.coefficients(r).ravel().tolist(), strict=True):
                if seed not in place:
                    raise ProtocolError(f"seed {seed} is not in the run's pool of {self.pool.size}")
                total[place[seed]] += c
        return self._rebuild(theta, PoolState(state.theta0, total))

    def _rebuild(self, theta: Tensor, state: PoolState) -> PoolState:
        used = np.flatnonzero(state.coefficients)
        theta.copy_(state.theta0)
        coefficients = state.coefficients[used].astype(np.float32)
        directions.replay(theta, self.pool[used], coefficients, self.sgd.family)
        return state

    def local(self) -> SGD:
        return self.sgd

    def snapshot(self, theta: Tensor, state: object) -> bytes:
        assert isinstance(state, PoolState)
        return state.coefficients.astype("<f8", copy=False).tobytes()

    def snapshot_bytes(self, theta: Tensor) -> int:
        return 8 * self.pool.size

    def restore(self, theta: Tensor, state: object, data: bytes) -> PoolState:
        assert isinstance(state, PoolState)
        _expect(data, 8 * self.pool.size)
        return self._rebuild(theta, PoolState(state.theta0, np.frombuffer(data, dtype="<f8").astype(np.float64)))
