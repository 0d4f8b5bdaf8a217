"""simulations/attacks.py: each attack against the real coordinator, with the embedded model on a few examples."""

import json
import math
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attacks as simulation
import numpy as np
import pytest
import small_runs
import torch
from attacks import AGGREGATIONS, ATTACKS, Cell, View

from fedzo import engine
from fedzo.config import Config
from fedzo.experiment import Experiment
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import Contribution
from fedzo.run_folder import RunFolder

ROUNDS, ATTACKERS = 3, frozenset({1})
RNG = np.random.default_rng(5)


def view(honest: np.ndarray, attackers: int = 3, earlier: Contribution | None = None) -> View:
    return View(honest, attackers, 1e4, earlier, np.random.default_rng(1))


def answer(scalars: np.ndarray, round_: int = 4) -> Contribution:
    seeds = np.arange(scalars.size, dtype=np.uint64).reshape(scalars.shape) + np.uint64(100 * round_)
    return Contribution(b"8 bytes.", round_, 1, seeds, scalars.astype(np.float32), 20, 0.5)


HONEST = RNG.normal(1.0, 2.0, size=(7, 2, 3))
RIGHT = answer(HONEST[0])


def sent(name: str, seen: View | None = None, right: Contribution = RIGHT) -> Contribution:
    attack = ATTACKS[name]
    assert attack is not None
    found = attack(right, view(HONEST) if seen is None else seen)
    assert found is not None
    assert (found.run_id, found.client, found.examples) == (right.run_id, right.client, right.examples)
    return found


def test_what_attackers_send() -> None:
    assert np.array_equal(sent("sign flip").scalars, -RIGHT.scalars)
    assert np.array_equal(sent("sign flip, overstated").scalars, -RIGHT.scalars)
    np.testing.assert_allclose(sent("x1000").scalars, 1000 * RIGHT.scalars, rtol=1e-6)
    found = sent("NaN").scalars
    assert np.isnan(found[0, 0]) and np.isnan(found).sum() == 1
    assert ATTACKS["none"] is None and ATTACKS["absent"](RIGHT, view(HONEST)) is None  # type: ignore[misc]


@pytest.mark.parametrize(("name", "factor"), [("Gaussian", 1.0), ("Gaussian x100", 100.0)])
def test_noise_has_the_scale_of_the_honest_scalars(name: str, factor: float) -> None:
    honest = RNG.normal(0.0, 3.0, size=(7, 1, 4000))
    found = sent(name, view(honest), answer(honest[0]))
    assert math.sqrt(np.mean(found.scalars.astype(float) ** 2)) == pytest.approx(3.0 * factor, rel=0.05)
    assert abs(np.corrcoef(found.scalars[0], honest[0, 0])[0, 1]) < 0.1


def test_stale_answers_forge_what_they_say() -> None:
    earlier = answer(HONEST[1], 3)
    seen = view(HONEST, earlier=earlier)
    assert sent("stale", seen) is not RIGHT and sent("stale", seen).to_bytes() == earlier.to_bytes()
    forged = sent("stale, round forged", seen)
    assert forged.round == 4 and np.array_equal(forged.seeds, earlier.seeds)
    whole = sent("stale, seeds forged too", seen)
    assert whole.round == 4 and np.array_equal(whole.seeds, RIGHT.seeds)
    assert np.array_equal(whole.scalars, earlier.scalars)
    for name in ("stale", "stale, round forged", "stale, seeds forged too"):
        assert sent(name).to_bytes() == RIGHT.to_bytes()  # in the first round there is nothing earlier


def test_a_little_is_enough_hides_within_the_deviation() -> None:
    """Ten clients, three of them attackers: z = 0.18 of the paper's formula."""
    mean, deviation = HONEST.mean(axis=0), HONEST.std(axis=0)
    found = sent("a little is enough").scalars
    z = statistics.NormalDist().inv_cdf(4 / 7)
    assert z == pytest.approx(0.18, abs=0.001)
    np.testing.assert_allclose((mean - found) * np.sign(mean) / deviation, z, rtol=1e-4)


@pytest.mark.parametrize("name", ["opposed", "opposed, extreme"])
def test_adaptive_attacks_stay_just_within_a_bound(name: str) -> None:
    mean, found = HONEST.mean(axis=0), sent(name).scalars.astype(float)
    cosine = (mean * found).sum() / np.linalg.norm(mean) / np.linalg.norm(found)
    assert cosine == pytest.approx(-1.0)
    if name == "opposed":
        assert np.linalg.norm(found) == pytest.approx(np.median(np.sqrt((HONEST**2).sum(axis=(1, 2)))), rel=1e-6)
    else:
        assert 0.99e4 < np.abs(found).max() < 1e4


def test_attackers_are_a_share_of_the_clients() -> None:
    chosen = [simulation.choose_attackers(10, 0.3, seed) for seed in range(20)]
    assert all(len(one) == 3 and one <= set(range(10)) for one in chosen)
    assert len(set(chosen)) > 10 and chosen[0] == simulation.choose_attackers(10, 0.3, 0)


# -- runs


def small(data: Path, aggregation: str) -> Config:
    return small_runs.config(
        data, federation__aggregation=aggregation, federation__trim=0.34, federation__rounds=ROUNDS,
        evaluation__every=0, evaluation__divergence=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def experiment(data: Path) -> Iterator[Experiment]:
    threads = torch.get_num_threads()
    yield Experiment(small(data, "mean"))
    torch.set_num_threads(threads)


def play(experiment: Experiment, data: Path, path: Path, attack: str, aggregation: str = "mean") -> Ledger:
    experiment.config = small(data, aggregation)
    meet = partial(simulation.connect, name=attack, attackers=ATTACKERS, seed=0)
    return engine.run(experiment, RunFolder.create(path, experiment.config), connect=meet)


def norms(ledger: Ledger) -> list[float]:
    return [float(np.linalg.norm(entry.scalars)) for entry in ledger.read()]


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_what_the_validator_drops(experiment: Experiment, data: Path, tmp_path: Path, attack: str) -> None:
    wanted = {
        "absent": {"no-reply": 3},
        "NaN": {"not-finite": 3},
        "stale": {"late": 2, "no-reply": 2},
        "stale, round forged": {"seeds": 2},
    }
    with play(experiment, data, tmp_path / "run", attack, "norm-bound") as ledger:
        dropped = [summary["dropped"] for summary in ledger.summaries()]
        taken = [len(entry.clients) for entry in ledger.read()]
        own = norms(ledger)
    counts = {reason: sum(one.get(reason, 0) for one in dropped) for one in dropped for reason in one}
    if attack != "x1000":  # may be within the bound or not
        assert counts == wanted.get(attack, {})
    assert taken == [3 - (1 if one else 0) for one in dropped]
    assert max(own) < 100  # whatever is let through, norm-bound absorbs


def test_dropped_answers_leave_the_ledger_of_absent_clients(experiment: Experiment, data: Path, tmp_path: Path) -> None:
    with (
        play(experiment, data, tmp_path / "a", "absent") as absent,
        play(experiment, data, tmp_path / "b", "NaN") as nan,
    ):
        assert nan.head == absent.head


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_extreme_attacker_owns_the_mean_only(
    experiment: Experiment, data: Path, tmp_path: Path, aggregation: str
) -> None:
    with play(experiment, data, tmp_path / "run", "opposed, extreme", aggregation) as ledger:
        (first, *_) = norms(ledger)
    assert first > 3000 if aggregation == "mean" else first < 100


def test_overstated_examples_own_the_mean_only(experiment: Experiment, data: Path, tmp_path: Path) -> None:
    records = {}
    for name, attack, aggregation in (
        ("plain", "sign flip", "mean"),
        ("overstated", "sign flip, overstated", "mean"),
        ("bounded", "sign flip", "norm-bound"),
        ("both", "sign flip, overstated", "norm-bound"),
    ):
        with play(experiment, data, tmp_path / name, attack, aggregation) as ledger:
            records[name] = next(iter(ledger.read())).scalars
            assert not any(summary["dropped"] for summary in ledger.summaries())
            stated = ledger.members()[1]["examples"]
            assert (stated == simulation.CLAIM) == ("overstated" in attack)
    assert not np.allclose(records["plain"], records["overstated"], rtol=0.01)
    assert np.array_equal(records["bounded"], records["both"])


def test_a_comparison_and_its_report(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    comparison = simulation.Comparison(lambda seed, aggregation: small(data, aggregation), 0.34, tmp_path)
    comparison._held = 0, Experiment(small(data, "mean"))
    results = {}
    for attack in ("none", "NaN"):
        for aggregation in ("mean", "norm-bound"):
            cell = Cell(attack, aggregation, 0)
            results[cell] = comparison._work(cell)
            (tmp_path / f"{cell.name}.json").write_text(json.dumps(results[cell]))
    torch.set_num_threads(threads)
    options = ["--out", str(tmp_path), "--seeds", "1", "--attacks", "none;NaN", "--report"]
    monkeypatch.setattr(sys, "argv", ["attacks.py", *options])
    simulation.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("missing: ") for line in lines) == 4
    rows = {(row["attack"], row["aggregation"]): row for row in json.loads(lines[-1])["rows"]}
    assert set(rows) == {(cell.attack, cell.aggregation) for cell in results}
    assert rows["NaN", "mean"]["dropped"] == {"not-finite": 3} and rows["NaN", "mean"]["answers"] == 3
    assert rows["none", "mean"]["accuracy"] == results[Cell("none", "mean", 0)]["accuracy"]
    text = (tmp_path / "table.md").read_text()
    assert "| NaN | not-finite 100% |" in text and "| none | nothing |" in text
    assert (tmp_path / "attacks.png").stat().st_size > 5000
