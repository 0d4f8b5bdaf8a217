"""ZO-SGD, and the same over a fixed pool of seeds."""

from collections.abc import Generator, Sequence
from functools import cached_property
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedzo import directions
from fedzo.directions.base import Directions, Isotropic
from fedzo.errors import ConfigError, ProtocolError
from fedzo.evaluation import Batch, Request
from fedzo.limits import FLOAT32_THETA, NO_CODES, Condition
from fedzo.optimizers.base import Records, Rule, Scalars, Seeds, State, expect_length, rounded


class SGD(Rule):
    """theta <- (1 - lr wd) theta - lr / P sum_p g_p z_p.

    Without weight decay any run of records is one fused pass over theta. A step on a bfloat16 theta adds its records in
    float32 and rounds once, stochastically (`directions.replay_rounded`), by the step's stream (`Rule.streams`).
    """

    source: ClassVar[str] = "MeZO, arXiv 2305.17333, algorithm 1; ZO-Bench, arXiv 2402.11592, equation 2"
    limits: ClassVar[tuple[Condition, ...]] = (NO_CODES,)

    def apply(self, theta: Tensor, state: State, records: Sequence[Records]) -> State:
        if theta.dtype == torch.bfloat16:
            self._apply_rounded(theta, records)
        elif self.setup.structure.steady and not self.setup.decay and records:
            seeds = np.concatenate([r.seeds.ravel() for r in records])
            coefficients = np.concatenate([self.coefficients(r).ravel() for r in records]).astype(np.float32)
            self.setup.structure.at(0).replay(theta, seeds, coefficients)
        else:
            super().apply(theta, state, records)
        return state

    def step(self, theta: Tensor, state: State, records: Records) -> State:
        if self.setup.decay:
            theta.mul_(rounded(1.0 - self.setup.schedule(records.step) * self.setup.decay))
        coefficients = self.coefficients(records)[0].astype(np.float32)
        self.directions(records.step, theta, state).replay(theta, records.seeds[0], coefficients)
        return state

    def _apply_rounded(self, theta: Tensor, records: Sequence[Records]) -> None:
        """One pass over theta for each run of steps with equally many records."""
        drawn = self.setup.structure.at(0)
        if not isinstance(drawn, Isotropic) or self.setup.decay:
            raise ConfigError(
                "a bfloat16 theta is moved along isotropic directions without weight decay only: set "
                'method.structure = "isotropic" and method.weight_decay = 0, or space.theta_dtype = "float32"'
            )
        for _, group in groupby(records, key=lambda r: r.seeds.shape[1]):
            same = list(group)
            directions.replay_rounded(
                theta,
                np.concatenate([r.seeds for r in same]),
                np.concatenate([self.coefficients(r) for r in same]).astype(np.float32),
                drawn.family,
                np.concatenate([self.streams(r.step, r.seeds.shape[0]) for r in same]),
            )


class PoolSGD(Rule):
    """ZO-SGD over a fixed pool of seeds: theta = theta0 + sum_j c_j z_j.

    The coefficients accumulate in float64 and theta is rebuilt from theta0 in pool order, so a late client needs the N
    coefficients and no history. Not in the registry: the seed schedule makes it of an `SGD`.

    Args:
        sgd: turns records into coefficients; without weight decay, its directions the same at every step.
        pool: the seeds, uint64 [N], all different.

    Raises:
        ConfigError: theta would be no sum over the pool.
    """

    source: ClassVar[str] = "FedKSeed, arXiv 2312.06353, equation 6"
    limits: ClassVar[tuple[Condition, ...]] = (FLOAT32_THETA, NO_CODES)
    state_vectors: ClassVar[int] = 1

    def __init__(self, sgd: SGD, pool: Seeds) -> None:
        super().__init__(sgd.setup)
        self.sgd, self.pool = sgd, pool
        if not sgd.setup.structure.steady or sgd.setup.decay:
            raise ConfigError(
                'a pool of seeds sums over a fixed set of directions: set method.structure = "isotropic" and '
                "method.weight_decay = 0"
            )

    @cached_property
    def _place(self) -> dict[int, int]:
        return {int(seed): j for j, seed in enumerate(self.pool)}

    def init(self, theta0: Tensor) -> State:
        """theta0 [size] float32 and the accumulated coefficients [N] float64.

        Raises:
            ConfigError: theta0 is not float32.
        """
        if theta0.dtype != torch.float32:
            raise ConfigError(
                f"theta is {theta0.dtype}, but a pool of seeds needs float32: it rebuilds theta from theta0 "
                "and all coefficients in one go, where bfloat16 is rounded at every step; choose shared or independent"
            )
        return {"theta0": theta0.clone(), "coefficients": torch.zeros(self.pool.size, dtype=torch.float64)}

    def directions(self, step: int, theta: Tensor, state: State) -> Directions:
        return self.sgd.directions(step, theta, state)

    def settle(
        self, theta: Tensor, state: State, batch: Batch, records: Records
    ) -> Generator[Request, Tensor, Scalars]:
        return self.sgd.settle(theta, {}, batch, records)

    def apply(self, theta: Tensor, state: State, records: Sequence[Records]) -> State:
        """As `Rule.apply`.

        Raises:
            ProtocolError: a record's seed is not in the pool; theta is then unchanged.
        """
        place, total = self._place, state["coefficients"].numpy().copy()
        for r in records:
            for seed, c in zip(r.seeds.ravel().tolist(), self.coefficients(r).ravel().tolist(), strict=True):
                if seed not in place:
                    raise ProtocolError(f"seed {seed} is not in the run's pool of {self.pool.size}")
                total[place[seed]] += c
        return self._rebuild(theta, state | {"coefficients": torch.from_numpy(total)})

    def _rebuild(self, theta: Tensor, state: State) -> State:
        coefficients = state["coefficients"].numpy()
        used = np.flatnonzero(coefficients)
        theta.copy_(state["theta0"])
        self.setup.structure.at(0).replay(theta, self.pool[used], coefficients[used].astype(np.float32))
        return state

    def fork(self, state: State) -> tuple[Rule, State]:
        return self.sgd, {}

    def snapshot(self, theta: Tensor, state: State) -> bytes:
        return state["coefficients"].numpy().astype("<f8", copy=False).tobytes()

    def snapshot_bytes(self, theta: Tensor, state: State) -> int:
        return 8 * self.pool.size

    def restore(self, theta: Tensor, state: State, data: bytes) -> State:
        expect_length(data, 8 * self.pool.size)
        coefficients = torch.from_numpy(np.frombuffer(data, dtype="<f8").astype(np.float64))
        return self._rebuild(theta, state | {"coefficients": coefficients})
