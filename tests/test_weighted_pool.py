"""The seed schedule weighted-pool: FedKSeed-Pro's probabilities, from the ledger alone."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tiny import make_replica, make_spec, rounds_of, start

from fedzo.federation.amplitudes import Amplitudes, _exp
from fedzo.federation.coordinator import replay
from fedzo.federation.ledger import NO_DIGEST, LedgerRound
from fedzo.federation.randomness import pool_seeds, round_seeds


def probabilities(entries: Sequence[LedgerRound], pool: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """The paper's: softmax over seeds of the mean magnitude of each one's scalars, min-max normalised."""
    history: dict[int, list[float]] = defaultdict(list)
    for entry in entries:
        for seed, scalar in zip(entry.seeds.ravel().tolist(), entry.scalars.ravel().tolist(), strict=True):
            history[seed].append(abs(scalar) * len(entry.clients))
    amplitude = np.array([np.mean(history[seed]) if seed in history else 0.0 for seed in pool.tolist()])
    spread = amplitude.max() - amplitude.min()
    normalised = (amplitude - amplitude.min()) / spread if spread else 0.0 * amplitude
    found: npt.NDArray[np.float64] = np.exp(normalised) / np.exp(normalised).sum()
    return found


def test_the_exponential_is_that_of_the_reals_and_never_changes() -> None:
    x = np.linspace(0.0, 1.0, 1001)
    np.testing.assert_allclose(_exp(x), [math.exp(value) for value in x], rtol=4 * 2.0**-52)
    assert [value.hex() for value in _exp(np.array([0.0, 0.1, 1.0])).tolist()] == [
        "0x1.0000000000000p+0", "0x1.1aec7b35a00d4p+0", "0x1.5bf0a8b145769p+1",
    ]  # fmt: skip


def test_weights_are_the_papers_probabilities() -> None:
    rng, pool = np.random.default_rng(0), pool_seeds(5, 9)
    amplitudes, entries = Amplitudes(pool), []
    assert (amplitudes.weights() == 1.0).all()
    for round_ in range(6):
        clients = tuple(range(round_ % 3 + 1))
        width = 0 if round_ == 2 else 2 * len(clients)  # round 2 missed its quorum
        seeds = rng.choice(pool[:7], (3, width))
        scalars = rng.normal(size=(3, width)).astype(np.float32) / len(clients)
        entries.append(LedgerRound(round_, seeds, scalars, clients if width else (), NO_DIGEST))
        amplitudes.add(entries[-1])
        weights = amplitudes.weights()
        assert weights.min() == 1.0 and weights.max() == _exp(np.ones(1))[0]
        np.testing.assert_allclose(weights / weights.sum(), probabilities(entries, pool), rtol=1e-13)
    assert (weights[7:] == 1.0).all()  # never tried


def test_equal_amplitudes_give_equal_weights() -> None:
    pool = pool_seeds(5, 4)
    amplitudes = Amplitudes(pool)
    amplitudes.add(LedgerRound(0, pool[None], np.full((1, 4), -0.5, dtype=np.float32), (0,), NO_DIGEST))
    assert (amplitudes.weights() == 1.0).all()


@pytest.mark.parametrize("clients_per_round", [0, 2])
def test_a_run_draws_by_the_ledger_before_each_round(tmp_path: Path, clients_per_round: int) -> None:
    spec = make_spec(
        seeds="weighted-pool", pool_size=12, local_steps=2, clients_per_round=clients_per_round, aggregation="uniform"
    )
    run = start(tmp_path / "whole", spec)
    run.finish()
    entries, pool = rounds_of(run.ledger), pool_seeds(spec.seed, spec.pool_size)
    uniform = np.full(12, 1.0 / 12.0)
    differs = 0
    for entry in entries:
        chances = probabilities(entries[: entry.round], pool)
        place = (spec.seed, "weighted-pool", entry.round)
        drawn = [round_seeds(*place, client, (2, 3), pool, chances) for client in entry.clients]
        assert np.array_equal(entry.seeds, np.concatenate(drawn, axis=1))
        assert all(len(set(step)) == 3 for client in drawn for step in client.tolist())
        flat = [round_seeds(*place, client, (2, 3), pool, uniform) for client in entry.clients]
        differs += not np.array_equal(entry.seeds, np.concatenate(flat, axis=1))
    assert differs  # the amplitudes had a say


def test_a_run_resumed_in_the_middle_a_replay_and_a_late_joiner_agree(tmp_path: Path) -> None:
    spec = make_spec(seeds="weighted-pool", pool_size=12, local_steps=4, size=200, rounds=8)
    head = start(tmp_path / "whole", spec).finish()
    parts = tmp_path / "parts"
    for _ in range(4):
        run = start(parts, spec)
        run.coordinator.open_round()  # in flight when the process dies
        run.ledger.close()
        run = start(parts, spec)
        run.round()
        run.round()
        kept, rebuilt = run.coordinator._amplitudes, Amplitudes(pool_seeds(spec.seed, spec.pool_size))
        assert kept is not None
        for entry in rounds_of(run.ledger):
            rebuilt.add(entry)
        assert kept.weights().tobytes() == rebuilt.weights().tobytes()
        run.ledger.close()
    resumed = start(parts, spec, clients=[])
    assert resumed.ledger.head == head
    replica = make_replica(spec)
    replay(resumed.ledger, replica)
    assert replica.digest() == resumed.coordinator.replica.digest() == rounds_of(resumed.ledger)[-1].digest

    late = start(tmp_path / "late", spec, clients=[0, 1])
    for _ in range(7):
        late.round()
    newcomer = late.join(2)
    summary = late.round()
    assert late.plans[7, 2][0].catch_up.kind == "snapshot" and summary.accepted == 3
    assert newcomer.replica.digest() == late.plans[7, 2][0].digest == rounds_of(late.ledger)[6].digest


def test_seeds_of_large_scalars_are_drawn_more_often() -> None:
    pool = pool_seeds(5, 10)
    amplitudes = Amplitudes(pool)
    scalars = np.repeat(np.float32([-8.0, 0.0]), 5)[None]
    amplitudes.add(LedgerRound(0, pool[None], scalars, (0,), NO_DIGEST))
    seeds = round_seeds(1, "weighted-pool", 1, 0, (4000, 1), pool, amplitudes.weights())
    share, expected = float(np.isin(seeds, pool[:5]).mean()), math.e / (math.e + 1.0)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1.0 - expected) / 4000)
