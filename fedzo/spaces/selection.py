"""Which entries a mask takes: the exact largest of scores that arrive in parts, and draws without replacement."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions import philox
from fedzo.errors import SpaceError

CHUNK = 2**24  # scores looked at together

Indices = npt.NDArray[np.int64]


def shares(sizes: Mapping[str, int], density: float, per_tensor: bool) -> dict[str, int]:
    """How many entries to take from each parameter; all from "" together unless ``per_tensor``.

    The total is round(density * all entries), at least 1; the parts are cut by largest remainder, ties by name.

    Raises:
        SpaceError: density is not in (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise SpaceError(f"density is {density}; it must be above 0 and at most 1 (0.001 trains 0.1% of the entries)")
    total = sum(sizes.values())
    count = max(1, round(density * total))
    if not per_tensor:
        return {"": count}
    # In integers, so that no rounding depends on the machine: size * count = share * total + remainder.
    divided = {name: divmod(size * count, total) for name, size in sizes.items()}
    left = count - sum(share for share, _ in divided.values())
    favoured = set(sorted(divided, key=lambda name: (-divided[name][1], name))[:left])
    return {name: share + (name in favoured) for name, (share, _) in divided.items()}


class Selection:
    """The largest scores over all parameters (or in each, ``per_tensor``), ties by (name, index).

    Scores come in any order and in parts; at most about twice the chosen entries and one chunk are held.

    Args:
        sizes: number of entries of each parameter that takes part.

    Raises:
        SpaceError: density is not in (0, 1].
    """

    def __init__(self, sizes: Mapping[str, int], density: float, per_tensor: bool = False) -> None:
        self._sizes = {name: sizes[name] for name in sorted(sizes)}
        starts = np.cumsum([0, *self._sizes.values()])[:-1]
        self._starts = dict(zip(self._sizes, starts.tolist(), strict=True))
        quotas = shares(self._sizes, density, per_tensor)
        self._tops = {group: _Top(count) for group, count in quotas.items()}
        self._per_tensor = per_tensor

    def add(self, name: str, scores: Tensor, start: int = 0) -> None:
        """Scores [n] of the entries from ``start`` on; a larger one is chosen first.

        Raises:
            SpaceError: a score is not finite.
        """
        top = self._tops[name if self._per_tensor else ""]
        flat = scores.detach().reshape(-1)
        for low in range(0, flat.numel(), CHUNK):
            part = flat[low : low + CHUNK].float()
            if not bool(torch.isfinite(part).all()):
                raise SpaceError(f"a score of parameter {name} is not finite: check the model's weights and the data")
            top.add(part, self._starts[name] + start + low)

    def chosen(self) -> dict[str, Indices]:
        """Sorted flat indices of the parameters of which any were chosen, by name."""
        positions = np.sort(np.concatenate([top.positions() for top in self._tops.values()]))
        return split(positions, self._sizes)


class _Top:
    """The ``count`` largest (score, then lowest position) of what was added."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: list[tuple[npt.NDArray[np.float32], Indices]] = []
        self._held = 0
        self._least = -math.inf  # nothing below can be among the largest

    def add(self, scores: Tensor, start: int) -> None:
        if self._count == 0:
            return
        least = self._least
        if scores.numel() > self._count:
            least = max(least, float(scores.topk(self._count).values[-1]))
        kept = torch.nonzero(scores >= least).reshape(-1)
        self._parts.append((scores[kept].cpu().numpy(), kept.cpu().numpy() + start))
        self._held += kept.numel()
        if self._held >= 2 * self._count:
            self._shrink()

    def positions(self) -> Indices:
        self._shrink()
        return self._parts[0][1] if self._parts else np.zeros(0, np.int64)

    def _shrink(self) -> None:
        if not self._parts:
            return
        scores, positions = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        if scores.size > self._count:
            self._least = float(np.partition(scores, scores.size - self._count)[scores.size - self._count])
            above = np.flatnonzero(scores > self._least)
            tied = np.flatnonzero(scores == self._least)
            first = tied[np.argsort(positions[tied], kind="stable")[: self._count - above.size]]
            kept = np.concatenate((above, first))
            scores, positions = scores[kept], positions[kept]
        self._parts, self._held = [(scores, positions)], scores.size


def draw(sizes: Mapping[str, int], density: float, seed: int, per_tensor: bool = False) -> dict[str, Indices]:
    """A share of all entries drawn without replacement: a pure function of the seed and the sizes.

    Raises:
        SpaceError: density is not in (0, 1].
    """
    ordered = {name: sizes[name] for name in sorted(sizes)}
    quotas = shares(ordered, density, per_tensor)
    if not per_tensor:
        return split(choose(sum(ordered.values()), quotas[""], seed), ordered)
    # Seeds of their own, from blocks that no draw reaches, so that parameters of one size get different indices.
    seeds = philox.words(seed, 4 * len(ordered), offset_blocks=2**63).astype(np.uint64)
    own = (seeds[0::4] | (seeds[1::4] << np.uint64(32))).tolist()
    drawn = {
        name: choose(size, quotas[name], own[number])
        for number, (name, size) in enumerate(ordered.items())
        if quotas[name]
    }
    return drawn


def choose(population: int, count: int, seed: int) -> Indices:
    """``count`` distinct numbers below ``population``, sorted: the first distinct ones that the seed's words give."""
    if 2 * count > population:
        left_out = choose(population, population - count, seed) if count < population else np.empty(0, np.int64)
        return np.setdiff1d(np.arange(population, dtype=np.int64), left_out, assume_unique=True)
    drawn = np.empty(0, np.int64)
    blocks = 0
    while True:
        # A block is four words, so two draws. An eighth more than is missing usually ends it in few passes.
        want = (count - drawn.size) * 9 // 16 + 8
        words = philox.words(seed, 4 * want, offset_blocks=blocks).astype(np.uint64)
        blocks += want
        draws = ((words[0::2] | (words[1::2] << np.uint64(32))) % np.uint64(population)).astype(np.int64)
        drawn = np.concatenate((drawn, draws))
        _, first = np.unique(drawn, return_index=True)
        drawn = drawn[np.sort(first)]
        if drawn.size >= count:
            return np.sort(drawn[:count])


def split(positions: Indices, sizes: Mapping[str, int]) -> dict[str, Indices]:
    """Sorted positions in the concatenation of all parameters as indices of each; those without any are left out."""
    starts = np.concatenate(([0], np.cumsum(list(sizes.values()))))
    cuts = np.searchsorted(positions, starts)
    parts = zip(sizes, starts[:-1], cuts[:-1], cuts[1:], strict=True)
    return {name: positions[low:high] - start for name, start, low, high in parts if high > low}
