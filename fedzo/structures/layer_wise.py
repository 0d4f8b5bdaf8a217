"""Layer-wise directions: each query leaves most of the layers alone."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from fedzo.directions import philox
from fedzo.directions.base import Directions
from fedzo.errors import ConfigError
from fedzo.limits import ISOTROPIC_BFLOAT16, Condition
from fedzo.spaces.selection import choose
from fedzo.structures.base import Frame, Structure
from fedzo.structures.blocks import Confined, Part, blocks_of


class LayerWise(Structure):
    """z = sqrt(L / n) u in n of the L layers, drawn by the seed, 0 in the others, and u elsewhere, u isotropic.

    n is ``layer_share`` of the layers, rounded, at least 1. What is in no layer (embeddings, the final norm, a head)
    is in every direction. The paper does not scale by sqrt(L / n), so that its learning rate for the layers is L / n
    times ours, and draws the layers once a step; here each query has its own.

    Forming a point and a step cost the entries that move, not all: worth it where that is a large part of a step's
    time, as with large models and short inputs. Beside theta it holds nothing.

    Raises:
        ConfigError: no trainable parameter is in a layer.
    """

    source: ClassVar[str] = "LeZO, arXiv 2410.09823"
    limits: ClassVar[tuple[Condition, ...]] = (ISOTROPIC_BFLOAT16,)
    settings: ClassVar[tuple[str, ...]] = ("layer_share",)
    steady: ClassVar[bool] = True

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        blocks = blocks_of(frame.layout)
        self.layers = tuple(block for block in blocks if block.layer)
        self._always = [part for block in blocks if not block.layer for part in block.parts(1.0)]
        if not self.layers:
            raise ConfigError(
                'method.structure = "layer-wise" needs parameters of layers, whose names have a number, found only '
                f'{", ".join(block.name for block in blocks[:3]) or "none"}: train others, or set "isotropic"'
            )
        self._count = max(1, round(float(frame.values["layer_share"]) * len(self.layers)))

    def at(self, step: int) -> Directions:
        return Confined(self.frame.family, self._parts)

    def moved(self, seed: int) -> tuple[int, ...]:
        """Which of the layers a direction moves, ascending."""
        return _drawn(len(self.layers), self._count, seed)

    def _parts(self, seed: int) -> Sequence[Part]:
        factor = math.sqrt(len(self.layers) / self._count)
        drawn = [part for i in self.moved(seed) for part in self.layers[i].parts(factor)]
        return sorted(self._always + drawn)


@lru_cache(maxsize=1024)
def _drawn(total: int, count: int, seed: int) -> tuple[int, ...]:
    return tuple(choose(total, count, philox.substream(seed, 1)).tolist())
