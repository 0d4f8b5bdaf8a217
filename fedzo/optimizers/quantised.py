"""Update rules for what a quantised base is stored as: its scales (QZO) and its int8 codes (QuZO)."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedzo.directions import round_stochastically
from fedzo.directions.base import Directions
from fedzo.limits import Condition, Limit
from fedzo.optimizers.base import Records, Rule, State
from fedzo.spaces.quantised import LARGEST
from fedzo.structures.quantised import Rounded


class QZO(Rule):
    """theta <- max(theta - lr / P sum_p g_p z_p, 0) for scales; other entries of theta as SGD moves them.

    The scalars g_p are clipped by ``method.clip`` before they leave a client (the paper's directional derivative
    clipping, at 100 in its code).
    """

    source: ClassVar[str] = "QZO, arXiv 2505.13430, algorithm 1"
    limits: ClassVar[tuple[Condition, ...]] = (
        Limit("space.kind", ("scales",), "it keeps quantisation scales from becoming negative"),
        Limit("federation.seeds", ("shared", "independent"), "the projection makes theta no sum over seeds"),
    )

    def move(self, theta: Tensor, state: State, gradient: Tensor, rate: float) -> State:
        super().move(theta, state, gradient, rate)
        for segment in self.setup.layout.segments:
            if segment.holds == "scales":
                theta[segment.offset : segment.offset + segment.size].clamp_(min=0.0)
        return state


class QuZO(Rule):
    """q <- clip(Q(q - lr / P sum_p g_p u_p / step), -127, 127) for the codes q of weights q times step.

    g_p is taken at q +- Q'(eps z_p / step), u_p = step Q''(eps z_p / step) / eps, where Q, Q' and Q'' round
    stochastically and independently: given z_p, E u_p = z_p whatever Q' was, so E g_p u_p is what it were without
    rounding (with Q'' = Q' its variances would be added to E z z^T). Other entries of theta move as SGD moves them.

    The paper rounds the change of each query by itself; here their sum is rounded, once a step.
    """

    source: ClassVar[str] = "QuZO, arXiv 2502.12346, section 4"
    limits: ClassVar[tuple[Condition, ...]] = (
        Limit("space.kind", ("codes",), "it moves theta by whole codes of an int8 base"),
        Limit("federation.seeds", ("shared", "independent"), "theta is rounded at every step and no sum over seeds"),
        Limit("method.estimator", ("two-point", "one-point", "p-rge", "fzoo"), "others do not round their points"),
        Limit("method.weight_decay", (0.0,), "shrinking a code by parts of a code would only add rounding noise"),
    )
    settings: ClassVar[tuple[str, ...]] = ("eps",)

    def directions(self, step: int, theta: Tensor, state: State) -> Directions:
        return Rounded(self.setup.structure.at(step), self.setup.layout)

    def step(self, theta: Tensor, state: State, records: Records) -> State:
        inner, eps = self.setup.structure.at(records.step), float(self.setup.values["eps"])
        second, (stream,) = Rounded(inner, self.setup.layout, 1), self.streams(records.step, 1).tolist()
        seeds, coefficients = records.seeds[0], self.coefficients(records)[0]
        over_eps = (coefficients / eps).astype(np.float32)
        for segment in self.setup.layout.segments:
            part = theta[segment.offset : segment.offset + segment.size]
            if segment.steps is None:
                for seed, c in zip(seeds.tolist(), coefficients.tolist(), strict=True):
                    inner.axpy(part, seed, c, offset=segment.offset)
                continue
            total = torch.zeros_like(part)
            for seed, c in zip(seeds.tolist(), over_eps.tolist(), strict=True):
                change = second.axpy(torch.zeros_like(part), seed, eps, offset=segment.offset)
                total.add_(change.mul_(c))
            total.clamp_(-2 * LARGEST, 2 * LARGEST)
            part.add_(round_stochastically(total, stream, offset=segment.offset)).clamp_(-LARGEST, LARGEST)
        return state
