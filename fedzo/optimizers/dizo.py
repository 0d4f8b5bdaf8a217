"""DiZO: now and then, steps along how far each parameter has drifted instead of along random directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions import fill
from fedzo.directions.base import Directions, Filled
from fedzo.limits import FLOAT32_THETA, NO_CODES, NO_POOL, ONE_LOCAL_STEP, Condition, Limit
from fedzo.optimizers.base import Records, Rule, Setup, State, rounded
from fedzo.optimizers.sgd import SGD
from fedzo.structures import Layout


class DiZO(SGD):
    """theta_l <- theta0_l + a_l D_l for each parameter l, where D is the drift theta - theta0 that ``project_every``
    steps of SGD have left, a_l = 1 at first, and ``project_steps`` steps are
    a_l <- clip(a_l - rate/P sum_p h_p u_pl, 1 - tau, 1 + tau), u_pl = +-1, h_p the derivative of the loss along u_p.

    Then SGD goes on. a_l is the paper's gamma_l / ||D_l||, so that no norm is needed; rate is ``projection_rate``
    times the learning rate's share of its peak (the paper's is constant, and so is its learning rate), tau is
    ``projection_clip``. Steps of projection have no weight decay.

    Such a step is queried at a +- tau u, which is theta +- eps z with z_l = tau / eps u_l D_l, so h = g eps / tau. The
    paper moves gamma_l by a Gaussian times a smoothing of its own, cut to tau ||D_l||; here it is always the cut one,
    which needs no setting and fits a drift of any size. The paper projects the drift of a model's query and value
    matrices: choose yours by ``space.include``.
    """

    source: ClassVar[str] = "DiZO, arXiv 2502.03304, algorithm 1"
    limits: ClassVar[tuple[Condition, ...]] = (
        NO_POOL,
        FLOAT32_THETA,
        NO_CODES,
        ONE_LOCAL_STEP,
        Limit(
            "method.estimator",
            ("two-point", "one-point", "p-rge", "forward-gradient"),
            "a projection needs scalars that are derivatives of the loss along a direction",
        ),
    )
    settings: ClassVar[tuple[str, ...]] = (
        "weight_decay", "eps", "project_every", "project_steps", "projection_rate", "projection_clip",
    )  # fmt: skip
    state_vectors: ClassVar[int] = 1

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._tau = float(setup.values["projection_clip"])
        self._per_eps = self._tau / float(setup.values["eps"])

    def projects(self, step: int) -> bool:
        """Whether a step is one of projection."""
        every, steps = int(self.setup.values["project_every"]), int(self.setup.values["project_steps"])
        return step % (every + steps) >= every

    def init(self, theta0: Tensor) -> State:
        """theta0 [size] on its device, and the ratios a [L] float64 on the CPU, for L parameters."""
        ratios = torch.ones(len(self.setup.layout.segments), dtype=torch.float64)
        return {"theta0": theta0.clone(), "ratios": ratios}

    def directions(self, step: int, theta: Tensor, state: State) -> Directions:
        """As `Rule.directions`; those of a projection hold the drift, a vector of theta's size."""
        if not self.projects(step):
            return super().directions(step, theta, state)
        return _Drift(theta - state["theta0"], self._per_eps / state["ratios"].numpy(), self.setup.layout)

    def apply(self, theta: Tensor, state: State, records: Sequence[Records]) -> State:
        return Rule.apply(self, theta, state, records)

    def step(self, theta: Tensor, state: State, records: Records) -> State:
        if self.projects(records.step):
            return self._project(theta, state, records)
        state["ratios"].fill_(1.0)
        return super().step(theta, state, records)

    def _project(self, theta: Tensor, state: State, records: Records) -> State:
        schedule, segments, old = self.setup.schedule, self.setup.layout.segments, state["ratios"].numpy()
        share = schedule(records.step) / schedule.learning_rate
        rate = float(self.setup.values["projection_rate"]) * share / (self._per_eps * self.setup.queries)
        slope = np.zeros(len(segments))
        for seed, g in zip(records.seeds[0].tolist(), records.projected[0].tolist(), strict=True):
            slope += g * _signs(seed, len(segments))
        new = np.clip(old - rate * slope, 1.0 - self._tau, 1.0 + self._tau)
        for segment, growth in zip(segments, ((new - old) / old).tolist(), strict=True):
            here = slice(segment.offset, segment.offset + segment.size)
            theta[here].add_((theta[here] - state["theta0"][here]).mul_(rounded(growth)))
        state["ratios"].copy_(torch.from_numpy(new))
        return state

    def snapshot(self, theta: Tensor, state: State) -> bytes:
        return super().snapshot(theta, _ratios(state))

    def snapshot_bytes(self, theta: Tensor, state: State) -> int:
        return super().snapshot_bytes(theta, _ratios(state))

    def restore(self, theta: Tensor, state: State, data: bytes) -> State:
        super().restore(theta, _ratios(state), data)
        return state


@dataclass(frozen=True)
class _Drift(Filled):
    """z_l = u_l factors_l drift_l, with a sign u_l for each parameter l from the seed.

    Attributes:
        drift: [size] float32.
        factors: [L].
        layout: of the L parameters.
    """

    drift: Tensor
    factors: npt.NDArray[np.float64]
    layout: Layout

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        stop = offset + len(out)
        out.copy_(self.drift[offset:stop])
        signed = (self.factors * _signs(seed, len(self.factors))).tolist()
        for segment, factor in zip(self.layout.segments, signed, strict=True):
            first, last = max(offset, segment.offset), min(stop, segment.offset + segment.size)
            if first < last:
                out[first - offset : last - offset].mul_(rounded(factor))
        return out


def _signs(seed: int, count: int) -> npt.NDArray[np.float64]:
    """u [count], the first entries of the seed's Rademacher direction."""
    return fill(torch.empty(count), seed, "rademacher").double().numpy()


def _ratios(state: State) -> State:
    """What a snapshot holds beside theta: who takes it has theta0."""
    return {"ratios": state["ratios"]}
