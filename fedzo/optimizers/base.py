"""What an update rule is: records in, theta out, the same bits for whoever applies them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Seeds = npt.NDArray[np.uint64]
Scalars = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Records:
    """The records of S consecutive steps.

    Attributes:
        step: index of the first of them in the run.
        seeds: uint64 [S, R].
        scalars: float32 [S, R]: projected gradients, already weighted so that a step's gradient estimate is
            ``1/P sum_r scalars[s, r] z(seeds[s, r])``.
    """

    step: int
    seeds: Seeds
    scalars: Scalars

    def __post_init__(self) -> None:
        if self.seeds.shape != self.scalars.shape or self.seeds.ndim != 2:
            raise ValueError(f"seeds {self.seeds.shape} and scalars {self.scalars.shape} must have one shape [S, R]")


class UpdateRule(Protocol):
    """Turns records into theta. State is part of theta's function: same records, same state, bit for bit."""

    def init(self, theta0: Tensor) -> object:
        """The state before the first step, for theta0 [size], float32 or bfloat16."""
        ...

    def apply(self, theta: Tensor, state: object, records: Sequence[Records]) -> object:
        """Moves theta in place along the records, in order, and returns the new state."""
        ...

    def local(self) -> "UpdateRule":
        """The rule of a client's local steps between two rounds."""
        ...

    def snapshot(self, theta: Tensor, state: object) -> bytes:
        """Everything that a holder of theta0 needs to stand at this (theta, state), as little-endian bytes."""
        ...

    def snapshot_bytes(self, theta: Tensor) -> int:
        """The length of a snapshot of a theta of this size and dtype."""
        ...

    def restore(self, theta: Tensor, state: object, data: bytes) -> object:
        """Inverse of `snapshot`: sets theta in place, returns the state.

        Raises:
            ProtocolError: the data has another length than `snapshot_bytes`.
        """
        ...
