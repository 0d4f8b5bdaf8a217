"""The reference implementation of directions: plain torch in int64 arithmetic, the same bits on every device.

Arguments are those of ``fedzo.directions`` after its checks. Work goes in chunks, so that temporary memory stays at
some tens of megabytes however long theta is.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions import normal
from fedzo.directions.philox import KEY_STEPS, MASK32, MULTIPLIERS, ROUNDS

CHUNK = 1 << 20  # elements


def _words(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Words of blocks first ... first + count - 1 as int64 [count, 4]."""
    block = torch.arange(first, first + count, device=device)
    zero = torch.zeros_like(block)
    c0, c1, c2, c3 = block & MASK32, block >> 32, zero, zero
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(ROUNDS):
        # The products wrap around in int64; both halves of their 64 bits are right all the same.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & MASK32) ^ c1 ^ k0, product1 & MASK32
        c2, c3 = ((product0 >> 32) & MASK32) ^ c3 ^ k1, product0 & MASK32
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK32, (k1 + KEY_STEPS[1]) & MASK32
    return torch.stack((c0, c1, c2, c3), dim=1)


def _direction(seed: int, family: str, offset: int, size: int, device: torch.device) -> Tensor:
    """z[offset : offset + size] as float32 [size]."""
    if family == "gaussian":
        return torch.from_numpy(normal.table().copy()).to(device)[_halves(seed, offset, size, device)]
    first, last = offset // 128, (offset + size - 1) // 128
    words = _words(seed, first, last - first + 1, device)
    bits = (words[:, :, None] >> torch.arange(32, device=device)) & 1
    return bits.reshape(-1)[offset - 128 * first :][:size].to(torch.float32) * 2 - 1


@torch.no_grad()
def fill(out: Tensor, seed: int, family: str, *, offset: int = 0) -> Tensor:
    for start in range(0, len(out), CHUNK):
        part = out[start : start + CHUNK]
        part.copy_(_direction(seed, family, offset + start, len(part), out.device))
    return out


@torch.no_grad()
def axpy(
    theta: Tensor, seed: int, coefficient: float, family: str, *, offset: int = 0, out: Tensor | None = None
) -> Tensor:
    out = theta if out is None else out
    for start in range(0, len(theta), CHUNK):
        part = theta[start : start + CHUNK]
        z = _direction(seed, family, offset + start, len(part), theta.device)
        step = z * coefficient  # an operation of its own: rounded before the sum, never fused with it
        torch.add(part, step, out=out[start : start + CHUNK])
    return out


@torch.no_grad()
def replay(
    theta: Tensor,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    family: str,
    *,
    offset: int = 0,
) -> Tensor:
    for start in range(0, len(theta), CHUNK):
        part = theta[start : start + CHUNK]
        for seed, coefficient in zip(seeds.tolist(), coefficients.tolist(), strict=True):
            axpy(part, seed, coefficient, family, offset=offset + start)
    return theta


@torch.no_grad()
def replay_rounded(
    theta: Tensor,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    family: str,
    rounding: npt.NDArray[np.uint64],
    *,
    offset: int = 0,
) -> Tensor:
    for start in range(0, len(theta), CHUNK):
        part = theta[start : start + CHUNK].view(torch.int16)
        bits = part.to(torch.int32) << 16  # torch's own conversions change NaNs
        values = bits.view(torch.float32)
        for step, stream in enumerate(rounding.tolist()):
            replay(values, seeds[step], coefficients[step], family, offset=offset + start)
            _round(values, _halves(stream, offset + start, len(part), theta.device))
        part.copy_(bits >> 16)
    return theta


@torch.no_grad()
def round_stochastically(values: Tensor, seed: int, *, offset: int = 0) -> Tensor:
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        first, last = (offset + start) // 4, (offset + start + len(part) - 1) // 4
        words = _words(seed, first, last - first + 1, values.device).reshape(-1)
        drawn = words[offset + start - 4 * first :][: len(part)]
        size = part.abs()
        whole = size.floor()
        up = drawn < ((size - whole).double() * 2.0**32).long()
        part.copy_((whole + up.float()).copysign(part))
    return values


def _halves(seed: int, offset: int, size: int, device: torch.device) -> Tensor:
    """Half-words offset ... offset + size - 1 of a stream, the low half of a word first: int64 [size]."""
    first, last = offset // 8, (offset + size - 1) // 8
    words = _words(seed, first, last - first + 1, device)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).reshape(-1)[offset - 8 * first :][:size]


def _round(values: Tensor, halves: Tensor) -> None:
    """float32 values become bfloat16 ones in place: the random half-word is added to their bits, the low half cut."""
    bits = values.view(torch.int32)
    rounded = torch.where(values.isfinite(), bits + halves.to(torch.int32), bits) & -0x10000
    bits.copy_(torch.where(values.isnan(), 0x7FC00000, rounded))
