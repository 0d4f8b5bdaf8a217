"""HiSo: directions scaled by a global second moment that the clients' scalars already tell."""

from typing import ClassVar

from torch import Tensor

from fedzo.optimizers.base import Records, State, rounded
from fedzo.optimizers.curvature import Curved


class HiSo(Curved):
    """theta <- theta - lr d, d = 1/P sum_p g_p z_p / sqrt(H); after a round's last step H <- (1 - a) H + a (d^2 + e).

    H is the same in all steps of a round, so that clients and server scale alike whatever the local steps were; the
    last one's d, aggregated, renews it, as in the authors' code. e is ``method.adam_eps``.
    """

    source: ClassVar[str] = "HiSo, arXiv 2506.02370, equation 12; DeComFL's code"
    settings: ClassVar[tuple[str, ...]] = (*Curved.settings, "adam_eps")

    def step(self, theta: Tensor, state: State, records: Records) -> State:
        gradient = self.gradient(theta, state, records)
        if (records.step + 1) % self.setup.local_steps == 0:
            self.renew(state, (gradient * gradient).add_(rounded(float(self.setup.values["adam_eps"]))))
        return self.descend(theta, state, gradient, records.step)
