"""What an estimator is: queries in, projected gradients out."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedzo.directions.base import Directions
from fedzo.evaluation import Batch, Request
from fedzo.limits import PRIVACY_MODES, Condition, Value


@dataclass(frozen=True)
class Query:
    """What the queries of one step are made on.

    Attributes:
        theta: [size].
        batch: B examples.
        seeds: of the P directions.
        eps: distance of the points from theta in units of z.
        step: index of the step in the run.
        directions: seed -> z at this step.
        anchor: [size], an earlier theta, for an estimator whose update rule keeps one; else None.
    """

    theta: Tensor
    batch: Batch
    seeds: tuple[int, ...]
    eps: float
    step: int
    directions: Directions
    anchor: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """What the queries of one step yielded.

    Attributes:
        projected: float64 [P, B], the projected gradient of each example along each direction. Per example, so that
            a privacy mechanism can clip each before they are averaged.
        loss: mean loss over the batch and the points evaluated.
        second: float64 [P, B], a second scalar of each direction, for estimators with ``scalars`` = 2; else None.
    """

    projected: npt.NDArray[np.float64]
    loss: float
    second: npt.NDArray[np.float64] | None = None

    @property
    def scalars(self) -> npt.NDArray[np.float64]:
        """float64 [C P, B]: all scalars of each example, the second ones last."""
        return self.projected if self.second is None else np.concatenate([self.projected, self.second])

    @staticmethod
    def joined(parts: "Sequence[Estimate]") -> "Estimate":
        """That of a step made on several batches, one after the other."""
        if len(parts) == 1:
            return parts[0]
        seconds = [part.second for part in parts if part.second is not None]
        return Estimate(
            np.concatenate([part.projected for part in parts], axis=1),
            float(np.average([part.loss for part in parts], weights=[part.projected.shape[1] for part in parts])),
            np.concatenate(seconds, axis=1) if seconds else None,
        )


@dataclass(frozen=True)
class Estimator(ABC):
    """Asks for losses and turns them into projected gradients; never calls a model.

    Attributes:
        source: paper and equation.
        limits: conditions on the configuration under which it is valid.
        settings: names of the keys of ``method`` that it reads, in ``values``.
        private: privacy modes whose guarantee holds with it.
        scalars: that a query yields.
        normalised: a scalar's size does not depend on the gradient's.
        values: the settings by name.
    """

    source: ClassVar[str]
    limits: ClassVar[tuple[Condition, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    private: ClassVar[tuple[str, ...]] = PRIVACY_MODES
    scalars: ClassVar[int] = 1
    normalised: ClassVar[bool] = False

    values: Mapping[str, Value] = field(default_factory=dict)

    @abstractmethod
    def forwards(self, queries: int) -> float:
        """Passes over its examples that a step with this many queries takes (on average over a run's steps)."""

    def examples(self, step: int, batch_size: int, total: int) -> int:
        """How many of a client's ``total`` examples a step is made on, a batch at a time."""
        return batch_size

    def evaluated(self, queries: int, batch_size: int, total: int) -> float:
        """Examples that pass forward in a step on a client with ``total`` of them (on average over a run's steps)."""
        return self.forwards(queries) * min(batch_size, total)

    @abstractmethod
    def estimate(self, query: Query) -> Generator[Request, Tensor, Estimate]:
        """Yields requests, is sent their answers (see `LossRequest`, `DerivativeRequest`); P = len(query.seeds)."""
