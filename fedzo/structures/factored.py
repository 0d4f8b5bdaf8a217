"""Directions that are low-rank matrices, one for each matrix of parameters."""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fedzo.directions import fill, philox
from fedzo.directions.base import Directions, Filled
from fedzo.errors import ConfigError
from fedzo.limits import CHANGING, ISOTROPIC_BFLOAT16, Condition, Limit
from fedzo.spaces import Segment
from fedzo.structures.base import Frame, Layout, Structure
from fedzo.structures.product import entries, multiply

_FAMILY = "gaussian"


@dataclass(frozen=True)
class Place:
    """A parameter, and where its draws are in two streams: that of a direction's seed, and that of what is kept.

    Attributes:
        segment: its part of theta.
        rows, columns: of the whole parameter as a matrix, row after row; (0, 0) where it is none.
        rank: of the factors; 0 where it is no matrix, and its directions are isotropic.
        own, kept: index of its first draw in the two streams; its draws end where the next parameter's begin.
    """

    segment: Segment
    rows: int
    columns: int
    rank: int
    own: int
    kept: int


@dataclass(frozen=True)
class Factored(Filled):
    """z = left right within a matrix (see `product`), Gaussian elsewhere; of a masked matrix its entries in the mask.

    Attributes:
        places: of all parameters, in the order of theta.
        kept: seed of the stream of what all directions share.
    """

    places: tuple[Place, ...]
    kept: int
    _cache: dict[tuple[int, torch.device], tuple[Tensor, ...]] = field(default_factory=dict, compare=False)

    @staticmethod
    def shape(shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a parameter, all but its last dimension taken together."""
        return math.prod(shape[:-1]), shape[-1] if shape else 1

    @staticmethod
    @abstractmethod
    def draws(rows: int, columns: int, rank: int) -> tuple[int, int]:
        """How many draws a matrix takes from a direction's stream and from that of what is kept."""

    @abstractmethod
    def needed(self, place: Place, rows: range) -> range:
        """The draws, counted from the matrix's first, that some rows of its left factor are made from."""

    @abstractmethod
    def factors(self, place: Place) -> tuple[Tensor, ...]:
        """What all directions share of a matrix, the right factor [rank, columns] float32 last; on the CPU."""

    @abstractmethod
    def left(self, place: Place, rows: range, drawn: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Rows of the left factor, float32 [len(rows), rank], from a direction's draws for them (`needed`)."""

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        asked = list(self._asked(offset, offset + len(out)))
        spans = [self._span(place, part) for place, part in asked]
        if not spans:
            return out
        # One call for all: the draws of neighbours are neighbours.
        first = spans[0].start
        drawn = fill(torch.empty(spans[-1].stop - first, device=out.device), seed, _FAMILY, offset=first)
        for (place, part), span in zip(asked, spans, strict=True):
            begin = place.segment.offset - offset
            target = out[begin + part.start : begin + part.stop]
            self._fill(target, place, part, drawn[span.start - first : span.stop - first])
        return out

    def _asked(self, start: int, stop: int) -> Iterator[tuple[Place, range]]:
        """The parameters that have entries in theta[start:stop], and which of their own."""
        first = bisect_right(self.places, start, key=lambda place: place.segment.offset) - 1
        for place in self.places[max(first, 0) :]:
            begin = place.segment.offset
            if begin >= stop:
                return
            entries = range(max(start - begin, 0), min(stop - begin, place.segment.size))
            if entries:
                yield place, entries

    def _span(self, place: Place, entries: range) -> range:
        """Where in a direction's stream the draws for some entries are."""
        needed = self.needed(place, _rows(place, entries)) if place.rank else entries
        return range(place.own + needed.start, place.own + needed.stop)

    def _fill(self, out: Tensor, place: Place, asked: range, drawn: Tensor) -> None:
        if not place.rank:
            out.copy_(drawn)
            return
        rows, factors = _rows(place, asked), self._factors(place, out.device)
        left, first = self.left(place, rows, drawn, factors), rows.start * place.columns
        if place.segment.indices is None:
            multiply(out, left, factors[-1], asked.start - first)
        else:
            places = (place.segment.indices[asked.start : asked.stop] - first).to(out.device)
            out.copy_(entries(left, factors[-1], places // place.columns, places % place.columns))

    def _factors(self, place: Place, device: torch.device) -> tuple[Tensor, ...]:
        key = place.kept, device
        if key not in self._cache:
            self._cache[key] = tuple(factor.to(device) for factor in self.factors(place))
        return self._cache[key]


def _rows(place: Place, entries: range) -> range:
    """The rows of a matrix that hold some entries of its part of theta."""
    indices = place.segment.indices
    ends = (entries.start, entries.stop - 1) if indices is None else indices[[entries.start, entries.stop - 1]].tolist()
    return range(ends[0] // place.columns, ends[1] // place.columns + 1)


class FactoredStructure(Structure):
    """A structure of `Factored` directions; what they share is drawn anew every ``refresh`` steps.

    The stream of what is kept is named by the frame's seed and step // refresh.

    Raises:
        ConfigError: no trainable parameter is a matrix.
    """

    limits: ClassVar[tuple[Condition, ...]] = (
        CHANGING,
        ISOTROPIC_BFLOAT16,
        Limit("method.directions", (_FAMILY,), "its factors are Gaussian"),
        Limit("space.kind", ("full", "sparse", "adapter", "codes"), "scales are vectors, which have no factors"),
    )
    settings: ClassVar[tuple[str, ...]] = ("rank", "refresh")
    product: ClassVar[type[Factored]]

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        places = tuple(_places(frame.layout, self.product, int(frame.values["rank"])))
        if not any(place.rank for place in places):
            raise ConfigError(
                "low-rank directions need a parameter that is a matrix, and this space has none: train others, or set "
                'method.structure = "isotropic"'
            )
        self._refresh = int(frame.values["refresh"])
        # Two, as a client's local steps may be in the next period when the server's are still in the last.
        self._period = lru_cache(maxsize=2)(lambda period: self.product(places, philox.substream(frame.seed, period)))

    def at(self, step: int) -> Directions:
        return self._period(step // self._refresh)


def _places(layout: Layout, product: type[Factored], rank: int) -> Iterator[Place]:
    own = kept = 0
    for segment in layout.segments:
        rows, columns = product.shape(segment.shape)
        if min(rows, columns) > 1:
            width = min(rank, rows, columns)
            place = Place(segment, rows, columns, width, own, kept)
            drawn = product.draws(rows, columns, width)
        else:
            place, drawn = Place(segment, 0, 0, 0, own, kept), (segment.size, 0)
        yield place
        own, kept = own + drawn[0], kept + drawn[1]


def gaussian(shape: tuple[int, int], seed: int, offset: int) -> Tensor:
    """Draws ``offset`` ... of a Gaussian stream as a matrix, row after row, float32 on the CPU."""
    return fill(torch.empty(math.prod(shape)), seed, _FAMILY, offset=offset).view(shape)
