"""What update rules share that scale directions by a curvature of each entry of theta."""

from typing import ClassVar

import torch
from torch import Tensor

from fedzo.directions.base import Directions, Scaled
from fedzo.optimizers.base import Rule, State, rounded, square_root

# Neither no curvature at all nor an overflow ends in entries that leap or stand still for ever.
_LEAST, _MOST = 1e-8, 1e8


class Curved(Rule):
    """Steps along z / sqrt(H), where H is a mean of newer and older curvatures. The papers do not bound it; here it is
    kept within 1e-8 and 1e8.
    """

    settings: ClassVar[tuple[str, ...]] = ("weight_decay", "smoothing")
    state_vectors: ClassVar[int] = 1

    def init(self, theta0: Tensor) -> State:
        """The curvature [size] float32, 1 everywhere."""
        return {"curvature": torch.ones_like(theta0)}

    def directions(self, step: int, theta: Tensor, state: State) -> Directions:
        scale = square_root(state["curvature"].clone()).reciprocal_()
        return Scaled(self.setup.structure.at(step), scale)

    def renew(self, state: State, newest: Tensor) -> None:
        """H <- (1 - a) H + a H' with a = ``method.smoothing``, in place; H' [size] is overwritten."""
        share = float(self.setup.values["smoothing"])
        kept = state["curvature"].mul_(rounded(1.0 - share))
        kept.add_(newest.mul_(rounded(share))).clamp_(_LEAST, _MOST)
