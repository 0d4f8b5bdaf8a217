"""MeZO-SVRG's estimator: two-point estimates less those at an anchor."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedzo.estimators.base import Estimate, Estimator, Query
from fedzo.estimators.two_point import TwoPoint
from fedzo.evaluation import Request
from fedzo.limits import CLIENT_MODES, Condition, Limit


@dataclass(frozen=True)
class ControlVariate(Estimator):
    """g = g(theta) - g(anchor), two-point estimates along the same direction, for each example of a batch; at an anchor
    step, every ``method.anchor_every`` steps from the first, g = g(theta) for each of a client's examples.

    The paper's code draws another direction for g(anchor). With the same one the difference vanishes as theta nears the
    anchor, and one scalar a direction says it all.

    Every example takes part in an anchor step, so no subsampling hides one from those who see its scalars: the privacy
    modes that protect single examples do not cover it, those that protect clients do.
    """

    source: ClassVar[str] = "MeZO-SVRG, arXiv 2404.08080, algorithm 1"
    limits: ClassVar[tuple[Condition, ...]] = (
        Limit("method.optimizer", ("svrg",), "no other update rule keeps an anchor"),
    )
    settings: ClassVar[tuple[str, ...]] = ("anchor_every",)
    private: ClassVar[tuple[str, ...]] = CLIENT_MODES

    @property
    def _every(self) -> int:
        return int(self.values["anchor_every"])

    def forwards(self, queries: int) -> float:
        """As `Estimator.forwards`; that of an anchor step is over all examples (`evaluated` counts them)."""
        return 2 * queries * (2 * self._every - 1) / self._every

    def evaluated(self, queries: int, batch_size: int, total: int) -> float:
        return 2 * queries * (total + 2 * (self._every - 1) * min(batch_size, total)) / self._every

    def examples(self, step: int, batch_size: int, total: int) -> int:
        return batch_size if step % self._every else total

    def estimate(self, query: Query) -> Generator[Request, Tensor, Estimate]:
        here = yield from TwoPoint().estimate(query)
        if query.anchor is None:
            return here
        there = yield from TwoPoint().estimate(replace(query, theta=query.anchor))
        return Estimate(here.projected - there.projected, here.loss)
