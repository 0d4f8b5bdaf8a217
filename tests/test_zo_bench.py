import json
import math
import sys
from pathlib import Path
from typing import Any

import cells
import pytest
import torch
import zo_bench
import zo_tables
from cells import MissingError, Player, Result
from zo_bench import Cell, Options

from fedzo.errors import ConfigError, SpaceError
from fedzo.evaluation import candidate_scores, losses_from_scores
from fedzo.experiment import Experiment
from fedzo.federation.randomness import choose, derive
from fedzo.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def options(out: Path, **changes: Any) -> Options:
    chosen: dict[str, Any] = {
        "out": out, "tasks": ("embedded",), "schemes": ("full", "lora"), "methods": ("backprop-adam", "zo-sgd"),
        "seeds": 2, "best": 1, "trials": 2, "forwards": 0, "trial_forwards": 0, "long": 2, "examples": 60,
        "validation": 16,
    }  # fmt: skip
    return Options(**chosen | changes)


def figures(method: str, loss: float, reference: bool = False, scheme: str = "full", **changes: Any) -> Result:
    """A run of 40 forwards that gets from 20% to 60%."""
    run = {
        "trainable": 1000, "queries": 1, "forwards_a_step": 2.0, "rounds": 20, "bytes_sent": 1234, "state": 2,
        "peak_bytes": 3 * 2**20, "cpu_seconds_a_round": 0.5, "test": {"0": {"accuracy": 0.2, "loss": 2.0}},
        "validation": {"0": {"accuracy": 0.2, "loss": 2.0}, "10": {"accuracy": 0.4, "loss": 1.0}},
    }  # fmt: skip
    last = {"20": {"accuracy": 0.6, "loss": loss}}
    runs = [run | {split: {**run[split], **last} for split in ("validation", "test")}]  # type: ignore[dict-item]
    return zo_tables.row(("embedded", scheme, method), reference, 0.01, runs, None) | changes


@pytest.mark.parametrize(
    "method, forwards",
    [
        ("zo-sgd", 2),
        ("zo-sgd-cons", 2 + 3),
        ("one-point", 3 + 1),
        ("fzoo", 7 + 1),
        ("backprop-adam", 3),
        ("mezo-svrg", 2 * (30 / 8) / 5 + 4 * 4 / 5),
    ],
)
def test_a_budget_counts_all_forwards_of_a_step(tmp_path: Path, method: str, forwards: float) -> None:
    """A client has 30 examples; an anchor is over all of them."""
    for budget in (40, 41, 160):
        config = Cell("run", "embedded", "full", method, 0, budget).config(options(tmp_path))
        assert config.federation.rounds == int(budget / forwards)
        assert config.method.batch_size == zo_bench.BATCH and config.data.clients == zo_bench.CLIENTS


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_configured_or_refused_with_a_reason(tmp_path: Path, method: str) -> None:
    refused = {}
    for scheme in zo_bench.SCHEMES:
        cell = Cell("run", "embedded", scheme, method, 0, 160)
        try:
            config = cell.config(options(tmp_path))
        except ConfigError as error:
            refused[scheme] = str(error)
            continue
        assert config.method.estimator == METHODS[method].estimator
        assert config.federation.rounds * zo_bench.step_forwards(config) <= 160
    assert len(refused) < len(zo_bench.SCHEMES)
    assert all(reason and cell.name not in reason for reason in refused.values())
    if method == "qzo":
        assert set(refused) == set(zo_bench.SCHEMES) - {"scales"} and "space.kind" in refused["full"]


def test_a_trial_and_a_run_have_evaluations_of_their_own(tmp_path: Path) -> None:
    every = {
        kind: Cell(kind, "embedded", "full", "zo-sgd", 0, 64).config(options(tmp_path)).evaluation.every
        for kind in ("trial", "run", "long")
    }
    assert every == {"trial": 0, "run": 32 // 4, "long": 32 // 16}


def test_a_step_beyond_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one step takes 8 forward passes, more than the budget of 7"):
        Cell("run", "embedded", "full", "fzoo", 0, 7).config(options(tmp_path))


def test_trials_know_no_test_split_and_another_seed(tmp_path: Path) -> None:
    seen: list[Cell] = []

    def play(cell: Cell) -> Result:
        seen.append(cell)
        return {
            "learning_rate": 1e-3,
            "validation": {"0": {"loss": 1.0}, "9": {"loss": abs(cell.learning_rate - 9e-3)}},
        }

    rate = zo_bench.tuned(play, options(tmp_path, trials=3), ("embedded", "lora", "zo-sgd"))
    assert rate == pytest.approx(9e-3)
    assert [cell.kind for cell in seen] == ["probe", "trial", "trial", "trial"]
    for cell in seen:
        assert cell.seed not in range(100) and cell.config(options(tmp_path)).data.test == ""
    assert Cell("run", "embedded", "lora", "zo-sgd", 0, 40).config(options(tmp_path)).data.test


def test_rates_are_looked_for_upwards() -> None:
    tried: dict[int, float] = {}
    for loss in (1.0, 1.1, 0.9, 0.95):
        tried[cells.next_exponent(tried, up=True)] = loss
    assert list(tried) == [0, 1, -1, -2]
    assert cells.next_exponent({0: 1.0, 1: math.inf}, up=True) == -1


def test_methods_share_what_is_found_at_the_start(tmp_path: Path) -> None:
    for scheme in zo_bench.SCHEMES:
        shared = [zo_bench.slopes_of(Cell("probe", "embedded", scheme, m, 1000)) for m in ("fzoo", "zo-adam", "quzo")]
        assert len(set(shared)) == 1 and shared[0].name.startswith("slopes-")
        assert shared[0].config(options(tmp_path)).space.kind == zo_bench.SCHEMES[scheme]["space.kind"]


def test_the_level_is_found_between_evaluations() -> None:
    curve = [(0.0, 0.2), (10.0, 0.4), (20.0, 0.3), (40.0, 0.7)]
    assert zo_tables.reach(curve, 0.1) == 0.0
    assert zo_tables.reach(curve, 0.3) == pytest.approx(5.0)
    assert zo_tables.reach(curve, 0.5) == pytest.approx(30.0)
    assert zo_tables.reach(curve, 0.71) is None


def test_goals_are_the_best_methods_and_a_longer_run_decides() -> None:
    reference = figures("backprop-adam", 0.1, True, validation_accuracy=0.8, curve=[(0.0, 0.2), (30.0, 0.8)])
    good, bad = figures("zo-sgd", 0.5), figures("zo-adam", 0.6)
    (goal,) = zo_tables.goals([bad, reference, good])
    assert (goal["method"], goal["reference"], goal["forwards"], goal["within"]) == (
        "zo-sgd",
        "backprop-adam",
        None,
        40,
    )
    assert goal["level"] == pytest.approx(0.2 + 0.95 * 0.6) and goal["reference_forwards"] == pytest.approx(28.5)
    assert zo_tables.unreached([bad, reference, good]) == [good]
    assert zo_tables.best([bad, reference, good], 1) == [reference, good]
    longer = good | {"long_curve": [(0.0, 0.2), (400.0, 1.0)]}
    (goal,) = zo_tables.goals([bad, reference, longer])
    assert goal["forwards"] == pytest.approx(400 * 0.57 / 0.8) and zo_tables.unreached([bad, reference, longer]) == []


def test_a_table_has_all_methods_and_the_reasons_of_those_that_are_missing() -> None:
    rows = [figures("zo-sgd", 0.5), figures("zo-adam", 0.6, seeds=2), figures("backprop-sgd", 0.7, True)]
    reasons = {("embedded", "full", "qzo"): "not valid: because", ("embedded", "lora", "zo-sgd"): "failed: no disk"}
    text = zo_tables.table(rows, reasons)
    assert "| zo-sgd | **60.0%** | - |" in text and "| qzo | - | - |" in text
    assert "- qzo: not valid: because" in text and "- zo-sgd: failed: no disk" in text
    lines = [line for line in text.splitlines() if line.startswith(("| *back", "| zo-sgd | 6", "| zo-adam | 60.0% ("))]
    assert lines == [
        "| *backprop-sgd* | 60.0% | 0.700 | 40 | 2 | 0.01 | 3 | 0.500 | 1,234 | 2 |",
        "| zo-sgd | 60.0% | 0.500 | 40 | 2 | 0.01 | 3 | 0.500 | 1,234 | 2 |",
        "| zo-adam | 60.0% (60.0% to 60.0%) | 0.600 (0.600 to 0.600) | 40 | 2 | 0.01 | 3 | 0.500 | 1,234 | 2 |",
    ]


class Fake:
    def __init__(self, name: str) -> None:
        self.name = name


def fake_work(cell: Fake) -> Result:
    if cell.name == "invalid":
        raise SpaceError("no such\nspace")
    if cell.name == "broken":
        raise ValueError("a bug")
    if cell.name == "killed":
        sys.exit(3)
    return {"answer": 42}


def test_a_failing_cell_says_why_and_is_tried_again(tmp_path: Path) -> None:
    play = Player(tmp_path, fake_work, "fork")
    assert play(Fake("fine"))["answer"] == 42
    for name, reason in (
        ("invalid", "not valid: no such space"),
        ("broken", "failed: ValueError: a bug"),
        ("killed", "failed: its process ended with exit code 3"),
    ):
        with pytest.raises(MissingError, match=reason):
            play(Fake(name))
        with pytest.raises(MissingError, match=reason):
            Player(tmp_path, None)(Fake(name))
    with pytest.raises(MissingError, match="other has not been done"):
        Player(tmp_path, None)(Fake("other"))
    assert Player(tmp_path, lambda cell: {"answer": 1}, "fork")(Fake("fine"))["answer"] == 42
    assert Player(tmp_path, lambda cell: {"answer": 1}, "fork")(Fake("broken"))["answer"] == 1
    assert not (tmp_path / "broken.failed").exists()


def test_back_propagation_is_that_of_plain_torch(tmp_path: Path) -> None:
    """Against SGD on the model's own parameters, over the batches of a federated run."""
    threads = torch.get_num_threads()
    try:
        config = Cell("trial", "embedded", "full", "backprop-sgd", 1000, 9, 0.05).config(options(tmp_path))
        experiment, plain = Experiment(config), Experiment(config)
        start = zo_bench.evaluated(experiment, experiment.theta0(), 0)
        result = zo_bench.backprop(experiment, "backprop-sgd", start, zo_bench.Gauge())
        model, data = plain.loaded.model, [plain.client_data(client) for client in range(2)]
        parameters = list(plain.space.parameters(model).values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        for round_ in range(3):
            total = torch.tensor(0.0)
            for client, own in enumerate(data):
                batch = own.batch(choose(derive(1000, "batch", round_, client, 0), len(own), 8))
                losses = losses_from_scores(candidate_scores(model, batch), batch.labels)
                total = total + losses.mean() * len(own) / sum(map(len, data))
            gradients = torch.autograd.grad(total, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.detach().sub_(0.05 * (1 - round_ / 3) * gradient)
        expected = plain.evaluate(plain.space.theta0(model, torch.float32), plain.validation)["loss"]
    finally:
        torch.set_num_threads(threads)
    assert result["validation"][3]["loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - start["validation"][0]["loss"]) > 0.01
    assert (result["rounds"], result["bytes_sent"]) == (3, 3 * 4 * plain.space.size)


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks", "embedded", "--schemes", "full,sparse", "--methods", "backprop-adam,zo-sgd,qzo"]
    arguments += ["--seeds", "2", "--best", "1", "--trials", "2", "--examples", "60", "--validation", "16"]
    arguments += ["--forwards", "16", "--trial-forwards", "8", "--long", "2", "--out", str(tmp_path)]

    def run(*more: str) -> tuple[list[str], Result]:
        monkeypatch.setattr(sys, "argv", ["zo_bench.py", *arguments, *more])
        zo_bench.main()
        lines = capfd.readouterr().out.splitlines()
        last: Result = json.loads(lines[-1])
        return [line for line in lines if line.startswith(("probe-", "trial-", "run-", "long-"))], last

    _, found = run()
    assert set(found["absent"]) == {"embedded/full/qzo", "embedded/sparse/qzo"}
    rows = {(r["scheme"], r["method"]): r for r in found["rows"]}
    assert set(rows) == {(s, m) for s in ("full", "sparse") for m in ("backprop-adam", "zo-sgd")}
    assert all(r["peak_mib"] > 0 and r["cpu_seconds_a_step"] > 0 for r in rows.values())
    assert sorted(r["seeds"] for r in rows.values()) == [1, 1, 2, 2]
    assert rows["full", "zo-sgd"]["forwards"] == 16 and rows["full", "backprop-adam"]["forwards"] == 15
    assert rows["full", "backprop-adam"]["validation_loss"] < rows["full", "backprop-adam"]["validation_loss_before"]
    assert rows["sparse", "backprop-adam"]["bytes_sent"] == 5 * 4 * rows["sparse", "zo-sgd"]["trainable"]
    text = (tmp_path / "table.md").read_text()
    assert text.count("- qzo: not valid: ") == 2 and (tmp_path / "embedded.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 4

    again, same = run()
    assert again == [] and same["rows"] == found["rows"]
    (lost,) = tmp_path.glob("run-embedded-*-zo-sgd-1-*.json")
    lost.unlink()
    assert run("--report")[1]["rows"] != found["rows"] and not lost.exists()
    again, same = run()
    assert [line.partition(":")[0] for line in again] == [lost.name.removesuffix(".json")]
    timed = ("peak_mib", "cpu_seconds_a_step")
    for r, s in zip(found["rows"], same["rows"], strict=True):
        assert {k: v for k, v in r.items() if k not in timed} == {k: v for k, v in s.items() if k not in timed}
