"""A mask: which entries of a base model are trainable and what they were, as one artifact that its hash names.

The artifact is a safetensors file of two tensors, ``indices`` (uint8) and ``values`` (float32), for all parameters one
after the other in the order of their names, and one metadata key with the rest as canonical JSON, so that equal masks
are equal bytes. A parameter's indices are sorted and stored as gaps (the first index, then each less its predecessor
less one) in unsigned LEB128: one byte below 128, two below 16384, never more than five.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedzo.errors import SpaceError
from fedzo.spaces.space import shape_of

METHODS = ("random", "magnitude", "sensitive", "forward")
FORMAT = "fedzo-mask-2"
MAX_BYTES = 5  # of an index: gaps below 2**35

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MaskEntry:
    """The chosen entries of one parameter.

    Attributes:
        name: the parameter's name in ``model.named_parameters()``.
        shape: the parameter's shape.
        indices: [n] int64 on CPU, flat and strictly ascending.
        values: [n] float32 on CPU, the base model's values there.

    Raises:
        SpaceError: indices and values do not belong together, are unsorted, out of range or not finite.
    """

    name: str
    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        indices, values = self.indices, self.values
        if indices.dtype != torch.int64 or values.dtype != torch.float32 or indices.ndim != 1:
            raise SpaceError(
                f"mask of {self.name}: indices are {indices.dtype} of shape {tuple(indices.shape)} and values "
                f"{values.dtype}; wanted int64 [n] and float32 [n]"
            )
        if indices.shape != values.shape:
            raise SpaceError(f"mask of {self.name}: {indices.numel()} indices but {values.numel()} values")
        if not bool(torch.isfinite(values).all()):
            raise SpaceError(f"mask of {self.name}: a value is not finite")
        if indices.numel() == 0:
            return
        if not bool((indices.diff() > 0).all()):
            raise SpaceError(f"mask of {self.name}: the indices are not strictly ascending")
        low, high, size = int(indices[0]), int(indices[-1]), math.prod(self.shape)
        if low < 0 or high >= size:
            raise SpaceError(
                f"mask of {self.name}: index {low if low < 0 else high} is out of range; shape {self.shape} has the "
                f"indices 0 to {size - 1}"
            )


@dataclass(frozen=True, eq=False)
class Mask:
    """The trainable entries of a base model; two masks are the same when their hashes are.

    Attributes:
        fingerprint: of the base model that it was made for.
        method: one of :data:`METHODS`.
        settings: what the method was given, as JSON values.
        entries: by name, each name once.
    """

    fingerprint: str
    method: str
    settings: Mapping[str, Any]
    entries: tuple[MaskEntry, ...]

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if names != sorted(set(names)):
            raise SpaceError("the parameters of a mask must be sorted by name, each once")

    @property
    def size(self) -> int:
        """Number of chosen entries."""
        return sum(entry.indices.numel() for entry in self.entries)

    @cached_property
    def hash(self) -> str:
        """SHA-256 hex of :meth:`to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def index_bytes(self) -> int:
        """Bytes that the indices take in the artifact."""
        return sum(encode(entry.indices.numpy()).size for entry in self.entries)

    def to_bytes(self) -> bytes:
        """The artifact; the same bytes whatever the machine and the versions of the libraries."""
        codes = [encode(entry.indices.numpy()) for entry in self.entries]
        indices = np.concatenate([np.zeros(0, np.uint8), *codes]).tobytes()
        values = [entry.values.contiguous().numpy().astype("<f4").tobytes() for entry in self.entries]
        description = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "settings": dict(self.settings),
            "tensors": [
                [entry.name, list(entry.shape), entry.indices.numel(), code.size]
                for entry, code in zip(self.entries, codes, strict=True)
            ],
        }
        floats, ends = 4 * self.size, 4 * self.size + len(indices)
        header = _canonical(
            {
                "__metadata__": {"mask": _canonical(description)},
                "indices": {"data_offsets": [floats, ends], "dtype": "U8", "shape": [len(indices)]},
                "values": {"data_offsets": [0, floats], "dtype": "F32", "shape": [self.size]},
            }
        ).encode()
        header += b" " * (-len(header) % 8)
        return b"".join([len(header).to_bytes(8, "little"), header, *values, indices])

    @staticmethod
    def from_bytes(data: bytes, source: str = "mask") -> "Mask":
        """Read :meth:`to_bytes`; ``source`` names the artifact in messages.

        Raises:
            SpaceError: the data is damaged or no mask, or an index is out of range.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
            length = int.from_bytes(data[:8], "little")
            description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["mask"])
            if description["format"] != FORMAT:
                raise SpaceError(f"{source} has mask format {description['format']!r}, wanted {FORMAT}: make it anew")
            codes, values = tensors["indices"].numpy(), tensors["values"]
            entries, code, value = [], 0, 0
            for name, shape, count, size in description["tensors"]:
                indices = decode(codes[code : code + size], count)
                chosen = values[value : value + count].clone()
                entries.append(MaskEntry(name, tuple(shape), torch.from_numpy(indices), chosen))
                code, value = code + size, value + count
            mask = Mask(description["fingerprint"], description["method"], description["settings"], tuple(entries))
        except SpaceError as error:
            raise SpaceError(f"{source}: {error}") from None
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise SpaceError(f"{source} is damaged or no mask: it cannot be read as format {FORMAT}") from error
        if mask.method not in METHODS or mask.to_bytes() != data:
            raise SpaceError(f"{source} is damaged: it is not in the one form that a mask has")
        return mask

    def save(self, path: str | Path) -> None:
        """Write the artifact; the file is there whole or not at all."""
        path = Path(path)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            scratch.write_bytes(self.to_bytes())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> "Mask":
        """Read a file of :meth:`save`.

        Raises:
            SpaceError: the file is missing, damaged or no mask.
        """
        if not Path(path).is_file():
            raise SpaceError(f"mask file {path} does not exist: make it with `fedzo mask`")
        return Mask.from_bytes(Path(path).read_bytes(), f"mask file {path}")

    def check(self, model: nn.Module, fingerprint: str) -> None:
        """Raise SpaceError unless the mask was made for this base model."""
        if self.fingerprint != fingerprint:
            raise SpaceError(
                f"mask for another model: mask {self.hash[:12]} was made for fingerprint {self.fingerprint[:16]}, this "
                f"model or revision has {fingerprint[:16]}; make a new mask or load the other model"
            )
        present = dict(model.named_parameters())
        for entry in self.entries:
            found = present.get(entry.name)
            if found is None or shape_of(found) != entry.shape:
                state = "is missing" if found is None else f"has shape {shape_of(found)}"
                raise SpaceError(
                    f"mask {self.hash[:12]} needs parameter {entry.name} of shape {entry.shape}, which {state} in this "
                    "model: load it as the kind that the mask was made with, or make a new mask"
                )


def overlap(one: Mask, other: Mask) -> int:
    """How many entries two masks have in common."""
    theirs = {entry.name: entry for entry in other.entries}
    common = 0
    for entry in one.entries:
        if entry.name in theirs and theirs[entry.name].shape == entry.shape:
            shared = np.intersect1d(entry.indices.numpy(), theirs[entry.name].indices.numpy(), assume_unique=True)
            common += shared.size
    return common


def encode(indices: Indices) -> npt.NDArray[np.uint8]:
    """Sorted indices [n] as LEB128 gaps, [bytes] uint8.

    Raises:
        SpaceError: a gap needs more than five bytes.
    """
    gaps = np.diff(indices, prepend=-1) - 1
    lengths = np.ones(gaps.size, np.int64)
    for byte in range(1, MAX_BYTES + 1):
        lengths += gaps >= 1 << (7 * byte)
    if gaps.size and lengths.max() > MAX_BYTES:
        raise SpaceError(f"a gap of {int(gaps.max())} between two indices is above the limit of 2**{7 * MAX_BYTES}")
    ends = np.cumsum(lengths)
    coded = np.zeros(int(ends[-1]) if gaps.size else 0, np.uint8)
    for byte in range(MAX_BYTES):
        chosen = lengths > byte
        more = np.where(lengths[chosen] > byte + 1, 0x80, 0)
        coded[(ends - lengths)[chosen] + byte] = ((gaps[chosen] >> (7 * byte)) & 0x7F) | more
    return coded


def decode(coded: npt.NDArray[np.uint8], count: int) -> Indices:
    """The ``count`` indices of :func:`encode`'s bytes.

    Raises:
        ValueError: the bytes are not ``count`` numbers of at most five bytes each.
    """
    ends = np.flatnonzero(coded < 0x80) + 1
    lengths = np.diff(ends, prepend=0)
    if ends.size != count or (ends[-1] if count else 0) != coded.size or lengths.max(initial=0) > MAX_BYTES:
        raise ValueError(f"{coded.size} bytes are not {count} indices")
    gaps = np.zeros(count, np.int64)
    for byte in range(MAX_BYTES):
        chosen = lengths > byte
        gaps[chosen] |= (coded[(ends - lengths)[chosen] + byte].astype(np.int64) & 0x7F) << (7 * byte)
    return np.cumsum(gaps + 1) - 1


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
