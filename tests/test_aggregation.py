"""Aggregation: clients' scalars -> records."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import make_spec, rounds_of, start

from fedzo.federation.aggregation import AGGREGATORS, WEIGHINGS, Settings
from fedzo.federation.messages import Contribution, decode

RNG = np.random.default_rng(0)
LARGEST = float(np.finfo(np.float32).max)


def stacks(magnitude: float, least: int = 1) -> st.SearchStrategy[np.ndarray]:
    """Scalars [n, K, P] of float32 values up to a magnitude."""
    shape = st.tuples(st.integers(least, 9), st.integers(1, 2), st.integers(1, 3))
    return hnp.arrays(np.float32, shape, elements=st.floats(-magnitude, magnitude, width=32)).map(
        lambda found: found.astype(np.float64)
    )


def norms(scalars: np.ndarray) -> np.ndarray:
    """Of each client."""
    return np.sqrt((scalars**2).sum(axis=(1, 2)))


def bounded(scalars: np.ndarray, bound: float = 0.0) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AGGREGATORS["norm-bound"](scalars, np.full(len(scalars), np.nan), Settings(norm_bound=bound))


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_against_numpy(n: int) -> None:
    scalars = RNG.normal(size=(n, 2, 3))
    counts = RNG.integers(1, 50, n)
    weights = counts / counts.sum()
    cut = int(0.2 * n)
    ordered = np.sort(scalars, axis=0)
    lower = np.sort(norms(scalars))[(n - 1) // 2]
    for name, bound, wanted in (
        ("mean", 0.0, np.average(scalars, axis=0, weights=counts)),
        ("uniform", 0.0, scalars.mean(axis=0)),
        ("median", 0.0, np.median(scalars, axis=0)),
        ("trimmed-mean", 0.0, ordered[cut : n - cut].mean(axis=0)),
        ("norm-bound", 1.5, (scalars * np.minimum(1, 1.5 / norms(scalars))[:, None, None]).mean(axis=0)),
        ("norm-bound", 0.0, (scalars * np.minimum(1, lower / norms(scalars))[:, None, None]).mean(axis=0)),
    ):
        found = AGGREGATORS[name](scalars, weights, Settings(0.2, bound))
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


@given(stacks(9), st.floats(0, 0.49))
def test_every_aggregate_lies_between_the_clients(scalars: np.ndarray, trim: float) -> None:
    """Or between them and 0, where they are scaled down."""
    weights = np.full(len(scalars), 1 / len(scalars))
    for name, aggregate in AGGREGATORS.items():
        result = aggregate(scalars, weights, Settings(trim))
        low, high = scalars.min(axis=0), scalars.max(axis=0)
        if name == "norm-bound":
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        assert result.shape == scalars.shape[1:] and result.dtype == np.float64
        assert (result >= low - 1e-12).all() and (result <= high + 1e-12).all()


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "norm-bound"])
def test_robust_aggregates_ignore_one_liar_of_five(name: str) -> None:
    scalars = RNG.normal(size=(5, 1, 4))
    scalars[3] = 1e4
    result = AGGREGATORS[name](scalars, np.array([0.01, 0.01, 0.01, 0.96, 0.01]), Settings(0.2))
    assert np.abs(result).max() < 5


def test_the_order_of_sums_is_fixed() -> None:
    """Equal bits whatever numpy's own summation does: left to right by client."""
    scalars = np.array([1e16, 1.0, -1e16, 1.0]).reshape(4, 1, 1)
    assert AGGREGATORS["mean"](scalars, np.ones(4), Settings())[0, 0] == 1.0


# -- norm-bound


@given(stacks(100), st.floats(1e-3, 1e3))
def test_a_fixed_bound_bounds_what_one_client_can_do(scalars: np.ndarray, bound: float) -> None:
    """Whatever it sends, the aggregate moves by at most twice the bound over n, in L2."""
    other = scalars.copy()
    other[0] = RNG.choice([-LARGEST, LARGEST, 0.0], size=other[0].shape)
    moved = np.linalg.norm(bounded(scalars, bound) - bounded(other, bound))
    assert moved <= 2 * bound / len(scalars) * (1 + 1e-9)


@given(stacks(100), st.data())
def test_a_minority_is_bounded_by_the_norms_of_the_others(scalars: np.ndarray, data: st.DataObject) -> None:
    """Without a bound to tune: fewer than half cannot lift the aggregate above the largest norm of the rest."""
    liars = data.draw(st.integers(0, (len(scalars) - 1) // 2))
    worst = norms(scalars[liars:]).max()
    scalars[:liars] = LARGEST * RNG.choice([-1.0, 1.0], size=scalars[:liars].shape)
    assert np.linalg.norm(bounded(scalars)) <= worst * (1 + 1e-9)


@given(stacks(100))
def test_within_the_bound_it_is_the_uniform_mean_bit_for_bit(scalars: np.ndarray) -> None:
    wanted = AGGREGATORS["uniform"](scalars, np.full(len(scalars), np.nan), Settings())
    bound = float(norms(scalars).max()) * (1 + 1e-12) or 1.0
    assert np.array_equal(bounded(scalars, bound), wanted)


@given(stacks(100), st.sampled_from([0.0, 0.5, 30.0]), st.randoms())
def test_the_order_of_clients_does_not_matter(scalars: np.ndarray, bound: float, random: Any) -> None:
    order = list(range(len(scalars)))
    random.shuffle(order)
    np.testing.assert_allclose(bounded(scalars[order], bound), bounded(scalars, bound), rtol=1e-9, atol=1e-12)


@given(stacks(LARGEST), st.sampled_from([0.0, 1e-300, 1.0, LARGEST, 1e300]))
def test_no_finite_float32_makes_it_anything_else(scalars: np.ndarray, bound: float) -> None:
    result = bounded(scalars, bound)
    assert np.isfinite(result).all() and np.isfinite(result.astype(np.float32)).all()
    if bound:
        assert np.linalg.norm(result) <= bound * (1 + 1e-9)


@given(stacks(100, least=2), st.floats(1e-3, 1e3))
def test_the_median_bound_scales_with_the_scalars(scalars: np.ndarray, factor: float) -> None:
    """It needs no tuning: other units, the same aggregate in other units."""
    np.testing.assert_allclose(bounded(scalars * factor), bounded(scalars) * factor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seeds", ["shared", "independent", "pool", "weighted-pool"])
@pytest.mark.parametrize("bound", [0.0, 2.0])
def test_records_of_every_seed_schedule_are_bounded(tmp_path: Path, seeds: str, bound: float) -> None:
    """Each client's own scalars of a round are scaled by the same factor, whoever's seeds they are of."""
    spec = make_spec(seeds=seeds, aggregation="norm-bound", norm_bound=bound, local_steps=2)
    run, sent = start(tmp_path, spec), {}

    def listen(round_: int, client: int, data: bytes) -> list[bytes]:
        message = decode(data)
        assert isinstance(message, Contribution)
        sent[client] = message.scalars.astype(np.float64)
        return [data]

    run.round(listen)
    (entry,) = rounds_of(run.ledger)
    found = np.stack([sent[client] for client in range(4)])
    limit = bound or np.sort(norms(found))[1]
    factors = np.minimum(1.0, limit / norms(found)) / 4
    assert factors.min() < 0.25
    scaled = found * factors[:, None, None]
    wanted = scaled.sum(axis=0) if seeds == "shared" else np.concatenate(list(scaled), axis=1)
    np.testing.assert_allclose(entry.scalars, wanted, rtol=1e-6)


@pytest.mark.parametrize("seeds", ["shared", "independent"])
def test_numbers_of_another_scale_are_bounded_apart(tmp_path: Path, seeds: str) -> None:
    """Curvatures and first-order gradients have their own median norm."""
    hybrid = {"first_order": "head*", "first_order_optimizer": "sgd", "first_order_rate": 0.02}
    spec = make_spec(
        seeds=seeds, aggregation="norm-bound", estimator="hizoo", optimizer="hizoo", family="gaussian",
        settings={"smoothing": 1e-3} | hybrid,
    )  # fmt: skip
    run, sent = start(tmp_path, spec), {}

    def listen(round_: int, client: int, data: bytes) -> list[bytes]:
        message = decode(data)
        assert isinstance(message, Contribution)
        sent[client] = message
        return [data]

    run.round(listen)
    (entry,) = rounds_of(run.ledger)
    assert entry.gradients is not None

    def scaled(part: Any) -> np.ndarray:
        found = np.stack([part(sent[client]).astype(np.float64) for client in range(4)])
        assert norms(found).max() > np.sort(norms(found))[1]
        return found * (np.minimum(1.0, np.sort(norms(found))[1] / norms(found)) / 4)[:, None, None]

    projected, second = scaled(lambda message: message.scalars[:, :3]), scaled(lambda message: message.scalars[:, 3:])
    join = (lambda part: part.sum(axis=0)) if seeds == "shared" else (lambda part: np.concatenate(list(part), axis=1))
    np.testing.assert_allclose(entry.scalars, np.concatenate([join(projected), join(second)], axis=1), rtol=1e-6)
    gradients = scaled(lambda message: message.gradients).sum(axis=0)
    np.testing.assert_allclose(entry.gradients, gradients, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(sorted(WEIGHINGS)), stacks(100))
def test_a_weighing_is_the_aggregate_client_by_client(name: str, scalars: np.ndarray) -> None:
    weights = RNG.dirichlet(np.ones(len(scalars)))
    factors = WEIGHINGS[name](scalars, weights, Settings())
    assert factors.shape == (len(scalars),) and (factors >= 0).all() and factors.sum() <= 1 + 1e-12
    summed = (scalars * factors[:, None, None]).sum(axis=0)
    np.testing.assert_allclose(AGGREGATORS[name](scalars, weights, Settings()), summed, rtol=1e-9, atol=1e-12)
