"""Directions among the codes of an int8 base: any directions, rounded stochastically to whole codes.

QuZO, arXiv 2502.12346: u_1 = Q(u) perturbs, u_2 = Q'(u) updates, two independent stochastic roundings of one u.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions import philox, round_stochastically
from fedzo.directions.base import Directions
from fedzo.spaces import Segment
from fedzo.spaces.quantised import LARGEST
from fedzo.structures.base import Layout

# Block of a direction's stream with the seeds of its roundings; the direction itself has the blocks below.
_ROUNDINGS = 2**63


@dataclass(frozen=True)
class Rounded:
    """theta + c z where theta holds codes q of weights q times step: clip(q + R(c z / step), -127, 127).

    R rounds to whole numbers stochastically (`directions.round_stochastically`), so that its mean is c z / step, and
    minus c gives minus the same. Its stream is a function of the direction's seed and of ``which``: two instances round
    one direction independently. Where theta holds other values they move as the inner directions say.

    Attributes:
        inner: the directions in the weights themselves.
        layout: names, places and steps of theta's entries.
        which: 0 or 1.
    """

    inner: Directions
    layout: Layout
    which: int = 0

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        """What a step of 1 from codes of zero is: the directions are no fixed vector, their rounding knows its step."""
        return self.axpy(out.zero_(), seed, 1.0, offset=offset)

    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        """As `Directions.axpy`, with whole codes where theta holds codes."""
        out = theta if out is None else out
        stop, stream = offset + len(theta), self._stream(seed)
        for segment in self.layout.segments:
            first, last = max(offset, segment.offset), min(stop, segment.offset + segment.size)
            if first >= last:
                continue
            here, there = theta[first - offset : last - offset], out[first - offset : last - offset]
            if segment.steps is None:
                self.inner.axpy(here, seed, coefficient, offset=first, out=there)
                continue
            moved = self.inner.axpy(torch.zeros_like(here), seed, coefficient, offset=first)
            moved.div_(_steps(segment, first - segment.offset, len(here), here.device))
            # More than the whole range of codes is clipped anyway; beyond 2**24 there would be no rounding.
            round_stochastically(moved.clamp_(-2 * LARGEST, 2 * LARGEST), stream, offset=first)
            torch.add(here, moved, out=there).clamp_(-LARGEST, LARGEST)
        return out

    def replay(self, theta: Tensor, seeds: npt.NDArray[np.uint64], coefficients: npt.NDArray[np.float32]) -> Tensor:
        """As `Directions.replay`: one record after the other, each rounded."""
        for seed, coefficient in zip(seeds.tolist(), coefficients.tolist(), strict=True):
            self.axpy(theta, seed, coefficient)
        return theta

    def _stream(self, seed: int) -> int:
        low, high = philox.words(seed, 4, _ROUNDINGS)[2 * self.which :][:2].tolist()
        return int(low) | int(high) << 32


def _steps(segment: Segment, start: int, count: int, device: torch.device) -> Tensor:
    """[count] float32: the steps of entries start ... of a segment; infinite in a row of zeros, which does not move."""
    assert segment.steps is not None
    rows = torch.arange(start, start + count) // (segment.size // len(segment.steps))
    steps = segment.steps[rows]
    return torch.where(steps == 0, torch.inf, steps).to(device)
