"""Philox4x32-10, the counter-based generator that all directions and all public random choices come from.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123). A block is four 32-bit
words, a pure function of a 128-bit counter and a 64-bit key, so any part of a stream is computable alone. A stream is
named by a seed in [0, 2**64): key = (seed low, seed high), counter = (block low, block high, 0, 0).
"""

import operator
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from fedzo.errors import ConfigError

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: the Weyl sequence of the key
MASK32 = 0xFFFFFFFF

Words = npt.NDArray[np.uint32]


def check_seed(seed: SupportsIndex) -> int:
    """Return ``seed`` as an int.

    Raises:
        ConfigError: it is not an integer in [0, 2**64).
    """
    try:
        value = operator.index(seed)
    except TypeError:
        raise ConfigError(f"seed is {seed!r} ({type(seed).__name__}), but must be an integer") from None
    if not 0 <= value < 2**64:
        raise ConfigError(f"seed is {value}, but must be at least 0 and below 2**64")
    return value


def blocks(counter: Words, key: Words) -> Words:
    """Philox4x32-10 of each counter.

    Args:
        counter: [..., 4] uint32, word 0 first.
        key: [2] uint32, or any shape [..., 2] that broadcasts.

    Returns:
        [..., 4] uint32.
    """
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = (key[..., word].astype(np.uint64) for word in range(2))
    mask, shift = np.uint64(MASK32), np.uint64(32)
    m0, m1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
    step0, step1 = (np.uint64(step) for step in KEY_STEPS)
    for _ in range(ROUNDS):
        product0, product1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (product1 >> shift) ^ c1 ^ k0, product1 & mask, (product0 >> shift) ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + step0) & mask, (k1 + step1) & mask
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(seed: SupportsIndex, count: int, offset_blocks: int = 0) -> Words:
    """The first ``count`` words of a stream from block ``offset_blocks`` on, block-major, words 0..3 of each block.

    Returns:
        [count] uint32.

    Raises:
        ConfigError: seed is outside [0, 2**64).
        ValueError: count is negative or a block lies outside [0, 2**64).
    """
    seed = check_seed(seed)
    block_count = -(-count // 4)
    if count < 0 or offset_blocks < 0 or offset_blocks + block_count > 2**64:
        raise ValueError(f"no {count} words from block {offset_blocks}: blocks run from 0 to 2**64 - 1")
    index = np.arange(block_count, dtype=np.uint64) + np.uint64(offset_blocks)
    counter = np.zeros((block_count, 4), np.uint32)
    counter[:, 0] = index & np.uint64(MASK32)
    counter[:, 1] = index >> np.uint64(32)
    key = np.array([seed & MASK32, seed >> 32], np.uint32)
    return blocks(counter, key).reshape(-1)[:count]


def substream(seed: SupportsIndex, number: int) -> int:
    """The seed of a stream beside that of ``seed``: the first two words, the low one first, of block 2**63 + number,
    which no direction reaches.

    Raises:
        ConfigError: seed is outside [0, 2**64).
    """
    low, high = words(seed, 2, 2**63 + number).tolist()
    return int(low) | int(high) << 32
