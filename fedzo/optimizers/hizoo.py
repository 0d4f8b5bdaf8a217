"""HiZOO: directions scaled by curvatures that a third loss tells."""

from typing import ClassVar

import torch
from torch import Tensor

from fedzo.limits import ONE_LOCAL_STEP, Condition, Limit
from fedzo.optimizers.base import Records, Rule, State, rounded
from fedzo.optimizers.curvature import Curved


class HiZOO(Curved):
    """H <- (1 - a) H + a / P sum_p |h_p| H z_p^2, then theta <- theta - lr / P sum_p g_p z_p / sqrt(H).

    g_p and h_p are those of `fedzo.estimators.ThreePoint` along z_p / sqrt(H) for the older H; the step takes the newer
    one, as the paper's algorithm does. |h_p| is taken of the clients' mean: that is the paper's on the union of their
    batches (with independent seeds of each client's own, weighted). Of a convex quadratic, H settles in proportion to
    the Hessian's diagonal: there, its expected change is a factor common to all entries.
    """

    source: ClassVar[str] = "HiZOO, arXiv 2402.15173, algorithm 1"
    limits: ClassVar[tuple[Condition, ...]] = (
        *Rule.limits,
        ONE_LOCAL_STEP,
        Limit("method.estimator", ("hizoo",), "it needs curvatures, the second scalars of that estimator"),
        Limit("method.directions", ("gaussian",), "the square of a random sign is 1 whatever the entry's curvature"),
    )

    def step(self, theta: Tensor, state: State, records: Records) -> State:
        inner, newest = self.setup.structure.at(records.step), torch.zeros_like(theta)
        for seed, h in zip(records.seeds[0].tolist(), records.second[0].tolist(), strict=True):
            z = inner.fill(torch.empty_like(theta), seed)
            newest.add_(z.mul_(z).mul_(rounded(abs(h) / self.setup.queries)))
        self.renew(state, newest.mul_(state["curvature"]))
        return super().step(theta, state, records)
