"""MeZO-SVRG: a full gradient estimate at an anchor, corrected by batches."""

from typing import ClassVar

import torch
from torch import Tensor

from fedzo.limits import ONE_LOCAL_STEP, Condition, Limit
from fedzo.optimizers.base import Records, Rule, State, rounded


class SVRG(Rule):
    """theta <- theta - lr (1/P sum_p g_p z_p + full), g_p the differences of `fedzo.estimators.ControlVariate`.

    At an anchor step, every ``method.anchor_every`` steps from the first, anchor <- theta, full <- 1/P sum_p g_p z_p
    with g_p over all data of the clients asked, and theta <- theta - lr r full, where r = ``method.anchor_rate`` is the
    ratio of the paper's two learning rates. A round below its quorum that was to be an anchor leaves the old one; if it
    was the first, full is still 0 and theta waits for the next.
    """

    source: ClassVar[str] = "MeZO-SVRG, arXiv 2404.08080, algorithm 1"
    limits: ClassVar[tuple[Condition, ...]] = (
        *Rule.limits,
        ONE_LOCAL_STEP,
        Limit("method.estimator", ("svrg",), "it needs differences to its anchor, the scalars of that estimator"),
    )
    settings: ClassVar[tuple[str, ...]] = ("weight_decay", "anchor_every", "anchor_rate")
    state_vectors: ClassVar[int] = 2

    def init(self, theta0: Tensor) -> State:
        """The anchor and the full gradient estimate there, [size] float32 each."""
        return {"anchor": theta0.clone(), "full": torch.zeros_like(theta0)}

    def anchor(self, step: int, state: State) -> Tensor | None:
        return state["anchor"] if step % int(self.setup.values["anchor_every"]) else None

    def step(self, theta: Tensor, state: State, records: Records) -> State:
        gradient = self.gradient(theta, state, records)
        if self.anchor(records.step, state) is None:
            state["anchor"].copy_(theta)
            state["full"].copy_(gradient)
            gradient.mul_(rounded(float(self.setup.values["anchor_rate"])))
        else:
            gradient.add_(state["full"])
        return self.descend(theta, state, gradient, records.step)
