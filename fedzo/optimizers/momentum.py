"""Momentum: a decaying sum of past gradient estimates."""

from typing import ClassVar

import torch
from torch import Tensor

from fedzo.optimizers.base import Rule, State, rounded


class Momentum(Rule):
    """m <- mu m + g, theta <- theta - lr m, where g = 1/P sum_p g_p z_p + wd theta; with Nesterov - lr (g + mu m).

    That is torch.optim.SGD without dampening. In the long run a step is 1 / (1 - mu) times plain SGD's.
    """

    source: ClassVar[str] = "ZO-SGD-MMT of ZO-Bench, arXiv 2402.11592; Sutskever et al. 2013, equations 3 and 4"
    settings: ClassVar[tuple[str, ...]] = ("weight_decay", "momentum", "nesterov")
    state_vectors: ClassVar[int] = 1
    decoupled: ClassVar[bool] = False

    @property
    def gain(self) -> float:
        return 1.0 / (1.0 - float(self.setup.values["momentum"]))

    def init(self, theta0: Tensor) -> State:
        """m = 0, so that the first step has m = g."""
        return {"momentum": torch.zeros_like(theta0)}

    def move(self, theta: Tensor, state: State, gradient: Tensor, rate: float) -> State:
        mu, m = rounded(float(self.setup.values["momentum"])), state["momentum"]
        m.mul_(mu).add_(gradient)
        ahead = gradient.add_(m * mu) if self.setup.values["nesterov"] else m
        theta.sub_(torch.mul(ahead, rounded(rate), out=gradient))
        return state
