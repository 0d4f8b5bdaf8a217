"""What a direction structure is: which directions a step has, and which seeds name them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedzo.directions.base import Directions
from fedzo.limits import PRIVACY_MODES, Condition, Value
from fedzo.spaces import Segment, TrainableSpace

Seeds = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Layout:
    """Where the model's parameters are in theta: what a structure or an update rule needs to know of a space."""

    segments: tuple[Segment, ...]

    @staticmethod
    def of(space: TrainableSpace) -> "Layout":
        return Layout(space.segments)

    @staticmethod
    def flat(size: int) -> "Layout":
        """One vector without structure."""
        return Layout((Segment("theta", (size,), 0, size),))

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)


@dataclass(frozen=True)
class Frame:
    """What a structure is made from.

    Attributes:
        family: of the isotropic directions that it is made of.
        layout: of theta.
        seed: 64 bits; decides what changes with the step, the same for all parties.
        values: the settings of the method by name.
    """

    family: str = "rademacher"
    layout: Layout = field(default_factory=lambda: Layout(()))
    seed: int = 0
    values: Mapping[str, Value] = field(default_factory=dict)


class Structure(ABC):
    """Turns a step and a seed into a direction z, scaled so that E z z^T is the identity where that can be.

    Attributes:
        source: paper and equation.
        limits: conditions on the configuration under which it is valid.
        settings: names of the keys of ``method`` that it reads, in `Frame.values`.
        private: privacy modes whose guarantee holds with it.
        steady: the directions are those of step 0 at every step.
    """

    source: ClassVar[str]
    limits: ClassVar[tuple[Condition, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    private: ClassVar[tuple[str, ...]] = PRIVACY_MODES
    steady: ClassVar[bool] = False

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    @abstractmethod
    def at(self, step: int) -> Directions:
        """The directions of a step (0, 1, ... of the run), a function of the frame and the step alone."""

    def assign(self, seeds: Seeds) -> Seeds:
        """The seeds [P] that a step's queries use instead of these uniform ones, for a structure that splits its work
        among them; a function of the frame and these seeds alone.
        """
        return seeds
