"""Adam and AdamW: steps divided by the root mean square of past gradient estimates."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from fedzo.optimizers.base import Rule, State, rounded, square_root


class Adam(Rule):
    """theta <- theta - lr m' / (sqrt(v') + eps), m' = m / (1 - b1^t), v' = v / (1 - b2^t), where
    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2 and g = 1/P sum_p g_p z_p + wd theta; t counts the steps applied.

    The state holds m / (1 - b1) and v / (1 - b2), which saves passes over theta: the factors, and those of the bias
    correction, are scalars of the step. It holds t as the powers b1^t and b2^t, float64 by repeated multiplication.
    """

    source: ClassVar[str] = "Kingma and Ba, arXiv 1412.6980, algorithm 1; ZO-Adam of ZO-Bench, arXiv 2402.11592"
    settings: ClassVar[tuple[str, ...]] = ("weight_decay", "beta1", "beta2", "adam_eps")
    state_vectors: ClassVar[int] = 2
    normalised: ClassVar[bool] = True
    decoupled: ClassVar[bool] = False

    def init(self, theta0: Tensor) -> State:
        """Moments of zero [size] on theta0's device, and the powers [2] float64 of t = 0 on the CPU."""
        first, second = torch.zeros_like(theta0), torch.zeros_like(theta0)
        return {"first": first, "second": second, "powers": torch.ones(2, dtype=torch.float64)}

    def move(self, theta: Tensor, state: State, gradient: Tensor, rate: float) -> State:
        betas = [float(self.setup.values[name]) for name in ("beta1", "beta2")]
        state["powers"].mul_(torch.tensor(betas, dtype=torch.float64))
        (b1, b2), (power1, power2) = betas, state["powers"].tolist()
        root = math.sqrt((1.0 - power2) / (1.0 - b2))
        first, second = state["first"], state["second"]
        first.mul_(rounded(b1)).add_(gradient)
        second.mul_(rounded(b2)).add_(gradient.mul_(gradient))
        square_root(gradient.copy_(second)).add_(rounded(float(self.setup.values["adam_eps"]) * root))
        torch.div(first, gradient, out=gradient)
        theta.sub_(gradient.mul_(rounded(rate * root * (1.0 - b1) / (1.0 - power1))))
        return state


class AdamW(Adam):
    """As `adam`, with weight decay apart from the gradient: g = 1/P sum_p g_p z_p, theta <- (1 - lr wd) theta - ..."""

    source: ClassVar[str] = "Loshchilov and Hutter, arXiv 1711.05101, algorithm 2"
    decoupled: ClassVar[bool] = True
