"""The two-point estimator in one forward pass: P-RGE."""

from dataclasses import dataclass
from typing import ClassVar

from fedzo.estimators.two_point import TwoPoint
from fedzo.limits import Condition, Limit


@dataclass(frozen=True)
class PRGE(TwoPoint):
    """The two-point estimator, all P queries (outer loop) and both signs (inner loop) in one batch of 2 P B examples.

    Its numbers are those of `TwoPoint`; it differs in speed and in memory, as the activations of 2 P batches are held
    at once. A base model that mixes the rows of a batch cannot do it: with ``runtime.evaluation = "auto"`` it is
    evaluated one point at a time, with the same numbers, and with "paired" refused at the first batch.
    """

    source: ClassVar[str] = "P-RGE (MobiZO), arXiv 2409.15520"
    limits: ClassVar[tuple[Condition, ...]] = (
        Limit("runtime.evaluation", ("auto", "paired"), "all points of a step go through the model in one forward"),
    )
    together: ClassVar[bool] = True
