import json
import sys
from pathlib import Path

import cells
import pytest
import small_runs
import sparse_vs_full as simulation

ROOT = Path(__file__).resolve().parents[1]


def test_rates_are_looked_for_beside_the_best() -> None:
    def tried(losses: dict[int, float]) -> list[int]:
        found: dict[int, float] = {}
        while len(found) < 4:
            exponent = cells.next_exponent(found)
            found[exponent] = losses[exponent]
        return list(found)

    assert tried({0: 1.0, -1: 0.9, -2: 0.8, -3: 0.7}) == [0, -1, -2, -3]
    assert tried({0: 1.0, -1: 1.1, 1: 0.9, 2: 0.95}) == [0, -1, 1, 2]
    assert tried({0: float("inf"), -1: 0.9, -2: 0.95, 1: 1.0, -3: 1.0}) == [0, -1, -2, -3]


def test_test_split_and_head_are_kept_from_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for kind, test in (("probe", ""), ("trial", ""), ("run", "dev.jsonl")):
        config = simulation.Cell(kind, "minilm-l6", "full", 0, 40).config({})
        assert config.data.test == test
        assert config.federation.rounds * config.data.clients * config.method.queries * 2 in (40, 4)
        assert config.space.include == ("*",) and config.space.exclude == ("*word_embeddings*",)


def test_a_comparison_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    data = {"data.source": str(small_runs.make_data(tmp_path / "data", test=40)), "data.validation": "validation"}
    method, seed = "sensitive", simulation.TUNING_SEED
    pair = ("embedded", method)

    def result(cell: simulation.Cell) -> cells.Result:
        text = json.dumps(simulation.work(cell, data, tmp_path) | {"seconds": 0.0})
        (tmp_path / f"{cell.name}.json").write_text(text)
        found: cells.Result = json.loads(text)
        return found

    start = result(simulation.Cell("probe", *pair, seed))
    rate = start["learning_rate"]
    assert 0 < rate < 1e3 and start["curvature"] > 0
    trial = result(simulation.Cell("trial", *pair, seed, 8, rate))
    assert trial["test"] == {} and list(trial["validation"]) == ["0", "2"]
    run = result(simulation.Cell("run", *pair, 0, 16, rate))
    assert list(run["test"]) == ["0", "4"] and list(run["validation"]) == ["0", "1", "2", "3", "4"]
    assert run["test"]["0"] != run["test"]["4"]

    options = ["--models", "embedded", "--methods", f"{method},head", "--trials", "1", "--forwards", "16"]
    options += ["--trial-forwards", "8", "--seeds", "0,1", "--out", str(tmp_path), "--report"]
    monkeypatch.setattr(sys, "argv", ["sparse_vs_full.py", *options])
    simulation.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = figures["rows"]
    assert figures["missing"] == [simulation.Cell("run", *pair, 1, 16, rate).name]
    assert (row["method"], row["seeds"], row["forwards"], row["learning_rate"]) == (method, 1, 16, rate)
    assert row["validation_curve"][-1][1] == round(run["validation"]["4"]["accuracy"], 4)
    assert row["test_accuracy"] == round(run["test"]["4"]["accuracy"], 4)
    assert f"| embedded | {method} |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
