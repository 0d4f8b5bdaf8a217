"""Learning-rate schedules and update rules, against plain transcriptions of their formulas."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedzo import directions
from fedzo.directions import philox
from fedzo.errors import ConfigError, ProtocolError
from fedzo.federation.randomness import pool_seeds
from fedzo.optimizers import SGD, PoolSGD, Records, Schedule, Setup
from fedzo.structures import Frame, IsotropicStructure

SIZE = 333
RNG = np.random.default_rng(5)
POOL = pool_seeds(9, 7)


def theta0() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=SIZE).astype(np.float32))


def records(step: int, steps: int, width: int, pool: bool = False) -> Records:
    seeds = RNG.choice(POOL, (steps, width)) if pool else RNG.integers(0, 2**64, (steps, width), dtype=np.uint64)
    return Records(step, seeds, RNG.normal(size=(steps, width)).astype(np.float32))


def sgd_of(schedule: Schedule, queries: int, family: str, rounding: int = 0) -> SGD:
    return SGD(Setup(schedule, queries, IsotropicStructure(Frame(family)), rounding))


# -- schedules


@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_cosine_is_the_cosine(total: int) -> None:
    schedule = Schedule("cosine", 0.3, total)
    for step in range(total):
        assert abs(schedule(step) - 0.15 * (1 + math.cos(math.pi * step / total))) < 1e-12


def test_linear_constant_and_warm_up() -> None:
    assert [Schedule("linear", 2.0, 4)(step) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert [Schedule("constant", 2.0, 4)(step) for step in range(4)] == [2.0] * 4
    rising = [Schedule("linear", 1.0, 7, warmup_steps=3)(step) for step in range(7)]
    assert rising == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    cosine = Schedule("cosine", 1.0, 7, warmup_steps=3)
    assert [cosine(step) for step in range(3)] == rising[:3] and cosine(3) == 1.0 and abs(cosine(5) - 0.5) < 1e-15


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown learning-rate schedule 'cosin'. Did you mean 'cosine'"):
        Schedule("cosin", 1.0, 5)
    for warmup in (-1, 5):
        with pytest.raises(ConfigError, match=f"warmup_steps is {warmup}"):
            Schedule("linear", 1.0, 5, warmup)


# -- SGD


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
def test_sgd_is_its_formula(family: str) -> None:
    schedule = Schedule("cosine", 0.1, 20, 2)
    sgd, given = sgd_of(schedule, 4, family), [records(3, 2, 5), records(5, 1, 0), records(5, 3, 4)]
    theta, wanted = theta0(), theta0()
    sgd.apply(theta, sgd.init(theta), given)
    for r in given:
        for s in range(len(r.seeds)):
            for seed, g in zip(r.seeds[s].tolist(), r.scalars[s].tolist(), strict=True):
                z = directions.fill(torch.empty(SIZE), seed, family)
                c = torch.tensor(-schedule(r.step + s) / 4 * g, dtype=torch.float32)
                wanted = wanted + c * z  # two roundings: torch does not fuse them
    assert torch.equal(theta, wanted)


def test_sgd_step_by_step_is_sgd_fused() -> None:
    sgd, given = sgd_of(Schedule("linear", 0.1, 40), 4, "rademacher"), [records(4 * i, 4, 6) for i in range(10)]
    fused, stepwise = theta0(), theta0()
    sgd.apply(fused, {}, given)
    for r in given:
        for s in range(4):
            sgd.apply(stepwise, {}, [Records(r.step + s, r.seeds[s : s + 1], r.scalars[s : s + 1])])
    assert torch.equal(fused, stepwise)
    sgd.apply(fused, {}, [])
    assert torch.equal(fused, stepwise)


def test_sgd_snapshot() -> None:
    sgd, moved, other = sgd_of(Schedule("linear", 0.1, 40), 4, "rademacher"), theta0(), theta0()
    sgd.apply(moved, {}, [records(0, 1, 3)])
    data = sgd.snapshot(moved, {})
    assert len(data) == sgd.snapshot_bytes(theta0(), {}) == 4 * SIZE
    sgd.restore(other, {}, data)
    assert torch.equal(other, moved)
    with pytest.raises(ProtocolError, match=f"{4 * SIZE - 1} bytes, wanted {4 * SIZE}"):
        sgd.restore(other, {}, data[:-1])


# -- SGD on a bfloat16 theta


def rounded0() -> Tensor:
    return theta0().to(torch.bfloat16)


def test_rounded_sgd_is_one_rounding_a_step() -> None:
    schedule = Schedule("cosine", 0.1, 20, 2)
    sgd, given = sgd_of(schedule, 4, "rademacher", rounding=11), [records(3, 2, 5), records(5, 1, 0), records(6, 3, 4)]
    theta, wanted = rounded0(), rounded0()
    sgd.apply(theta, {}, given)
    for r in given:
        for s in range(len(r.seeds)):
            low, high = philox.words(11, 2, r.step + s).tolist()
            coefficients = (-schedule(r.step + s) / 4 * r.scalars[s].astype(np.float64)).astype(np.float32)
            directions.replay_rounded(
                wanted, r.seeds[s : s + 1], coefficients[None], "rademacher", np.array([low | high << 32], np.uint64)
            )
    assert torch.equal(theta, wanted) and not torch.equal(theta, rounded0())
    assert torch.allclose(theta.float(), theta0(), atol=3.0)
    other = rounded0()
    sgd_of(schedule, 4, "rademacher", rounding=12).apply(other, {}, given)
    assert not torch.equal(other, theta)


def test_rounded_sgd_step_by_step_is_fused() -> None:
    sgd, given = sgd_of(Schedule("linear", 0.1, 40), 4, "rademacher", 5), [records(2 * i, 2, i % 3) for i in range(10)]
    fused, stepwise = rounded0(), rounded0()
    sgd.apply(fused, {}, given)
    for r in given:
        for s in range(2):
            sgd.apply(stepwise, {}, [Records(r.step + s, r.seeds[s : s + 1], r.scalars[s : s + 1])])
    assert torch.equal(fused, stepwise)


def test_streams_are_counted_by_the_step() -> None:
    sgd = sgd_of(Schedule("linear", 0.1, 40), 4, "rademacher", 5)
    assert sgd.streams(3, 4).tolist() == [int(sgd.streams(step, 1)[0]) for step in range(3, 7)]
    assert np.unique(sgd.streams(0, 1000)).size == 1000


def test_rounded_snapshot_has_two_bytes_a_value() -> None:
    sgd, moved, other = sgd_of(Schedule("linear", 0.1, 40), 4, "rademacher"), rounded0(), rounded0()
    sgd.apply(moved, {}, [records(0, 1, 3)])
    data = sgd.snapshot(moved, {})
    assert len(data) == sgd.snapshot_bytes(moved, {}) == 2 * SIZE
    sgd.restore(other, {}, data)
    assert torch.equal(other, moved)
    with pytest.raises(ProtocolError, match=f"{4 * SIZE} bytes, wanted {2 * SIZE}"):
        sgd.restore(other, {}, SGD.snapshot(sgd, theta0(), {}))
    assert torch.equal(other, moved)


def test_a_pool_refuses_a_rounded_theta() -> None:
    rule = PoolSGD(sgd_of(Schedule("linear", 0.05, 100), 3, "rademacher"), POOL)
    with pytest.raises(ConfigError, match="a pool of seeds needs float32"):
        rule.init(rounded0())


def test_records_have_one_shape() -> None:
    with pytest.raises(ValueError, match=r"must have the shapes \[S, R\] and \[S, C R\]"):
        Records(0, np.zeros((1, 2), np.uint64), np.zeros((1, 3), np.float32))


# -- the pool


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
def test_pool_is_the_direct_sum(family: str) -> None:
    schedule = Schedule("constant", 0.05, 100)
    rule = PoolSGD(sgd_of(schedule, 3, family), POOL)
    given = [records(i, 1, 6, pool=True) for i in range(30)]
    theta = theta0()
    state = rule.apply(theta, rule.init(theta), given)
    coefficients = dict.fromkeys(POOL.tolist(), 0.0)
    for r in given:
        for seed, g in zip(r.seeds.ravel().tolist(), r.scalars.ravel().tolist(), strict=True):
            coefficients[seed] += -schedule(r.step) / 3 * g
    wanted = theta0()
    for seed, c in coefficients.items():
        wanted = wanted + torch.tensor(c, dtype=torch.float32) * directions.fill(torch.empty(SIZE), seed, family)
    assert torch.equal(theta, wanted)
    assert state["coefficients"].tolist() == list(coefficients.values())
    assert torch.equal(state["theta0"], theta0())


def test_pool_grouping_and_snapshot() -> None:
    rule = PoolSGD(sgd_of(Schedule("linear", 0.05, 100), 3, "rademacher"), POOL)
    given = [records(2 * i, 2, 6, pool=True) for i in range(20)]
    fused, stepwise, late = theta0(), theta0(), theta0()
    state = rule.apply(fused, rule.init(fused), given)
    walking = rule.init(stepwise)
    for r in given:
        walking = rule.apply(stepwise, walking, [r])
    assert torch.equal(fused, stepwise)
    data = rule.snapshot(fused, state)
    assert len(data) == rule.snapshot_bytes(theta0(), {}) == 8 * POOL.size
    restored = rule.restore(late, rule.init(late), data)
    assert torch.equal(late, fused)
    more = [records(40, 1, 6, pool=True)]  # the state goes on from there, bit for bit
    rule.apply(late, restored, more)
    rule.apply(stepwise, walking, more)
    assert torch.equal(late, stepwise)
    with pytest.raises(ProtocolError, match="wanted 56"):
        rule.restore(late, restored, data + b"\0")


def test_a_seed_outside_the_pool_is_refused() -> None:
    rule, theta = PoolSGD(sgd_of(Schedule("linear", 0.05, 100), 3, "rademacher"), POOL), theta0()
    with pytest.raises(ProtocolError, match="not in the run's pool of 7"):
        rule.apply(theta, rule.init(theta), [records(0, 1, 2, pool=True), records(1, 1, 2)])
    assert torch.equal(theta, theta0())
