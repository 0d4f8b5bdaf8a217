"""Directions: the published vectors of Philox, and numba against the torch reference bit for bit."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedzo import directions
from fedzo.directions import FAMILIES, normal, numba_cpu, philox, reference
from fedzo.errors import ConfigError, RunError

REPOSITORY = Path(__file__).resolve().parents[1]

families = st.sampled_from(FAMILIES)
seeds = st.one_of(st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))
offsets = st.one_of(st.integers(0, 300), st.integers(2**40 - 300, 2**40 + 300), st.integers(0, 2**62))
sizes = st.one_of(st.integers(0, 70), st.integers(0, 10_000))
coefficients = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),  # subnormal values among them
    st.sampled_from([0.0, -0.0, 1e-3, 0.1, 1 / 3, -7.7, 1e-45, 1.4e-39, 3.4e38]),
)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


def some_theta(size: int, seed: int = 0) -> Tensor:
    """Values over many binades, subnormal ones and both zeros among them."""
    rng = np.random.default_rng(seed)
    theta = (rng.standard_normal(size) * 10.0 ** rng.integers(-8, 3, size)).astype(np.float32)
    theta[::7] = 0.0
    theta[3::11] = np.float32(-0.0)
    theta[5::13] = rng.integers(-1000, 1000, len(theta[5::13])) * np.float32(1e-45)
    return torch.from_numpy(theta)


def hex_words(text: str) -> npt.NDArray[np.uint32]:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter: str, key: str, answer: str) -> None:
    """kat_vectors of Random123 for philox4x32-10."""
    assert (philox.blocks(hex_words(counter), hex_words(key)) == hex_words(answer)).all()


def test_words_are_counted_in_blocks() -> None:
    words = philox.words(0x0123456789ABCDEF, 11, offset_blocks=2**32 - 1)
    counters = hex_words("ffffffff 0 0 0  0 1 0 0  1 1 0 0").reshape(3, 4)
    assert words.dtype == np.uint32
    assert (words == philox.blocks(counters, hex_words("89abcdef 01234567")).reshape(-1)[:11]).all()


@settings(deadline=None)
@given(seed=seeds, first=st.integers(0, 2**59 - 10), count=st.integers(1, 9))
def test_all_generators_give_the_words_of_philox(seed: int, first: int, count: int) -> None:
    expected = philox.words(seed, 4 * count, first)
    torch_words = reference._words(seed, first, count, torch.device("cpu"))
    numba_words = np.zeros(4 * count, np.uint32)
    numba_cpu.FILL_WORDS(numba_words, np.uint64(first), count, np.uint64(seed))
    assert (torch_words.reshape(-1).numpy() == expected).all()
    assert (numba_words == expected).all()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed is"):
        philox.words(seed, 4)
    with pytest.raises(ConfigError, match="seed is"):
        directions.fill(torch.empty(3), seed, "rademacher")


def test_bad_word_ranges() -> None:
    for count, first in [(-1, 0), (4, -1), (8, 2**64 - 1)]:
        with pytest.raises(ValueError, match="blocks run from 0"):
            philox.words(0, count, first)
    assert len(philox.words(0, 4, 2**64 - 1)) == 4
    assert len(philox.words(0, 0)) == 0


# The table of normal quantiles


def test_table_is_the_documented_one() -> None:
    table = normal.table()
    assert table.dtype == np.float32
    assert table.shape == (65536,)
    assert not table.flags.writeable
    assert (np.diff(table) > 0).all()
    assert (table == -table[::-1]).all()
    np.testing.assert_allclose(normal.compute(), table[32768:], rtol=2e-7)


def test_table_has_the_moments_of_a_normal() -> None:
    table = normal.table().astype(np.float64)
    assert table.mean() == 0
    assert np.mean(table**2) == pytest.approx(1, abs=1e-8)
    assert np.mean(table**4) == pytest.approx(3, abs=2e-3)
    assert np.mean(np.abs(table)) == pytest.approx(np.sqrt(2 / np.pi), abs=1e-4)


def test_damaged_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    data = bytearray(normal.PATH.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="reinstall fedzo"):
        normal.read(path)
    with pytest.raises(RunError, match="No such file"):
        normal.read(tmp_path / "missing")


# The definition of the families, element by element


@pytest.mark.parametrize("offset", [0, 5, 2**40 - 3, 2**32 * 128 - 70])
def test_elements_follow_the_definition(offset: int) -> None:
    seed, size = 0xDEADBEEF12345678, 150
    signs = directions.fill(torch.empty(size), seed, "rademacher", offset=offset).tolist()
    normals = directions.fill(torch.empty(size), seed, "gaussian", offset=offset).tolist()
    for j in range(size):
        i = offset + j
        word = int(philox.words(seed, 4, i // 128)[(i % 128) // 32])
        assert signs[j] == (1.0 if (word >> (i % 32)) & 1 else -1.0)
        word = int(philox.words(seed, 4, i // 8)[(i % 8) // 2])
        assert normals[j] == normal.table()[(word >> (16 * (i % 2))) & 0xFFFF]


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_never_change(family: str) -> None:
    """A ledger names directions by seed: other bits here would make every earlier ledger worthless."""
    frozen = {
        "rademacher": [1.0, -1.0, 1.0, -1.0, 1.0],
        "gaussian": [
            -0.37878653407096863,
            0.3084179162979126,
            -0.2362014651298523,
            0.48647674918174744,
            1.3991961479187,
        ],
    }
    z = directions.fill(torch.empty(5), 42, family, offset=1000)
    assert torch.equal(z, torch.tensor(frozen[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_a_direction(family: str) -> None:
    z = directions.fill(torch.empty(1 << 20), 7, family).double()
    other = directions.fill(torch.empty(1 << 20), 8, family).double()
    assert abs(z.mean()) < 5e-3
    assert abs((z**2).mean() - 1) < 1e-2
    assert abs((z * other).mean()) < 5e-3
    assert abs((z[1:] * z[:-1]).mean()) < 5e-3


# One interface, two implementations


@settings(deadline=None, max_examples=150)
@given(family=families, seed=seeds, offset=offsets, size=sizes, c=coefficients)
def test_numba_equals_reference(family: str, seed: int, offset: int, size: int, c: float) -> None:
    c = float(np.float32(c))
    fast = numba_cpu.fill(torch.full((size,), torch.nan), seed, family, offset=offset)
    slow = reference.fill(torch.full((size,), torch.nan), seed, family, offset=offset)
    assert torch.equal(bits(fast), bits(slow))
    theta = some_theta(size)
    fast = numba_cpu.axpy(theta.clone(), seed, c, family, offset=offset)
    slow = reference.axpy(theta.clone(), seed, c, family, offset=offset)
    assert torch.equal(bits(fast), bits(slow))
    before = theta.clone()
    for module in (numba_cpu, reference):
        out = module.axpy(theta, seed, c, family, offset=offset, out=torch.full((size,), torch.nan))
        assert torch.equal(bits(out), bits(slow))
    assert torch.equal(bits(theta), bits(before))


@settings(deadline=None, max_examples=60)
@given(
    family=families,
    offset=offsets,
    size=sizes,
    records=st.lists(st.tuples(seeds, st.floats(-(2.0**100), 2.0**100, width=32)), max_size=6),
)
def test_replay_is_a_sequence_of_axpys(family: str, offset: int, size: int, records: list[tuple[int, float]]) -> None:
    theta = some_theta(size)
    expected = theta.clone()
    for seed, c in records:
        directions.axpy(expected, seed, c, family, offset=offset)
    run = np.array([seed for seed, _ in records], np.uint64), np.array([c for _, c in records], np.float32)
    slow = reference.replay(theta.clone(), *run, family, offset=offset)
    fast = directions.replay(theta, *run, family, offset=offset)
    assert fast is theta
    assert torch.equal(bits(fast), bits(expected))
    assert torch.equal(bits(slow), bits(expected))


@settings(deadline=None, max_examples=60)
@given(family=families, seed=seeds, start=st.integers(0, 9_999), size=st.integers(0, 5_000))
def test_a_part_is_computable_alone(family: str, seed: int, start: int, size: int) -> None:
    whole = directions.fill(torch.empty(10_000), seed, family)[start : start + size]
    part = directions.fill(torch.empty(len(whole)), seed, family, offset=start)
    assert torch.equal(part, whole)
    theta = some_theta(10_000)
    alone = directions.axpy(theta[start : start + size].clone(), seed, 0.3, family, offset=start)
    assert torch.equal(bits(alone), bits(directions.axpy(theta, seed, 0.3, family)[start : start + size]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("restore_threads")
def test_thread_count_changes_nothing(family: str) -> None:
    size = 3 * numba_cpu.CHUNK + 17  # more chunks than threads, the last one short
    records = np.arange(5, dtype=np.uint64), np.linspace(-1, 1, 5, dtype=np.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        theta = directions.replay(some_theta(size), *records, family, offset=3)
        results.append((theta, directions.fill(torch.empty(size), 9, family, offset=3)))
    expected = reference.replay(some_theta(size), *records, family, offset=3)
    for theta, z in results:
        assert torch.equal(bits(theta), bits(expected))
        assert torch.equal(z, results[0][1])


def test_the_step_is_rounded_twice() -> None:
    """fl32(theta + fl32(c z)) differs from a fused multiply-add, so that a contraction by a compiler would show."""
    z = directions.fill(torch.empty(1 << 16), 5, "gaussian").numpy()
    theta, c = some_theta(1 << 16).numpy(), np.float32(0.1)
    separate = theta + c * z
    fused = (theta.astype(np.float64) + np.float64(c) * z).astype(np.float32)
    assert (separate != fused).any()
    result = directions.axpy(torch.from_numpy(theta), 5, 0.1, "gaussian")
    assert (result.numpy() == separate).all()


def test_axpy_there_and_back_in_signs() -> None:
    """Subtracting is adding with -c: both negations are exact."""
    theta = some_theta(5000)
    minus = directions.axpy(theta, 3, -0.7, "gaussian", out=torch.empty(5000))
    z = directions.fill(torch.empty(5000), 3, "gaussian")
    assert torch.equal(bits(minus), bits(theta - z * np.float32(0.7).item()))


def test_out_may_be_theta_itself() -> None:
    theta = some_theta(1000)
    expected = directions.axpy(theta, 1, 0.5, "gaussian", out=torch.empty(1000))
    assert directions.axpy(theta, 1, 0.5, "gaussian", out=theta) is theta
    assert torch.equal(bits(theta), bits(expected))


def test_parameters_that_require_gradients() -> None:
    parameter = torch.nn.Parameter(some_theta(100))
    expected = directions.axpy(parameter.detach().clone(), 1, 0.5, "rademacher")
    directions.axpy(parameter, 1, 0.5, "rademacher")
    reference_parameter = reference.axpy(torch.nn.Parameter(some_theta(100)), 1, 0.5, "rademacher")
    assert torch.equal(parameter.detach(), expected)
    assert torch.equal(reference_parameter.detach(), expected)


def test_other_devices_use_the_reference() -> None:
    meta = torch.empty(5, device="meta")
    assert directions._implementation(meta) is reference
    assert directions._implementation(torch.empty(5)) is numba_cpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_cpu(family: str) -> None:
    theta = some_theta(100_003)
    records = np.arange(5, dtype=np.uint64), np.linspace(-1, 1, 5, dtype=np.float32)
    on_device = directions.replay(theta.cuda(), *records, family, offset=77)
    assert torch.equal(bits(on_device.cpu()), bits(directions.replay(theta, *records, family, offset=77)))


# Processes and threads


@pytest.mark.usefixtures("restore_threads")
def test_calls_from_several_threads_at_once() -> None:
    torch.set_num_threads(2)
    size = 3 * numba_cpu.CHUNK
    expected = [reference.fill(torch.empty(size), seed, "rademacher") for seed in range(4)]
    results = [torch.empty(size) for _ in range(4)]
    threads = [threading.Thread(target=directions.fill, args=(results[seed], seed, "rademacher")) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.usefixtures("restore_threads")
def test_threads_work_after_a_fork() -> None:
    torch.set_num_threads(2)
    size = 4 * numba_cpu.CHUNK
    here = directions.fill(torch.empty(size), 3, "rademacher")  # starts the pool's threads before the fork
    shared = torch.zeros(size).share_memory_()
    child = os.fork()
    if child == 0:
        directions.fill(shared, 3, "rademacher")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(shared, here)


def test_works_where_no_cache_can_be_written(tmp_path: Path) -> None:
    """A read-only installation of a user without a writable home: compiled in memory."""
    shutil.copytree(REPOSITORY / "fedzo", tmp_path / "fedzo", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fedzo/directions/__pycache__").write_text("a file where numba wants a directory")
    program = "import torch; from fedzo import directions; print(directions.fill(torch.empty(3), 1, 'gaussian').sum())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(directions.fill(torch.empty(3), 1, "gaussian").sum())


# Bad arguments


def test_unknown_family_names_the_nearest() -> None:
    for call in (
        lambda: directions.fill(torch.empty(3), 0, "rademachr"),
        lambda: directions.axpy(torch.empty(3), 0, 1.0, "rademachr"),
        lambda: directions.replay(torch.empty(3), np.zeros(1, np.uint64), np.ones(1, np.float32), "rademachr"),
    ):
        with pytest.raises(ConfigError, match="did you mean 'rademacher'"):
            call()
    with pytest.raises(ConfigError, match=r"must be one of rademacher, gaussian$"):
        directions.fill(torch.empty(3), 0, "xyz")


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(3, dtype=torch.float64), torch.empty(3, 2), torch.empty(6)[::2], torch.empty(())],
    ids=["dtype", "matrix", "strided", "scalar"],
)
def test_bad_tensors(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be torch\.float32, 1-D and contiguous"):
        directions.fill(tensor, 0, "rademacher")
    with pytest.raises(ValueError, match="out is"):
        directions.axpy(torch.empty(3), 0, 1.0, "rademacher", out=tensor)


@pytest.mark.parametrize("offset", [-1, 2**62 + 1])
def test_bad_offsets(offset: int) -> None:
    with pytest.raises(ValueError, match="offset is"):
        directions.fill(torch.empty(3), 0, "rademacher", offset=offset)


def test_bad_outputs() -> None:
    memory = torch.zeros(10)
    with pytest.raises(ValueError, match="overlaps"):
        directions.axpy(memory[:8], 0, 1.0, "rademacher", out=memory[2:])
    with pytest.raises(ValueError, match="out has 3 elements"):
        directions.axpy(memory, 0, 1.0, "rademacher", out=torch.empty(3))
    directions.axpy(memory[:5], 0, 1.0, "rademacher", out=memory[5:])


@pytest.mark.parametrize("c", [float("nan"), float("inf"), 1e39])
def test_coefficients_that_are_not_finite(c: float) -> None:
    theta = torch.zeros(3)
    with pytest.raises(RunError, match="must be finite in float32"):
        directions.axpy(theta, 0, c, "rademacher")
    with np.errstate(over="ignore"):
        values = np.array([1.0, c], np.float32)
    with pytest.raises(RunError, match="coefficient 1 of 2"):
        directions.replay(theta, np.zeros(2, np.uint64), values, "rademacher")
    assert not theta.any()


def test_bad_records() -> None:
    theta = torch.zeros(3)
    with pytest.raises(ValueError, match="uint64 and float32"):
        directions.replay(theta, np.zeros(2, np.int64), np.ones(2, np.float32), "rademacher")
    with pytest.raises(ValueError, match="uint64 and float32"):
        directions.replay(theta, np.zeros(2, np.uint64), np.ones(2), "rademacher")
    with pytest.raises(ValueError, match="of one length"):
        directions.replay(theta, np.zeros(2, np.uint64), np.ones(3, np.float32), "rademacher")
