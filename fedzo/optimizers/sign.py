"""Sign descent: all entries of theta move equally far."""

from typing import ClassVar

from torch import Tensor

from fedzo.optimizers.base import Rule, State, rounded


class Sign(Rule):
    """theta <- (1 - lr wd) theta - lr sign(g), where g = 1/P sum_p g_p z_p and sign(0) = 0.

    The sign is that of the clients' mean estimate. A step of one record along a Rademacher direction is
    lr sign(g_1) z_1; it takes several, of more queries or of independent seeds, to move theta along anything else.
    """

    source: ClassVar[str] = "ZO-signSGD, Liu et al., ICLR 2019, algorithm 1; ZO-SGD-Sign of ZO-Bench, arXiv 2402.11592"
    normalised: ClassVar[bool] = True

    def move(self, theta: Tensor, state: State, gradient: Tensor, rate: float) -> State:
        theta.sub_(gradient.sign_().mul_(rounded(rate)))
        return state
