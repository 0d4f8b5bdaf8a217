"""Block-wise directions: each query moves one block of theta alone."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fedzo.directions import philox
from fedzo.directions.base import Directions
from fedzo.errors import ConfigError
from fedzo.limits import ISOTROPIC_BFLOAT16, SHARED_OUT, Condition
from fedzo.spaces.selection import choose
from fedzo.structures.base import Frame, Seeds, Structure
from fedzo.structures.blocks import Confined, Part, blocks_of


class BlockWise(Structure):
    """z = sqrt(B) u in one of B blocks, 0 elsewhere, u isotropic; the block is the seed modulo B.

    The blocks are the layers and the modules around them (`blocks_of`). The P queries of a step take different ones,
    and with P > B all as evenly as can be. With P = B the step is the paper's, the sum over the blocks of each one's
    derivative along its own u_b times u_b (with eps / sqrt(B) for the paper's eps); its variance is then about
    sum_b d_b |grad_b|^2 for blocks of d_b entries, that of isotropic directions d / B |grad|^2. So it is worth it where
    the small blocks have the large gradients, with queries for all blocks. Beside theta it holds nothing.

    Raises:
        ConfigError: theta is one block.
    """

    source: ClassVar[str] = "ZO-Bench, arXiv 2402.11592, section 5"
    limits: ClassVar[tuple[Condition, ...]] = (SHARED_OUT, ISOTROPIC_BFLOAT16)
    steady: ClassVar[bool] = True

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        self.blocks = blocks_of(frame.layout)
        if len(self.blocks) < 2:
            raise ConfigError(
                f'method.structure = "block-wise" needs parameters of two modules or more, found only '
                f'{", ".join(block.name for block in self.blocks) or "none"}: train more, or set "isotropic"'
            )

    def at(self, step: int) -> Directions:
        return Confined(self.frame.family, self._parts)

    def assign(self, seeds: Seeds) -> Seeds:
        """The multiples of B below the seeds, plus the blocks: each floor(P / B) times, and P mod B drawn ones more."""
        count, total = len(self.blocks), len(seeds)
        more = choose(count, total % count, philox.substream(seeds[0], 1))
        blocks = np.concatenate([np.tile(np.arange(count), total // count), more]).astype(np.uint64)
        below = np.minimum(seeds // np.uint64(count), np.uint64(2**64 // count - 1)) * np.uint64(count)
        assigned: Seeds = below + blocks
        return assigned

    def _parts(self, seed: int) -> Sequence[Part]:
        return self.blocks[seed % len(self.blocks)].parts(math.sqrt(len(self.blocks)))
