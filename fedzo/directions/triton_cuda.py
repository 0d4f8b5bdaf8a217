"""Directions on CUDA: a Triton program takes a tile of theta through all records, in registers.

Arguments are those of ``fedzo.directions`` after its checks. Work is queued on the current stream of the tensor's
device. Every launch forbids the compiler to fuse a product with the sum that follows it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedzo.directions import normal
from fedzo.directions.reference import round_stochastically

__all__ = ["axpy", "fill", "replay", "replay_rounded", "round_stochastically"]

LANES = {"rademacher": 32, "gaussian": 2}  # elements of a direction in one word; a Philox block has 4 words
TILE = 4096  # elements of a program, a multiple of the elements of a block
WARPS = 4

Float32s = npt.NDArray[np.float32]
Uint64s = npt.NDArray[np.uint64]


@triton.jit
def _words(seed, first, count: tl.constexpr):
    """The words of Philox blocks from ``first`` on: uint32 [count]."""
    block = first + tl.arange(0, count // 4)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (count,))


@triton.jit
def _split(words, lanes: tl.constexpr):
    """Words [n] as their ``lanes`` parts, the lowest first: int32 [n, lanes]."""
    width: tl.constexpr = 32 // lanes
    shift = (width * tl.arange(0, lanes)).to(tl.uint32)
    return ((words[:, None] >> shift[None, :]) & ((1 << width) - 1)).to(tl.int32)


@triton.jit
def _add(values, seed, c, block, table, words: tl.constexpr, lanes: tl.constexpr):
    """values [words, lanes] + c z, z from Philox block ``block`` on."""
    parts = _split(_words(seed, block, words), lanes)
    # c * -1.0, since Triton 3.2 takes -c for 0 - c, which loses the sign of a zero.
    return values + (tl.load(table + parts) * c if lanes == 2 else tl.where(parts != 0, c, c * -1.0))


@triton.jit
def _rounded(values, seed, block, words: tl.constexpr, lanes: tl.constexpr):
    """values [words, lanes] rounded stochastically to values of bfloat16, by the half-words from ``block`` on."""
    halves = _split(_words(seed, block, words * lanes // 2), 2)
    noise = tl.reshape(halves, (words, lanes)).to(tl.uint32)
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude < 0x7F800000, bits + noise, tl.where(magnitude > 0x7F800000, 0x7FC00000, bits))
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _places(size, skip, words: tl.constexpr, lanes: tl.constexpr):
    """Indices of the program's tile in theta, int64 [words, lanes], and which of them are inside."""
    start = tl.program_id(0).to(tl.int64) * (words * lanes)
    place = start + tl.arange(0, words)[:, None] * lanes + tl.arange(0, lanes)[None, :] - skip
    return place, (place >= 0) & (place < size)


# Sizes and offsets of any kind share one compiled kernel: loads are coalesced without being vectors.
@triton.jit(do_not_specialize=["size", "first", "skip", "seed"])
def _axpy(
    out,
    source,
    size,
    first,  # Philox block of element 0
    skip,  # elements of that block before element 0
    seed,
    c,
    table,
    zero: tl.constexpr,
    words: tl.constexpr,
    lanes: tl.constexpr,
):
    """out = source + c z; with ``zero``, out = c z and the source is not read."""
    place, inside = _places(size, skip, words, lanes)
    block = first.to(tl.int64) + tl.program_id(0).to(tl.int64) * (words // 4)
    values = tl.zeros((words, lanes), tl.float32) if zero else tl.load(source + place, inside)
    tl.store(out + place, _add(values, seed, c, block, table, words, lanes), inside)


@triton.jit(do_not_specialize=["size", "first", "skip", "steps", "records"])
def _replay(
    theta,  # float32, or the bits of bfloat16 as int16 with ``bf16``
    size,
    first,
    skip,
    seeds,  # [steps, records]
    coefficients,  # [steps, records]
    rounding,  # [steps], read with ``bf16``
    steps,
    records,
    table,
    bf16: tl.constexpr,
    words: tl.constexpr,
    lanes: tl.constexpr,
):
    """theta += c z for all records in their order; with ``bf16`` in float32 within a step, and rounded after it."""
    place, inside = _places(size, skip, words, lanes)
    block = first.to(tl.int64) + tl.program_id(0).to(tl.int64) * (words // 4)
    stored = tl.load(theta + place, inside)
    values = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True) if bf16 else stored
    for step in range(steps):
        for record in range(step * records, (step + 1) * records):
            seed, c = tl.load(seeds + record), tl.load(coefficients + record)
            values = _add(values, seed, c, block, table, words, lanes)
        if bf16:
            values = _rounded(values, tl.load(rounding + step), block * (lanes // 2), words, lanes)
    result = (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16) if bf16 else values
    tl.store(theta + place, result, inside)


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(normal.table(), device=device)


def _launch(kernel: Any, family: str, offset: int, size: int, device: torch.device, **arguments: object) -> None:
    """Run a kernel over ``size`` elements of a direction from ``offset`` on."""
    if size == 0:
        return
    lanes = LANES[family]
    first, skip = divmod(offset, 4 * lanes)
    place = {"size": size, "first": first, "skip": skip, "words": TILE // lanes, "lanes": lanes}
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    with torch.cuda.device(device.index if device.type == "cuda" else -1):  # -1: Triton's interpreter on the CPU
        kernel[(triton.cdiv(skip + size, TILE),)](**place, **arguments, **options, table=_table(device))


def fill(out: Tensor, seed: int, family: str, *, offset: int = 0) -> Tensor:
    _add_to(out, None, seed, 1.0, family, offset)
    return out


def axpy(
    theta: Tensor, seed: int, coefficient: float, family: str, *, offset: int = 0, out: Tensor | None = None
) -> Tensor:
    out = theta if out is None else out
    _add_to(out, theta, seed, coefficient, family, offset)
    return out


def _add_to(out: Tensor, source: Tensor | None, seed: int, c: float, family: str, offset: int) -> None:
    out = out.detach()
    arguments = {
        "out": out,
        "source": out if source is None else source.detach(),
        "seed": seed - (seed >> 63 << 64),
        "c": c,
        "zero": source is None,
    }
    _launch(_axpy, family, offset, len(out), out.device, **arguments)


def replay(theta: Tensor, seeds: Uint64s, coefficients: Float32s, family: str, *, offset: int = 0) -> Tensor:
    _replay_on(theta.detach(), seeds[None], coefficients[None], np.zeros(1, np.uint64), family, offset)
    return theta


def replay_rounded(
    theta: Tensor, seeds: Uint64s, coefficients: Float32s, family: str, rounding: Uint64s, *, offset: int = 0
) -> Tensor:
    _replay_on(theta.detach().view(torch.int16), seeds, coefficients, rounding, family, offset)
    return theta


def _replay_on(
    theta: Tensor, seeds: Uint64s, coefficients: Float32s, rounding: Uint64s, family: str, offset: int
) -> None:
    arguments = {
        "theta": theta,
        "seeds": torch.tensor(seeds.view(np.int64), device=theta.device),
        "coefficients": torch.tensor(coefficients, device=theta.device),
        "rounding": torch.tensor(rounding.view(np.int64), device=theta.device),
        "steps": seeds.shape[0],
        "records": seeds.shape[1],
        "bf16": theta.dtype == torch.int16,
    }
    _launch(_replay, family, offset, len(theta), theta.device, **arguments)
