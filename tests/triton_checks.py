"""The Triton kernels against the reference, bit for bit, on CPU tensors; a program of its own, since Triton decides at
its import whether to interpret: ``TRITON_INTERPRET=1 python tests/triton_checks.py`` prints one line of JSON, the
number of comparisons of each check.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import json
from itertools import product

import numpy as np
import torch
from torch import Tensor

from fedzo.directions import FAMILIES, philox, reference, triton_cuda

RNG = np.random.default_rng(0)
SEEDS = (0, 1, 2**31, 2**32, 0xDEADBEEF12345678, 2**64 - 1)
OFFSETS = (0, 5, 128, 2**40 - 3, 2**32 * 128 - 70, 2**62)
SIZES = (0, 1, 150, triton_cuda.TILE, triton_cuda.TILE + 77)


def equal(first: Tensor, second: Tensor) -> bool:
    """As bits: -0.0 is not 0.0, and a NaN is itself."""
    dtype = {2: torch.int16, 4: torch.int32}[first.element_size()]
    return torch.equal(first.view(dtype), second.view(dtype))


def some_theta(size: int) -> Tensor:
    """Values over many binades, subnormal ones, both zeros, the largest ones and infinities among them."""
    theta = (RNG.standard_normal(size) * 10.0 ** RNG.integers(-8, 3, size)).astype(np.float32)
    theta[::7], theta[3::11], theta[4::61] = 0.0, -0.0, 3.4e38
    theta[5::13] = RNG.integers(-1000, 1000, len(theta[5::13])) * np.float32(1e-45)
    theta[8::101], theta[9::101] = np.inf, -np.inf
    return torch.from_numpy(theta)


def words() -> int:
    for seed, first in product(SEEDS, (0, 2**32 - 3, 2**59)):
        out = torch.empty(64)
        triton_cuda.fill(out, seed, "rademacher", offset=128 * first)
        bits = (np.frombuffer(philox.words(seed, 2, first), np.uint8)[:, None] >> np.arange(8)) & 1
        assert (out.numpy() == bits.reshape(-1) * 2.0 - 1).all()
    return len(SEEDS) * 3


def fill(family: str) -> int:
    cases = list(zip(SEEDS * len(OFFSETS), np.repeat(OFFSETS, len(SEEDS)).tolist(), strict=True))
    for case, (seed, offset) in enumerate(cases):
        found = triton_cuda.fill(torch.full((SIZES[case % 5],), torch.nan), seed, family, offset=offset)
        assert equal(found, reference.fill(torch.empty_like(found), seed, family, offset=offset)), (seed, offset)
    return len(cases)


def axpy(family: str) -> int:
    cases = list(product((-0.0, 0.1, 1e-45, 3.4e38), OFFSETS[::2], SIZES[1:3]))
    for c32, offset, size in cases:
        c, theta = float(np.float32(c32)), some_theta(size)
        expected = reference.axpy(theta, SEEDS[4], c, family, offset=offset, out=torch.empty(size))
        before, out = theta.clone(), torch.full((size,), torch.nan)
        assert equal(triton_cuda.axpy(theta, SEEDS[4], c, family, offset=offset, out=out), expected), (c, offset, size)
        assert equal(theta, before)
        parameter = torch.nn.Parameter(theta)
        assert equal(triton_cuda.axpy(parameter, SEEDS[4], c, family, offset=offset).detach(), expected)
    return len(cases)


def replay(family: str) -> int:
    cases = list(product(OFFSETS[1::2], SIZES[1::3], (0, 1, 9)))
    for offset, size, records in cases:
        seeds = RNG.integers(0, 2**64, records, dtype=np.uint64)
        run = seeds, RNG.standard_normal(records).astype(np.float32)
        theta = some_theta(size)
        expected = reference.replay(theta.clone(), *run, family, offset=offset)
        assert equal(triton_cuda.replay(theta, *run, family, offset=offset), expected), (offset, size, records)
    return len(cases)


def replay_rounded(family: str) -> int:
    cases = list(product(OFFSETS[1::2], SIZES[4:], ((3, 2), (0, 4), (2, 0)), (1e-3, 1e38)))
    for offset, size, shape, scale in cases:
        seeds, rounding = (RNG.integers(0, 2**64, n, dtype=np.uint64) for n in (shape, shape[:1]))
        run = seeds, (RNG.standard_normal(shape) * scale).astype(np.float32), family, rounding
        theta = some_theta(size).bfloat16()
        theta.view(torch.int16)[10::103] = -63  # the NaN 0xFFC1
        theta.view(torch.int16)[11::103] = 0x7F81  # a signalling NaN
        expected = reference.replay_rounded(theta.clone(), *run, offset=offset)
        found = triton_cuda.replay_rounded(theta, *run, offset=offset)
        assert found is theta
        assert equal(found, expected), (offset, size, shape, scale)
    return len(cases)


if __name__ == "__main__":
    np.seterr(over="ignore", invalid="ignore")
    counts = {"words": words()}
    for check, family in product((fill, axpy, replay, replay_rounded), FAMILIES):
        counts[f"{check.__name__} {family}"] = check(family)
    print(json.dumps(counts))
