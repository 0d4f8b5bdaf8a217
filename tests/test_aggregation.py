"""Aggregation: clients' scalars -> records."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedzo.federation.aggregation import AGGREGATORS, NEEDS_SHARED_SEEDS

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_against_numpy(n: int) -> None:
    scalars = RNG.normal(size=(n, 2, 3))
    counts = RNG.integers(1, 50, n)
    weights = counts / counts.sum()
    cut = int(0.2 * n)
    ordered = np.sort(scalars, axis=0)
    for name, wanted in (
        ("mean", np.average(scalars, axis=0, weights=counts)),
        ("uniform", scalars.mean(axis=0)),
        ("median", np.median(scalars, axis=0)),
        ("trimmed-mean", ordered[cut : n - cut].mean(axis=0)),
    ):
        np.testing.assert_allclose(AGGREGATORS[name](scalars, weights, 0.2), wanted, rtol=1e-12, atol=1e-15)


@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(1, 9), st.integers(1, 2), st.integers(1, 3)), elements=st.floats(-9, 9)
    ),
    st.floats(0, 0.49),
)
def test_every_aggregate_lies_between_the_clients(scalars: np.ndarray, trim: float) -> None:
    weights = np.full(len(scalars), 1 / len(scalars))
    for aggregate in AGGREGATORS.values():
        result = aggregate(scalars, weights, trim)
        assert result.shape == scalars.shape[1:] and result.dtype == np.float64
        assert (result >= scalars.min(axis=0) - 1e-12).all() and (result <= scalars.max(axis=0) + 1e-12).all()


@pytest.mark.parametrize("name", sorted(NEEDS_SHARED_SEEDS))
def test_robust_aggregates_ignore_one_liar_of_five(name: str) -> None:
    scalars = RNG.normal(size=(5, 1, 4))
    scalars[3] = 1e4
    result = AGGREGATORS[name](scalars, np.array([0.01, 0.01, 0.01, 0.96, 0.01]), 0.2)
    assert np.abs(result).max() < 5


def test_the_order_of_sums_is_fixed() -> None:
    """Equal bits whatever numpy's own summation does: left to right by client."""
    scalars = np.array([1e16, 1.0, -1e16, 1.0]).reshape(4, 1, 1)
    assert AGGREGATORS["mean"](scalars, np.ones(4), 0.0)[0, 0] == 1.0
