"""Choices that a seed decides."""

import itertools

import numpy as np
import pytest

from fedzo.federation.randomness import (
    bernoulli,
    choose,
    choose_weighted,
    derive,
    pool_seeds,
    round_seeds,
    words64,
)
from fedzo.federation.spec import POOLS


def test_places_have_streams_of_their_own() -> None:
    places = [("batch", r, c, k) for r, c, k in itertools.product(range(12), repeat=3)]
    places += [("directions", r) for r in range(12)] + [("sampling", r) for r in range(12)]
    seeds = {derive(seed, *place) for seed in (0, 1, 2**63 - 1) for place in places}
    assert len(seeds) == 3 * len(places)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive(1, "a", 23) != derive(1, "a", 2, 3) != derive(12, "a", 3)


def test_values_never_change() -> None:
    """Fixed values: a ledger written today must be resumed alike tomorrow."""
    import hashlib

    assert derive(7, "batch", 3) == int.from_bytes(hashlib.sha256(b"7/batch/3").digest()[:8], "little")
    # Philox4x32-10 with counter 0 and key 0 (Random123's published vector).
    assert [f"{word:016x}" for word in words64(0, 2).tolist()] == ["e169c58d6627e8d5", "9b00dbd8bc57ac4c"]


def test_words_are_a_prefix_of_the_stream() -> None:
    assert words64(5, 9).dtype == np.uint64
    assert np.array_equal(words64(5, 9)[:4], words64(5, 4))
    assert words64(5, 0).shape == (0,)


def test_choose_takes_every_subset_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        picked = choose(seed, 4, 2)
        counts[tuple(picked.tolist())] = counts.get(tuple(picked.tolist()), 0) + 1
    assert set(counts) == set(itertools.combinations(range(4), 2))
    # chi-square with 5 degrees of freedom: 20.5 is the 0.999 quantile; the seeds are fixed, so this cannot flicker
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5


def test_choose_at_its_ends() -> None:
    assert choose(0, 3, 3).tolist() == choose(0, 3, 9).tolist() == [0, 1, 2]
    assert choose(0, 3, 0).tolist() == [] and choose(0, 0, 4).tolist() == []


def test_weighted_choice_draws_by_what_is_left() -> None:
    """The chance of a pair by the definition: the first by its weight of all, the second by its weight of the rest."""
    weights = np.array([1.0, 2.0, 1.5, np.e])
    total, draws, counts = weights.sum(), 8000, dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for seed in range(draws):
        counts[tuple(choose_weighted(seed, weights, 2).tolist())] += 1
    deviation = 0.0
    for (i, j), count in counts.items():
        a, b = weights[i] / total, weights[j] / total
        expected = draws * a * b * (1.0 / (1.0 - a) + 1.0 / (1.0 - b))
        deviation += (count - expected) ** 2 / expected
    assert deviation < 20.5  # as above


def test_weighted_choice_at_its_ends_and_its_values() -> None:
    weights = np.linspace(1.0, np.e, 40)
    assert choose_weighted(3, weights, 40).tolist() == list(range(40))  # many repetitions are skipped
    assert choose_weighted(3, weights, 1).tolist() == choose_weighted(3, 8.0 * weights, 1).tolist()
    words = words64(derive(0, "x"), 64) >> np.uint64(11)
    fractions = [int(word) / 2**53 for word in words]
    first = list(dict.fromkeys(int(10 * fraction) for fraction in fractions))[:6]
    assert choose_weighted(derive(0, "x"), np.ones(10), 6).tolist() == sorted(first)


def test_bernoulli_has_its_rate() -> None:
    hits = sum(bernoulli(seed, 50, 0.3).size for seed in range(400))
    assert abs(hits / 20000 - 0.3) < 0.01  # standard deviation 0.003
    assert bernoulli(1, 50, 1.0).tolist() == list(range(50))
    assert bernoulli(1, 50, 0.0).size == 0


def test_pool_has_different_seeds() -> None:
    pool = pool_seeds(3, 4096)
    assert np.unique(pool).size == 4096 and pool.dtype == np.uint64
    assert np.array_equal(pool[:10], pool_seeds(3, 10)) and not np.array_equal(pool, pool_seeds(4, 4096))


@pytest.mark.parametrize("schedule", ["shared", "independent", "pool", "weighted-pool"])
def test_round_seeds(schedule: str) -> None:
    pool = pool_seeds(1, 8) if schedule in POOLS else None

    def seeds(round_: int, client: int) -> np.ndarray:
        return round_seeds(1, schedule, round_, client, (3, 5), pool, np.linspace(1.0, 2.0, 8))

    assert seeds(0, 0).shape == (3, 5) and seeds(0, 0).dtype == np.uint64
    assert np.array_equal(seeds(2, 1), seeds(2, 1))
    assert not np.array_equal(seeds(2, 1), seeds(3, 1))
    assert np.array_equal(seeds(2, 1), seeds(2, 0)) == (schedule == "shared")
    for step in seeds(4, 2):
        assert np.unique(step).size == 5
    if pool is not None:
        assert np.isin(seeds(4, 2), pool).all()
