"""Sparse spaces: a mask over the entries of some parameters, and its file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedzo.directions import philox
from fedzo.errors import SpaceError
from fedzo.spaces.space import TrainableSpace, build, matching

METHODS = ("random", "magnitude")
_FORMAT = "fedzo-mask-1"


def sparse(
    model: nn.Module,
    density: float,
    method: str,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    dense: Sequence[str] = (),
) -> TrainableSpace:
    """A share ``density`` of all entries of the matching parameters that have two or more dimensions.

    ``magnitude`` takes the largest absolute values over all those parameters together, ties by (name, index);
    ``random`` draws without replacement, as a pure function of the seed and the sizes. The parameters named in
    ``dense`` (a new head, say) are trainable as a whole and take no part in the draw.

    Raises:
        SpaceError: density is not in (0, 1], the method is unknown, or a name or pattern matches nothing.
    """
    if not 0.0 < density <= 1.0:
        raise SpaceError(f"density is {density}; it must be above 0 and at most 1 (0.001 trains 0.1% of the entries)")
    if method not in METHODS:
        raise SpaceError(f"unknown mask method {method!r}; known: {', '.join(METHODS)}")
    present = dict(model.named_parameters())
    for name in dense:
        if name not in present:
            raise SpaceError(f"dense names parameter {name}, which this model does not have")
    candidates = matching(model, include, exclude)
    shapes = {n: s for n, s in sorted(candidates.items()) if len(s) >= 2 and n not in dense}
    if not shapes:
        raise SpaceError(f"no matrix matches include={list(include)} exclude={list(exclude)}: a mask needs one")
    sizes = [math.prod(shape) for shape in shapes.values()]
    count = max(1, round(density * sum(sizes)))
    if method == "random":
        chosen = choose(sum(sizes), count, seed)
    else:
        chosen = _largest([present[name].detach().reshape(-1) for name in shapes], count)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    cuts = np.searchsorted(chosen, starts)
    parts: list[tuple[str, tuple[int, ...], Tensor | None]]
    parts = [(name, tuple(present[name].shape), None) for name in dense]
    for (name, shape), start, low, high in zip(shapes.items(), starts[:-1], cuts[:-1], cuts[1:], strict=True):
        if high > low:
            parts.append((name, shape, torch.from_numpy(chosen[low:high] - start)))
    return build("sparse", parts)


def choose(population: int, count: int, seed: int) -> npt.NDArray[np.int64]:
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


def _largest(values: list[Tensor], count: int) -> npt.NDArray[np.int64]:
    """Positions, in the concatenation of values, of the ``count`` largest absolute values; ties go to the first."""
    magnitudes = torch.cat([v.float().abs().cpu() for v in values]).numpy()
    threshold = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    above = np.flatnonzero(magnitudes > threshold)
    tied = np.flatnonzero(magnitudes == threshold)[: count - above.size]
    return np.sort(np.concatenate((above, tied))).astype(np.int64)


def save_mask(space: TrainableSpace, path: str | Path, fingerprint: str) -> None:
    """Write a sparse space and the fingerprint of its base model to a safetensors file."""
    from safetensors.torch import save_file

    segments = [[s.name, list(s.shape), s.indices is None] for s in space.segments]
    tensors = {s.name: s.indices.contiguous() for s in space.segments if s.indices is not None}
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "hash": space.hash,
        "segments": json.dumps(segments),
    }
    save_file(tensors, str(path), metadata=metadata)


def load_mask(path: str | Path, model: nn.Module, fingerprint: str) -> TrainableSpace:
    """Read a file of :func:`save_mask`.

    Raises:
        SpaceError: the file is missing, damaged or no mask, or it was made for another model.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise SpaceError(f"mask file {path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SpaceError(f"mask file {path} cannot be read as safetensors: it is damaged or no mask") from error
    if metadata.get("format") != _FORMAT:
        raise SpaceError(f"{path} is not a mask file of format {_FORMAT}")
    if metadata.get("fingerprint") != fingerprint:
        raise SpaceError(
            f"mask for another model: {path} was made for fingerprint {str(metadata.get('fingerprint'))[:16]}, "
            f"this model has {fingerprint[:16]}; make a new mask or load the other model"
        )
    try:
        parts = [
            (str(name), tuple(int(n) for n in shape), None if whole else tensors[name])
            for name, shape, whole in json.loads(metadata["segments"])
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise SpaceError(f"mask file {path} is damaged: its list of segments cannot be read") from error
    space = build("sparse", parts)
    if space.hash != metadata.get("hash"):
        raise SpaceError(f"mask file {path} is damaged: its content does not have the hash that it names")
    space.parameters(model)
    return space
