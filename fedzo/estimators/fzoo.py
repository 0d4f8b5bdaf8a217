"""One-point differences normalised by the spread of the losses: FZOO."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedzo.estimators.one_point import OnePoint
from fedzo.limits import CLIENT_MODES, AtLeast, Condition, Limit


@dataclass(frozen=True)
class FZOO(OnePoint):
    """g = (loss(theta + eps z) - loss(theta)) / sigma, for each example and direction.

    sigma is the standard deviation (P - 1 in its denominator) of the P losses at theta + eps z, means over the batch:
    about eps times the gradient's norm, so that steps are those of normalised gradient descent, whatever eps. The paper
    divides by eps once more: its learning rate is eps times ours. Where all P losses are equal, g is zero.

    sigma couples the examples of a batch: one of them changes the scalars of all, and to clip each example's does not
    bound its influence. So of the privacy modes only those of clients as a whole cover it.
    """

    source: ClassVar[str] = "FZOO, arXiv 2506.09034"
    limits: ClassVar[tuple[Condition, ...]] = (
        AtLeast("method.queries", 2, "it divides by the standard deviation of the queries' losses"),
        Limit("method.directions", ("rademacher",), "its directions are random signs"),
    )
    private: ClassVar[tuple[str, ...]] = CLIENT_MODES
    normalised: ClassVar[bool] = True

    def scale(self, losses: npt.NDArray[np.float64], eps: float) -> float:
        sigma = float(losses.mean(axis=1).std(ddof=1))
        return np.inf if sigma == 0.0 else sigma
