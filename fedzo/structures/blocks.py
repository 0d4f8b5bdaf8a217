"""Theta in blocks, by the names of its parameters: a model's layers, and the modules around them."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedzo.directions import fill, finite_coefficient
from fedzo.directions.base import Filled
from fedzo.structures.base import Layout

# A name up to its first number: the layer of a list of layers.
_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")

# (start, stop, factor): entries theta[start:stop], and what they are multiplied by.
Part = tuple[int, int, float]


@dataclass(frozen=True)
class Block:
    """The parameters of one module.

    Attributes:
        name: of the module.
        layer: it is a member of a list of modules.
        ranges: (start, stop) in theta, ascending, neighbours joined.
    """

    name: str
    layer: bool
    ranges: tuple[tuple[int, int], ...]

    def parts(self, factor: float) -> list[Part]:
        """The ranges, each with this factor, rounded to float32."""
        return [(start, stop, finite_coefficient(factor)) for start, stop in self.ranges]


def blocks_of(layout: Layout) -> tuple[Block, ...]:
    """The blocks of theta, each parameter in one of them, in the order of their first entries.

    A layer is named by a parameter's name up to the first number ("model.decoder.layers.3"). The modules around it, up
    to the model itself, are taken apart, and each other child of theirs is a block ("model.decoder.embed_tokens",
    "lm_head"): those that ZO-Bench has for OPT. Without layers the model's own children are the blocks.
    """
    layers = {found[0] for segment in layout.segments if (found := _LAYER.match(segment.name))}
    around = {""} | {layer[:dot] for layer in layers for dot in range(len(layer)) if layer[dot] == "."}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for segment in layout.segments:
        parts = segment.name.split(".")
        depth = max(depth for depth in range(len(parts)) if ".".join(parts[:depth]) in around)
        own = ranges.setdefault(".".join(parts[: depth + 1]), [])
        start = own.pop()[0] if own and own[-1][1] == segment.offset else segment.offset
        own.append((start, segment.offset + segment.size))
    return tuple(Block(name, name in layers, tuple(own)) for name, own in ranges.items())


@dataclass(frozen=True)
class Confined(Filled):
    """Isotropic entries times a factor within some parts of theta; the other entries are 0, and stay as they are.

    Attributes:
        family: of the isotropic entries.
        parts: seed -> the parts, ascending.
    """

    family: str
    parts: Callable[[int], Sequence[Part]]

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        out.zero_()
        for start, stop, factor in self._within(seed, offset, len(out)):
            fill(out[start - offset : stop - offset], seed, self.family, offset=start).mul_(factor)
        return out

    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        out = theta if out is None else out.copy_(theta)
        for start, stop, _ in self._within(seed, offset, len(out)):
            super().axpy(out[start - offset : stop - offset], seed, coefficient, offset=start)
        return out

    def _within(self, seed: int, offset: int, length: int) -> Iterator[Part]:
        """What of the parts is in theta[offset : offset + length]."""
        for start, stop, factor in self.parts(seed):
            first, last = max(start, offset), min(stop, offset + length)
            if first < last:
                yield first, last, factor
