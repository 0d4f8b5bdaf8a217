"""Initial values of theta that the base model does not have (a head, adapters), as bytes named by their SHA-256."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedzo.errors import ProtocolError

_COUNT = struct.Struct("<I")
_RANGE = struct.Struct("<QQ")


def pack_values(theta: Tensor, ranges: Sequence[tuple[int, int]]) -> bytes:
    """The values of theta in the ranges (offset, length), as float32."""
    head = _COUNT.pack(len(ranges)) + b"".join(_RANGE.pack(*r) for r in ranges)
    parts = [theta.detach()[offset : offset + length].float().cpu().numpy() for offset, length in ranges]
    return head + b"".join(part.astype("<f4", copy=False).tobytes() for part in parts)


def unpack_values(data: bytes, theta: Tensor) -> None:
    """Writes packed values into theta, in place.

    Raises:
        ProtocolError: the data is cut short or its ranges lie outside theta; theta is then unchanged.
    """
    try:
        (count,) = _COUNT.unpack_from(data)
        ranges = [_RANGE.unpack_from(data, _COUNT.size + i * _RANGE.size) for i in range(count)]
    except struct.error as error:
        raise ProtocolError(f"initial values of {len(data)} bytes end too early") from error
    at = _COUNT.size + count * _RANGE.size
    if len(data) != at + 4 * sum(length for _, length in ranges):
        raise ProtocolError(f"initial values of {len(data)} bytes do not have the length that they state")
    if any(offset + length > theta.numel() for offset, length in ranges):
        raise ProtocolError(f"initial values lie outside theta of {theta.numel()} entries")
    for offset, length in ranges:
        values = np.frombuffer(data[at : at + 4 * length], dtype="<f4").astype(np.float32)
        theta[offset : offset + length] = torch.from_numpy(values).to(theta.device)
        at += 4 * length


def artifact_name(data: bytes) -> str:
    """The SHA-256 that names an artifact, in hex."""
    return hashlib.sha256(data).hexdigest()
