"""Directions on the CPU: one compiled kernel over tiles that stay in the first-level cache, on torch's thread count.

Arguments are those of ``fedzo.directions`` after its checks.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from fedzo.directions import normal
from fedzo.directions.philox import KEY_STEPS, MASK32, MULTIPLIERS, ROUNDS

BLOCK = {"rademacher": 128, "gaussian": 8}  # elements of a direction in one Philox block of 4 words
# Elements that take all records before the next tile: 16 KiB of theta are half of a usual first-level cache; a Gaussian
# direction shares it with its table.
TILE = {"rademacher": 4096, "gaussian": 1024}
CHUNK = 1 << 18  # elements that a thread takes at a time

M0, M1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
STEP0, STEP1 = (np.uint64(step) for step in KEY_STEPS)
LOW, SHIFT = np.uint64(MASK32), np.uint64(32)

Float32s = npt.NDArray[np.float32]
Uint64s = npt.NDArray[np.uint64]


def _jit(function: Callable[..., Any], signature: str | None = None) -> Any:
    """Compile for ``signature`` now, keeping the machine code on disk; without one, at the first use by a kernel."""
    options = {"nogil": True, "fastmath": False, "error_model": "numpy"}
    if signature is None:
        return numba.njit(**options)(function)
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no cache directory can be written, neither ours nor the user's
        return numba.njit(signature, **options)(function)


def _add_signs(typing: Any, out: Any, source: Any, index: Any, word: Any, value: Any) -> Any:
    """out[i + b] = source[i + b] + (value if bit b of word is set else -value), b = 0..31; no bounds are checked.

    Written as LLVM vectors because a loop over the bits of a word is unrolled before it could be vectorised; with
    AVX-512 a word in memory serves directly as the mask of a blend.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, source, index, word, value = arguments
        lanes = 32

        def address(array_type: Any, array: Any) -> Any:
            data = context.make_array(array_type)(context, builder, array).data
            return builder.bitcast(builder.gep(data, [index]), ir.PointerType(ir.VectorType(ir.FloatType(), lanes)))

        def splat(scalar: Any) -> Any:
            none = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
            first = builder.insert_element(none, scalar, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))

        is_set = builder.bitcast(word, ir.VectorType(ir.IntType(1), lanes))
        step = builder.select(is_set, splat(value), splat(builder.fneg(value)))
        total = builder.fadd(builder.load(address(signature.args[1], source), align=4), step)
        builder.store(total, address(signature.args[0], out), align=4)
        return context.get_dummy_value()

    return types.void(out, source, types.intp, types.uint32, types.float32), generate


def _fill_words(words: Any, first: Any, count: Any, seed: Any) -> None:
    """words[0 : 4 count] = the words of blocks first ... first + count - 1; vectorises over blocks, in 64-bit lanes."""
    for i in range(count):
        block = first + np.uint64(i)
        c0, c1, c2, c3 = block & LOW, block >> SHIFT, np.uint64(0), np.uint64(0)
        k0, k1 = seed & LOW, seed >> SHIFT
        for _ in range(ROUNDS):
            product0, product1 = c0 * M0, c2 * M1
            c0, c1 = (product1 >> SHIFT) ^ c1 ^ k0, product1 & LOW
            c2, c3 = (product0 >> SHIFT) ^ c3 ^ k1, product0 & LOW
            k0, k1 = (k0 + STEP0) & LOW, (k1 + STEP1) & LOW
        words[4 * i] = np.uint32(c0)
        words[4 * i + 1] = np.uint32(c1)
        words[4 * i + 2] = np.uint32(c2)
        words[4 * i + 3] = np.uint32(c3)


def _add_rademacher(out: Any, source: Any, words: Any, first: Any, c: Any) -> None:
    """out[i] = source[i] + c z_i for all i, z_i from bit first + i of words."""
    head = min(out.size, -first % 32)
    whole = (out.size - head) // 32
    for i in range(head):
        out[i] = source[i] + (c if (words[(first + i) // 32] >> np.uint32((first + i) % 32)) & np.uint32(1) else -c)
    for i in range(whole):
        ADD_SIGNS(out, source, head + 32 * i, words[(first + 31) // 32 + i], c)
    for i in range(head + 32 * whole, out.size):
        out[i] = source[i] + (c if (words[(first + i) // 32] >> np.uint32((first + i) % 32)) & np.uint32(1) else -c)


def _add_gaussian(out: Any, source: Any, words: Any, first: Any, c: Any, table: Any) -> None:
    """out[i] = source[i] + c z_i for all i, z_i from half-word first + i of words, the low half of a word first."""
    low, shift = np.uint32(0xFFFF), np.uint32(16)
    head = min(out.size, first % 2)
    whole = (out.size - head) // 2
    if head:
        out[0] = source[0] + c * table[words[first // 2] >> shift]
    # Slices, so that indices count from 0: numba then need not ask whether they are negative.
    whole_out, whole_source, whole_words = out[head:], source[head:], words[(first + 1) // 2 :]
    for i in range(whole):
        bits = whole_words[i]
        even, odd = c * table[bits & low], c * table[bits >> shift]
        whole_out[2 * i], whole_out[2 * i + 1] = whole_source[2 * i] + even, whole_source[2 * i + 1] + odd
    if head + 2 * whole < out.size:
        out[-1] = source[-1] + c * table[whole_words[whole] & low]


def _accumulate(
    out: Any,
    source: Any,
    offset: Any,
    seeds: Any,
    coefficients: Any,
    table: Any,
    block_size: Any,
    tile_size: Any,
) -> None:
    """out = source + coefficient * z[offset : offset + n] of each record in order; source is out or apart from it.

    A Rademacher direction has block_size 128, a Gaussian one 8 and a table.
    """
    words = np.empty(tile_size // block_size * 4, np.uint32)
    for tile in range(offset // block_size * block_size, offset + out.size, tile_size):
        start, stop = max(tile, offset) - offset, min(tile + tile_size, offset + out.size) - offset
        first = offset + start - tile
        count = (first + stop - start + block_size - 1) // block_size
        target, origin = out[start:stop], source[start:stop]
        for record in range(seeds.size):
            FILL_WORDS(words, np.uint64(tile // block_size), count, seeds[record])
            if block_size == 128:
                ADD_RADEMACHER(target, origin, words, first, coefficients[record])
            else:
                ADD_GAUSSIAN(target, origin, words, first, coefficients[record], table)
            origin = target


def _round(bits: Any, halves: Any, first: Any) -> None:
    """The float32 values whose bits these are become bfloat16 ones, by the random half-words first ... of halves."""
    exponent, infinity, quiet = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x7FC00000)
    drawn = halves[first : first + bits.size]  # a slice: numba then need not ask whether indices are negative
    for i in range(bits.size):
        found = bits[i]
        size = found & exponent
        rounded = found + np.uint32(drawn[i]) if size < infinity else found
        bits[i] = (quiet if size > infinity else rounded) & np.uint32(0xFFFF0000)


def _accumulate_rounded(
    theta: Any,
    offset: Any,
    seeds: Any,
    coefficients: Any,
    rounding: Any,
    table: Any,
    block_size: Any,
    tile_size: Any,
) -> None:
    """Steps s of records (s, r) on the bfloat16 values whose bits theta holds; every tile takes all steps in one go."""
    words = np.empty(tile_size // block_size * 4, np.uint32)
    drawn = np.empty(tile_size // 2, np.uint32)
    halves = drawn.view(np.uint16)  # the low half of a word first, on the little-endian machines that numba knows
    values = np.empty(tile_size, np.float32)
    for tile in range(offset // block_size * block_size, offset + theta.size, tile_size):
        start, stop = max(tile, offset) - offset, min(tile + tile_size, offset + theta.size) - offset
        first, last = offset + start - tile, offset + stop - tile
        count = (last + block_size - 1) // block_size
        part, target = theta[start:stop], values[: stop - start]
        bits = target.view(np.uint32)
        for i in range(part.size):
            bits[i] = np.uint32(part[i]) << np.uint32(16)
        for step in range(rounding.size):
            for record in range(seeds.shape[1]):
                FILL_WORDS(words, np.uint64(tile // block_size), count, seeds[step, record])
                if block_size == 128:
                    ADD_RADEMACHER(target, target, words, first, coefficients[step, record])
                else:
                    ADD_GAUSSIAN(target, target, words, first, coefficients[step, record], table)
            FILL_WORDS(drawn, np.uint64(tile // 8), (last + 7) // 8, rounding[step])
            ROUND(bits, halves, first)
        for i in range(part.size):
            part[i] = np.uint16(bits[i] >> np.uint32(16))


def _round_stochastically(values: Any, offset: Any, seed: Any) -> None:
    """values[i] becomes a whole number next to it, by word offset + i of the stream."""
    words = np.empty(4096, np.uint32)
    for tile in range(offset // 4 * 4, offset + values.size, 4096):
        start, stop = max(tile, offset) - offset, min(tile + 4096, offset + values.size) - offset
        first = offset + start - tile
        FILL_WORDS(words, np.uint64(tile // 4), (first + stop - start + 3) // 4, seed)
        part, drawn = values[start:stop], words[first : first + stop - start]
        for i in range(part.size):
            size = abs(part[i])
            whole = np.floor(size)
            if drawn[i] < np.uint32((size - whole) * 4294967296.0):
                whole += np.float32(1.0)
            part[i] = np.copysign(whole, part[i])


ADD_SIGNS = intrinsic(_add_signs)
FILL_WORDS, ADD_RADEMACHER, ADD_GAUSSIAN = _jit(_fill_words), _jit(_add_rademacher), _jit(_add_gaussian)
ACCUMULATE = _jit(
    _accumulate,
    "void(float32[::1], float32[::1], int64, uint64[::1], float32[::1], "
    "Array(float32, 1, 'C', readonly=True), int64, int64)",
)
ROUND = _jit(_round)
ACCUMULATE_ROUNDED = _jit(
    _accumulate_rounded,
    "void(uint16[::1], int64, uint64[:, ::1], float32[:, ::1], uint64[::1], "
    "Array(float32, 1, 'C', readonly=True), int64, int64)",
)

ROUND_STOCHASTICALLY = _jit(_round_stochastically, "void(float32[::1], int64, uint64)")

_pool = ThreadPoolExecutor(max_workers=os.cpu_count())  # starts a thread only when there is work for it


def _forget_pool() -> None:
    """A forked child inherits the pool but not its threads."""
    global _pool  # noqa: PLW0603
    _pool = ThreadPoolExecutor(max_workers=os.cpu_count())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _run(out: Tensor, source: Tensor | None, offset: int, seeds: Uint64s, coefficients: Float32s, family: str) -> None:
    """``_accumulate`` (from zero without a source)."""
    target = out.detach().numpy()
    origin = target if source is None else source.detach().numpy()
    constants = normal.table(), BLOCK[family], TILE[family]

    def work(first: int) -> None:
        part = slice(first, first + CHUNK)
        if source is None:
            target[part] = 0
        ACCUMULATE(target[part], origin[part], offset + first, seeds, coefficients, *constants)

    share(len(target), work)


def share(size: int, work: Callable[[int], None]) -> None:
    """Does the work of the chunks of CHUNK entries that start at 0, CHUNK, ...; threads take them from one list."""
    chunks = iter(range(0, size, CHUNK))

    def take() -> None:
        for first in chunks:
            work(first)

    helpers = min(torch.get_num_threads(), -(-size // CHUNK)) - 1
    futures = [_pool.submit(take) for _ in range(helpers)]
    take()
    for future in futures:
        if not future.cancel():
            future.result()


def fill(out: Tensor, seed: int, family: str, *, offset: int = 0) -> Tensor:
    _run(out, None, offset, np.array([seed], np.uint64), np.ones(1, np.float32), family)
    return out


def axpy(
    theta: Tensor, seed: int, coefficient: float, family: str, *, offset: int = 0, out: Tensor | None = None
) -> Tensor:
    out = theta if out is None else out
    _run(out, theta, offset, np.array([seed], np.uint64), np.array([coefficient], np.float32), family)
    return out


def replay(theta: Tensor, seeds: Uint64s, coefficients: Float32s, family: str, *, offset: int = 0) -> Tensor:
    _run(theta, theta, offset, seeds, coefficients, family)
    return theta


def replay_rounded(
    theta: Tensor, seeds: Uint64s, coefficients: Float32s, family: str, rounding: Uint64s, *, offset: int = 0
) -> Tensor:
    bits = theta.detach().view(torch.uint16).numpy()
    constants = normal.table(), BLOCK[family], TILE[family]

    def work(first: int) -> None:
        ACCUMULATE_ROUNDED(bits[first : first + CHUNK], offset + first, seeds, coefficients, rounding, *constants)

    share(len(bits), work)
    return theta


def round_stochastically(values: Tensor, seed: int, *, offset: int = 0) -> Tensor:
    target, stream = values.detach().numpy(), np.uint64(seed)

    def work(first: int) -> None:
        ROUND_STOCHASTICALLY(target[first : first + CHUNK], offset + first, stream)

    share(len(target), work)
    return values
