"""The Triton kernels: interpreted on the CPU against the reference, compiled for CUDA without a device, run on one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedzo import directions
from fedzo.directions import FAMILIES, numba_cpu, reference

triton = pytest.importorskip("triton", reason="Triton is not installed (it has no wheels for this system)")

CHECKS = ("fill", "axpy", "replay", "replay_rounded")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def comparisons() -> dict[str, int]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("triton_checks.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.parametrize("check", ["words", *(f"{check} {family}" for check in CHECKS for family in FAMILIES)])
def test_interpreted_kernels_equal_the_reference(comparisons: dict[str, int], check: str) -> None:
    assert comparisons[check] >= 6


@pytest.fixture
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield


@pytest.mark.usefixtures("cache_of_its_own")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_kernels_round_every_product_and_sum(family: str, bf16: bool) -> None:
    """Neither a fused multiply-add nor a flush of subnormal values to zero in the code for CUDA."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedzo.directions import triton_cuda

    lanes = triton_cuda.LANES[family]
    constants = {"bf16": bf16, "words": triton_cuda.TILE // lanes, "lanes": lanes}
    integers = dict.fromkeys(("size", "skip", "steps", "records"), "i32")
    pointers = {"theta": "*i16" if bf16 else "*fp32", "seeds": "*i64", "rounding": "*i64"}
    types = pointers | integers | {"first": "i64", "coefficients": "*fp32", "table": "*fp32"}
    signature = {name: types.get(name, "constexpr") for name in triton_cuda._replay.arg_names}
    source = ASTSource(fn=triton_cuda._replay, signature=signature, constexprs=constants)
    options = {"num_warps": triton_cuda.WARPS, "enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
    floats = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div)\.[\w.]*f32", code))
    assert floats == ({"add.rn.f32"} if family == "rademacher" else {"add.rn.f32", "mul.rn.f32"})


def test_a_missing_compiler_leaves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    directions._module.cache_clear()
    try:
        with pytest.warns(UserWarning, match="numba is not installed: directions on cpu are computed by plain torch"):
            assert directions._implementation(torch.empty(1)) is reference
    finally:
        directions._module.cache_clear()


# On a CUDA device


def some_theta(size: int, device: str = "cpu") -> Tensor:
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    values[5::13] *= np.float32(1e-40)
    return torch.from_numpy(values).to(device)


def some_records(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 2**64, shape, dtype=np.uint64), rng.standard_normal(shape).astype(np.float32)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "offset"), [(1, 0), (4096, 128), (1_000_003, 77), (20_000_000, 2**62 - 5)])
def test_cuda_equals_numba(family: str, size: int, offset: int) -> None:
    theta = some_theta(size)
    on_device = theta.cuda()
    assert directions._implementation(on_device).__name__ == "fedzo.directions.triton_cuda"
    z = directions.fill(torch.empty_like(on_device), 2**64 - 3, family, offset=offset)
    assert torch.equal(z.cpu(), numba_cpu.fill(torch.empty(size), 2**64 - 3, family, offset=offset))
    for c in (0.1, 1e-42, -3e38):
        out = directions.axpy(on_device, 7, c, family, offset=offset, out=torch.empty_like(on_device))
        expected = directions.axpy(theta, 7, c, family, offset=offset, out=torch.empty(size))
        assert torch.equal(out.cpu().view(torch.int32), expected.view(torch.int32))
    directions.replay(on_device, *some_records(20), family, offset=offset)
    directions.replay(theta, *some_records(20), family, offset=offset)
    assert torch.equal(on_device.cpu().view(torch.int32), theta.view(torch.int32))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_rounds_as_numba_does(family: str) -> None:
    theta = some_theta(3_000_001).bfloat16()
    theta[::1001] = torch.nan
    theta[1::1001] = -torch.inf
    steps, rounding = some_records(4, 3), some_records(4)[0]
    on_device = directions.replay_rounded(theta.cuda(), *steps, family, rounding, offset=13)
    directions.replay_rounded(theta, *steps, family, rounding, offset=13)
    assert torch.equal(on_device.cpu().view(torch.int16), theta.view(torch.int16))


@pytest.mark.gpu
@gpu
def test_cuda_follows_the_current_stream() -> None:
    """A direction waits for what the stream has queued before it, and for nothing else."""
    stream = torch.cuda.Stream()
    theta = torch.zeros(1 << 22, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        theta.fill_(3.0)
        directions.axpy(theta, 1, 1.0, "rademacher")
    stream.synchronize()
    assert set(theta.unique().tolist()) == {2.0, 4.0}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("family", FAMILIES)
def test_any_cuda_device(family: str) -> None:
    assert torch.cuda.current_device() == 0
    theta = directions.replay(some_theta(10_001, "cuda:1"), *some_records(3), family)
    assert torch.equal(theta.cpu(), directions.replay(some_theta(10_001), *some_records(3), family))
