"""Directions on the CPU: one compiled kernel over tiles that stay in the first-level cache, run by torch's thread count.

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
TILE = 1 << 12  # elements that take all records before the next tile: 16 KiB, half of a usual first-level cache
CHUNK = 1 << 18  # elements that a thread takes at a time
IN_PLACE, COPY, ZERO = 0, 1, 2  # what a sum starts from: the output's own values, those of another array, nothing

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


@intrinsic  # type: ignore[misc]
def _add_signs(typing: Any, array: Any, index: Any, word: Any, value: Any) -> Any:
    """array[index + b] += value if bit b of word is set else -value, for b = 0..31; no bounds are checked.

    Written as LLVM vectors because a loop over the bits of a word is unrolled before it could be vectorised; with
    AVX-512 a word in memory serves directly as the mask of a blend.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, word, value = arguments
        lanes = 32

        def splat(scalar: Any) -> Any:
            none = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
            first = builder.insert_element(none, scalar, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))

        data = context.make_array(signature.args[0])(context, builder, array).data
        pointer = builder.bitcast(builder.gep(data, [index]), ir.PointerType(ir.VectorType(ir.FloatType(), lanes)))
        is_set = builder.bitcast(word, ir.VectorType(ir.IntType(1), lanes))
        step = builder.select(is_set, splat(value), splat(builder.fneg(value)))
        total = builder.fadd(builder.load(pointer, align=4), step)
        builder.store(total, pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint32, types.float32), generate


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


def _add_rademacher(out: Any, words: Any, start: Any, stop: Any, base: Any, coefficient: Any) -> None:
    """out[base + i] += coefficient * z_i for i in start ... stop - 1, z_i from bit i of words."""
    whole_start = min(stop, (start + 31) // 32 * 32)
    whole_stop = max(whole_start, stop // 32 * 32)
    for i in range(start, whole_start):
        out[base + i] += coefficient if (words[i // 32] >> np.uint32(i % 32)) & np.uint32(1) else -coefficient
    for i in range(whole_start, whole_stop, 32):
        _add_signs(out, base + i, words[i // 32], coefficient)
    for i in range(whole_stop, stop):
        out[base + i] += coefficient if (words[i // 32] >> np.uint32(i % 32)) & np.uint32(1) else -coefficient


def _add_gaussian(out: Any, words: Any, start: Any, stop: Any, base: Any, coefficient: Any, table: Any) -> None:
    """out[base + i] += coefficient * z_i for i in start ... stop - 1, z_i from half-word i of words, low half first."""
    for i in range(start, stop):
        half = (words[i // 2] >> np.uint32(16 * (i % 2))) & np.uint32(0xFFFF)
        out[base + i] += coefficient * table[half]


def _accumulate(
    out: Any, source: Any, begin: Any, offset: Any, seeds: Any, coefficients: Any, table: Any, block_size: Any
) -> None:
    """out = (out, source or 0, by ``begin``) + the sum over records, in their order, of coefficient * z[offset : ...].

    A Rademacher direction has block_size 128, a Gaussian one 8 and a table.
    """
    words = np.empty(TILE // block_size * 4, np.uint32)
    first_block = offset // block_size
    for tile in range(first_block * block_size, offset + out.size, TILE):
        start, stop = max(0, offset - tile), min(TILE, offset + out.size - tile)
        base = tile - offset
        if begin == COPY:
            out[base + start : base + stop] = source[base + start : base + stop]
        elif begin == ZERO:
            out[base + start : base + stop] = np.float32(0)
        count = (stop + block_size - 1) // block_size
        for record in range(seeds.size):
            FILL_WORDS(words, np.uint64(tile // block_size), count, seeds[record])
            if block_size == 128:
                ADD_RADEMACHER(out, words, start, stop, base, coefficients[record])
            else:
                ADD_GAUSSIAN(out, words, start, stop, base, coefficients[record], table)


FILL_WORDS, ADD_RADEMACHER, ADD_GAUSSIAN = _jit(_fill_words), _jit(_add_rademacher), _jit(_add_gaussian)
ACCUMULATE = _jit(
    _accumulate,
    "void(float32[::1], float32[::1], int64, int64, uint64[::1], float32[::1], Array(float32, 1, 'C', readonly=True), int64)",
)

_pool = ThreadPoolExecutor(max_workers=os.cpu_count())  # starts a thread only when there is work for it


def _forget_pool() -> None:
    """A forked child inherits the pool but not its threads."""
    global _pool  # noqa: PLW0603
    _pool = ThreadPoolExecutor(max_workers=os.cpu_count())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _run(
    out: Tensor, source: Tensor, begin: int, offset: int, seeds: Uint64s, coefficients: Float32s, family: str
) -> None:
    """``_accumulate`` in chunks, which the calling thread and helpers take from one list until it is empty."""
    target, origin = out.detach().numpy(), source.detach().numpy()
    table = normal.table()
    remaining = iter(range(0, len(target), CHUNK))

    def work() -> None:
        for start in remaining:
            part = slice(start, start + CHUNK)
            ACCUMULATE(target[part], origin[part], begin, offset + start, seeds, coefficients, table, BLOCK[family])

    helpers = min(torch.get_num_threads(), -(-len(target) // CHUNK)) - 1
    futures = [_pool.submit(work) for _ in range(helpers)]
    work()
    for future in futures:
        if not future.cancel():
            future.result()


def fill(out: Tensor, seed: int, family: str, *, offset: int = 0) -> Tensor:
    _run(out, out, ZERO, offset, np.array([seed], np.uint64), np.ones(1, np.float32), family)
    return out


def axpy(
    theta: Tensor, seed: int, coefficient: float, family: str, *, offset: int = 0, out: Tensor | None = None
) -> Tensor:
    record = np.array([seed], np.uint64), np.array([coefficient], np.float32)
    if out is None:
        _run(theta, theta, IN_PLACE, offset, *record, family)
        return theta
    _run(out, theta, COPY, offset, *record, family)
    return out


def replay(theta: Tensor, seeds: Uint64s, coefficients: Float32s, family: str, *, offset: int = 0) -> Tensor:
    _run(theta, theta, IN_PLACE, offset, seeds, coefficients, family)
    return theta
