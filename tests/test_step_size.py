"""Learning rates that are picked, looked for, and too large."""

import json
import math
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from small_runs import config, fedzo, make_data, options
from torch import Tensor

from fedzo import engine, tune
from fedzo.config import load_config
from fedzo.directions.base import Isotropic
from fedzo.divergence import Watch
from fedzo.errors import ConfigError, DivergedError, RunError
from fedzo.estimators import ESTIMATORS
from fedzo.evaluation import Batch, Evaluator, LossRequest
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.optimizers import OPTIMIZERS, Records, Rule, Schedule, Setup
from fedzo.run_folder import RunFolder
from fedzo.step_size import COST, Probe, Steps, Sum, pick, probe

SIZE = 256


class Quadratic:
    """loss_i(theta) = 1 + 1/2 theta' H theta + noise x_i . theta with H diagonal and x_i Gaussian."""

    def __init__(self, noise: float = 0.0, examples: int = 40) -> None:
        rng = np.random.default_rng(5)
        self.hessian = torch.from_numpy(np.geomspace(0.05, 20.0, SIZE))
        self.theta = torch.from_numpy(rng.normal(size=SIZE) / 8).float()
        self.x = torch.from_numpy(noise * rng.normal(size=(examples, SIZE)))
        self.gradient = self.hessian * self.theta.double()

    @property
    def batches(self) -> list[Batch]:
        rows = torch.arange(len(self.x)).split(10)
        return [Batch({"rows": r}, torch.zeros(len(r), dtype=torch.int64), None) for r in rows]

    def answer(self, request: LossRequest) -> Tensor:
        found = []
        for seed in request.seeds:
            for a in request.offsets:
                z = request.directions.fill(torch.empty(SIZE), seed).double()
                point = request.theta.double() + a * z
                loss = 1.0 + 0.5 * (self.hessian * point**2).sum()
                found.append(loss + self.x[request.batch.inputs["rows"]] @ point)
        return torch.stack(found).view(len(request.seeds), len(request.offsets), -1)

    def probe(self, count: int, directions: Callable[[int], Any] = lambda _: Isotropic(), seed: int = 1) -> Probe:
        return probe(self.answer, self.theta, self.batches, directions, eps=1e-3, count=count, seed=seed)

    def best(self, count: int, noise: float = 0.0) -> float:
        """gradient . E[step] / E[step' H step] of a step along `count` directions, by many of them."""
        rng, ahead, curved = np.random.default_rng(6), 0.0, 0.0
        gradient, hessian = self.gradient.numpy(), self.hessian.numpy()
        for _ in range(2000):
            z = rng.choice([-1.0, 1.0], size=(count, SIZE))
            g = z @ (gradient + noise * rng.normal(size=SIZE))
            step = g @ z / count
            ahead, curved = ahead + gradient @ step, curved + step @ (hessian * step)
        return float(ahead / curved)


@pytest.mark.parametrize("count", [1, 8])
def test_best_step_on_a_quadratic(count: int) -> None:
    quadratic = Quadratic()
    found = quadratic.probe(count)
    assert found.best(1) == pytest.approx(quadratic.best(count), rel=0.35)
    assert found.loss == pytest.approx(float(1 + 0.5 * (quadratic.gradient * quadratic.theta).sum()), rel=1e-6)
    assert found.gradient == pytest.approx(float(quadratic.gradient.norm()), rel=0.5)
    assert found.examples == 40
    if count == 1:
        assert found.curvature == pytest.approx(float(quadratic.hessian.sum()), rel=1e-3)
        # The random step of this length costs about a tenth of the loss.
        assert 0.5 < found.curvature * found.distance**2 / 2 / (COST * found.loss) < 2


def test_noise_of_the_examples_makes_the_step_smaller() -> None:
    """8 queries tell little of the share of noise in one probe: the mean of several is compared."""
    noise = 1.5
    still, noisy = Quadratic(), Quadratic(noise)
    probes = [noisy.probe(1, seed=seed) for seed in range(16)]
    for examples in (4, 40):
        wanted = still.best(1, noise / math.sqrt(examples))
        assert np.mean([found.best(examples) for found in probes]) == pytest.approx(wanted, rel=0.25)
        assert wanted < 0.9 * still.best(1)


def test_a_curvature_below_the_noise_is_not_believed() -> None:
    """A loss that is flat only at its start: the variance of the slopes stands for the curvature to come."""
    flat = Quadratic(noise=3.0)
    flat.hessian = flat.hessian * 1e-3
    assert flat.probe(1).curvature > 0.5 * float(flat.x.var(0).sum()) > 10 * float(flat.hessian.sum())


def test_forwards_are_counted() -> None:
    quadratic, asked = Quadratic(), 0

    def answer(request: LossRequest) -> Tensor:
        nonlocal asked
        asked += len(request.offsets) * len(request.seeds)
        return quadratic.answer(request)

    found = probe(answer, quadratic.theta, quadratic.batches, lambda _: Isotropic(), eps=1e-3, count=2, seed=1)
    assert found.forwards == asked


def test_directions_are_those_of_the_first_steps() -> None:
    seen: list[int] = []

    def at(step: int) -> Isotropic:
        seen.append(step)
        return Isotropic("gaussian")

    Quadratic().probe(2, at)
    assert set(seen) == {0, 1, 2, 3}


@pytest.mark.parametrize("broken", ["flat", "infinite"])
def test_what_has_no_slope_is_refused(broken: str) -> None:
    def answer(request: LossRequest) -> Tensor:
        shape = len(request.seeds), len(request.offsets), len(request.batch.labels)
        return torch.full(shape, 1.0 if broken == "flat" else math.inf)

    said = "does not change" if broken == "flat" else "not finite"
    with pytest.raises(RunError, match=f"{said}.*no learning rate to start from"):
        probe(answer, torch.zeros(SIZE), Quadratic().batches, lambda _: Isotropic(), eps=1e-3, count=1, seed=1)


def test_a_sum_of_directions() -> None:
    inner, seeds, weights = Isotropic(), (3, 8), (0.5, -2.0)
    whole = Sum(inner, seeds, weights).fill(torch.empty(40), 0)
    assert torch.equal(whole, sum(w * inner.fill(torch.empty(40), s) for s, w in zip(seeds, weights, strict=True)))
    theta, out = torch.ones(40), torch.empty(24)
    assert Sum(inner, seeds, weights).axpy(theta[16:], 0, 2.0, offset=16, out=out) is out
    assert torch.allclose(out, 1.0 + 2.0 * whole[16:]) and torch.equal(theta, torch.ones(40))


def rule_of(name: str, **values: Any) -> Rule:
    settings = {"momentum": 0.9, "nesterov": False, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8} | values
    return OPTIMIZERS[name](Setup(Schedule("constant", 1e-4, 10**6), 2, values=settings))


def moved(rule: Rule, steps: int, scale: float = 1.0) -> Tensor:
    """How far theta moves in so many steps along one direction estimate."""
    theta = torch.zeros(64)
    state = rule.init(theta)
    for step in range(steps):
        scalars = np.array([[3.0, -1.0]], dtype=np.float32) * np.float32(scale)
        state = rule.apply(theta, state, [Records(step, np.array([[5, 6]], dtype=np.uint64), scalars)])
    return theta


def test_rules_are_what_the_pick_takes_them_for() -> None:
    plain = moved(rule_of("sgd"), 200)
    for name, values in (
        ("sgd", {}),
        ("momentum", {}),
        ("momentum", {"nesterov": True}),
        ("momentum", {"momentum": 0.5}),
    ):
        rule = rule_of(name, **values)
        assert float(moved(rule, 200).norm() / plain.norm()) == pytest.approx(rule.gain, rel=0.06)
    normalised = [name for name, made in OPTIMIZERS.items() if made.normalised]
    assert {"sign", "adam", "adamw"} <= set(normalised)
    for name in normalised:
        for scale in (1e-3, 1e3):
            entries = moved(rule_of(name), 20, scale) / (20 * 1e-4)
            assert float((entries**2).mean().sqrt()) == pytest.approx(1.0, rel=0.1)


def test_the_pick() -> None:
    found = Probe(0.5, 3.0, 40.0, 2, 100.0, 0.03, 50, 80)
    steps, sgd = Steps(2, 20, 5, 30.0), ESTIMATORS["two-point"]
    plain = pick(found, steps, sgd, rule_of("sgd"), False).learning_rate
    assert plain == float(f"{plain:.2g}") == pytest.approx(0.4 * 2 * 9 / (11 * 100), rel=0.05)
    assert pick(found, steps, sgd, rule_of("momentum"), False).learning_rate == pytest.approx(plain / 10, rel=0.05)
    sign = pick(found, steps, sgd, rule_of("sign"), True).learning_rate
    assert sign**2 * 100 / 2 * 30 == pytest.approx(0.1 * 0.5, rel=0.1)  # what all steps cost
    fzoo = pick(found, steps, ESTIMATORS["fzoo"], rule_of("sgd"), False).learning_rate
    assert fzoo == pytest.approx(sign * math.sqrt(2 * 17 / 11), rel=0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "method", [{"method__optimizer": "sign"}, {"method__optimizer": "adam"}, {"method__estimator": "fzoo"}]
)
def test_auto_of_normalised_methods(method: dict[str, Any], data: Path, tmp_path: Path) -> None:
    chosen = config(data, method__learning_rate="auto", data__test="", evaluation__every=0, **method)
    with small_runs.run(tmp_path / "run", chosen) as ledger:
        before, after = (ledger.evaluations("validation")[rounds]["loss"] for rounds in (0, 3))
        assert after < before + 0.1
        assert RunFolder(tmp_path / "run").load_config() == chosen.with_learning_rate(ledger.spec.learning_rate)


def test_auto_is_a_number_in_header_and_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    losses = Evaluator.losses

    def counted(self: Evaluator, request: LossRequest) -> Tensor:
        nonlocal asked
        asked += len(request.seeds) * len(request.offsets)
        return losses(self, request)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "losses", counted)
        done = fedzo("run", *options(data, method__learning_rate="auto"), "--out", run)
    assert done.code == 0, done.err
    folder = RunFolder.open(run)
    kept = json.loads(folder.step_size.read_text())
    with Ledger(folder.ledger) as ledger:
        rate = ledger.spec.learning_rate
    assert rate == kept["learning_rate"] == folder.load_config().method.learning_rate
    assert kept["probe"]["forwards"] + 3 * 3 * 2 * 2 == asked  # and the rounds: 3 rounds, 3 clients, 2 queries
    assert f'learning rate {rate:.2g}: method.learning_rate = "auto", {kept["probe"]["forwards"]} forward' in done.err
    assert "probe forwards" in done.out

    def refuse(self: Experiment) -> None:
        raise AssertionError("probed again")

    monkeypatch.setattr(Experiment, "probe", property(refuse))
    assert fedzo("verify", run).code == fedzo("resume", run, "-q").code == 0
    shown = json.loads(fedzo("inspect", run, "--json").out)
    assert (shown["learning_rate"], shown["probe_forwards"]) == (rate, kept["probe"]["forwards"])


class Interrupt(Exception):  # noqa: N818
    pass


class Stopper:
    """Interrupts a run after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, summary: RoundSummary) -> None:
        if summary.round + 1 == self.after:
            raise Interrupt

    def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        pass


def test_an_interrupted_run_with_auto_goes_on(data: Path, tmp_path: Path) -> None:
    chosen = config(data, method__learning_rate="auto", evaluation__every=0)
    with small_runs.run(tmp_path / "whole", chosen) as whole:
        head = whole.head
    folder = RunFolder.create(tmp_path / "run", chosen)
    with pytest.raises(Interrupt):
        engine.run(Experiment(chosen), folder, [Stopper(1)])
    assert fedzo("resume", folder.path, "-q").code == 0
    with Ledger(folder.ledger) as ledger:
        assert ledger.head == head


SEARCH = {"method__schedule": "linear", "federation__rounds": 9, "evaluation__limit": 12, "data__test": ""}


def search(data: Path, folder: Path, budget: int = 3, **changes: Any) -> tune.Search:
    return tune.search(config(data, **SEARCH | changes), [], budget, folder)


@pytest.fixture(scope="module")
def found(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tune.Search]:
    folder = tmp_path_factory.mktemp("search") / "trials"
    threads = torch.get_num_threads()
    result = search(data, folder)
    torch.set_num_threads(threads)
    return folder, result


def test_a_search_stays_within_its_budget_and_picks_by_validation(found: tuple[Path, tune.Search]) -> None:
    folder, result = found
    assert 18 < sum(trial.rounds for trial in result.trials) <= 27  # less than a run is left
    assert result.trials[0].state == "done" and len(result.trials) > 3
    assert {trial.state for trial in result.trials} >= {"done", "stopped"}
    losses = {}
    for trial in result.trials:
        run = RunFolder.open(folder / f"trial-{trial.number:03d}")
        with Ledger(run.ledger) as ledger:
            evaluations = ledger.evaluations("validation")
            assert ledger.rounds == trial.rounds and (trial.rounds == 9) == (trial.state == "done")
            assert trial.loss == evaluations[trial.rounds]["loss"]
            assert ledger.spec.learning_rate == trial.values[tune.RATE]
            assert not ledger.evaluations("test") and run.load_config().data.test == ""
            assert trial.forwards == 3 * 2 * 2 * trial.rounds
            assert trial.validation_forwards == len(evaluations)
        if trial.state == "done":
            losses[trial.loss] = trial
    assert result.best == losses[min(losses)]
    kept = json.loads((folder / "search.json").read_text())
    assert result.probe_forwards == kept["probe_forwards"] > 0
    (rate,) = kept["ranges"]
    assert rate["start"] == result.trials[0].values[tune.RATE]
    assert all(rate["start"] / 10.1 < trial.values[tune.RATE] < rate["start"] * 10.1 for trial in result.trials)


def test_a_killed_search_goes_on_to_the_same_end(
    data: Path, found: tuple[Path, tune.Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = found
    done = 0
    for number, after in ((0, 5), (2, 1)):  # within the first trial, then within the third
        allowed, play, played = sum(t.rounds for t in whole.trials[:number]) + after - done, engine.play_round, count()
        done += allowed

        def killed(*arguments: Any, allowed: int = allowed, play: Any = play, played: Any = played) -> RoundSummary:
            if next(played) == allowed:
                raise Interrupt
            summary: RoundSummary = play(*arguments)
            return summary

        with monkeypatch.context() as patched, pytest.raises(Interrupt):
            patched.setattr(engine, "play_round", killed)
            search(data, tmp_path / "trials")
    assert search(data, tmp_path / "trials") == whole

    def refuse(*_: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(Experiment, "__init__", refuse)
    assert search(data, folder) == whole
    with pytest.raises(ConfigError, match="another search"):
        search(data, folder, seed=1)


def test_tune_writes_a_config(data: Path, found: tuple[Path, tune.Search], tmp_path: Path) -> None:
    folder, _ = found
    source = tmp_path / "mine.toml"
    source.write_text("[federation]\nrounds = 9\n", encoding="utf-8")
    arguments = ["tune", source, "--budget", 3, *options(data, **SEARCH), "--folder", folder]
    done = fedzo(*arguments, "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    written = load_config(Path(figures["config"]))
    assert Path(figures["config"]) == tmp_path / "mine-tuned.toml"
    assert written == config(data, **SEARCH).with_learning_rate(figures["learning_rate"])
    assert figures["forwards"] == sum(trial["forwards"] for trial in figures["table"])
    assert figures["rounds"] == sum(trial["rounds"] for trial in figures["table"]) <= 27
    again = fedzo(*arguments)
    assert again.code == 2 and "mine-tuned.toml exists" in again.err
    shown = fedzo(*arguments, "--out", tmp_path / "other.toml")
    assert shown.code == 0 and "stopped" in shown.out and "validation forwards" in shown.out
    assert f"trial {len(figures['table']) - 1}: method.learning_rate" in shown.err


def test_other_numbers_and_diverged_trials(data: Path, tmp_path: Path) -> None:
    """A trial with an absurd rate counts as diverged; the search goes on."""
    base = config(data, **SEARCH | {"method__learning_rate": 1e4})
    ranges = [tune.parse_range(text, base) for text in ("method.learning_rate=1e-4:1e4:log", "method.queries=1:3")]
    result = tune.search(base, ranges, 3, tmp_path / "trials")
    first = result.trials[0]
    assert (first.values, first.state) == ({"method.learning_rate": 1e4, "method.queries": 2}, "diverged")
    assert first.rounds < 9 and result.best.state == "done" and result.probe_forwards == 0
    assert {type(trial.values["method.queries"]) for trial in result.trials} == {int}
    assert tune.search(base, ranges, 3, tmp_path / "trials") == result
    with pytest.raises(RunError, match="none of 1 trials came to its end; the last one diverged"):
        tune.search(base, ranges[:1], 1, tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method.lr=1:2", "unknown key 'method.lr'"),
        ("method.optimizer=1:2", "cannot be looked for"),
        ("federation.rounds=1:2", "the budget is counted"),
        ("data.alpha=1:2", "cannot be looked for"),
        ("method.eps=2:1", "LOW < HIGH"),
        ("method.eps=0:1:log", "0 < LOW"),
        ("method.eps=1", "LOW < HIGH"),
        ("method.eps=1:2:linear", "LOW < HIGH"),
    ],
)
def test_what_cannot_be_looked_for(text: str, said: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        tune.parse_range(text, config(data))


def test_a_diverged_run_stops_and_keeps_its_rounds(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = {"method__learning_rate": 0.3, "federation__rounds": 40, "evaluation__every": 0, "data__test": ""}
    done = fedzo("run", *options(data, **chosen), "--out", run)
    assert done.code == 1
    message = done.err.splitlines()[-1]
    with Ledger(run / "ledger.sqlite") as ledger:
        rounds, evaluations = ledger.rounds, ledger.evaluations("validation")
    assert rounds < 20 and sorted(evaluations) == [0, rounds]
    assert f"diverged at round {rounds}: the validation loss is {evaluations[rounds]['loss']:.4g}" in message
    for part in (f"at the start it was {evaluations[0]['loss']:.4g}", "learning rate is 0.3", '"auto"', "fedzo tune",
                 f"fedzo replay {run} --round best", "evaluation.divergence = 0"):  # fmt: skip
        assert part in message
    assert {"loss.png", "bytes.png", "metrics.jsonl"} <= {path.name for path in run.iterdir()}
    assert (run / "metrics.jsonl").read_text().count('"event": "round"') == rounds
    again = fedzo("resume", run)
    assert again.code == 1 and again.err.splitlines()[-1] == message
    assert f"rounds verified   {rounds}" in fedzo("verify", run).out
    assert fedzo("replay", run, "--round", "best", "--out", tmp_path / "model").code == 0

    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("divergence = 2.0", "divergence = 0.0"))
    assert fedzo("resume", run, "-q").code == 0
    with Ledger(run / "ledger.sqlite") as ledger:
        assert ledger.rounds == 40


@pytest.mark.filterwarnings("ignore:overflow")
def test_coefficients_that_are_not_finite_are_divergence(data: Path, tmp_path: Path) -> None:
    for steps in (1, 2):  # at the server, and within a client's local steps
        chosen = config(data, method__learning_rate=1e39, federation__local_steps=steps, data__test="")
        with pytest.raises(DivergedError, match=r"diverged at round [01]: .* finite.*fedzo tune"):
            small_runs.run(tmp_path / str(steps), chosen)


class Past:
    """A ledger's record of losses: rounds, and evaluations by rounds, of a run with two clients."""

    spec = SimpleNamespace(clients=2)

    def __init__(self, losses: list[float], evaluations: dict[int, float], **summary: Any) -> None:
        common = {"sampled": 2, "accepted": 2, "scalars": 2, "dropped": {}, "max_scalar": 1.0} | summary
        self.rounds = [{**common, "loss": loss} for loss in losses]
        self.losses = {rounds: {"loss": loss} for rounds, loss in evaluations.items()}

    def summaries(self) -> list[dict[str, Any]]:
        return self.rounds

    def evaluations(self, split: str) -> dict[int, dict[str, float]]:
        return self.losses


def watched(losses: list[float], evaluations: dict[int, float], factor: float = 2.0, **summary: Any) -> Watch:
    return Watch(Past(losses, evaluations, **summary), factor)  # type: ignore[arg-type]


def test_doubt_and_divergence() -> None:
    start = {0: 0.7}
    assert not watched([0.7, 9.0, 9.0, 0.7, 0.7, 9.0, 0.7], start).doubtful  # spikes of few rounds
    assert watched([0.7, 9.0, 9.0, 9.0, 0.7, 0.7], start).doubtful
    assert not watched([9.0] * 4, start).doubtful  # too few rounds
    assert not watched([9.0] * 9, start | {6: 0.9}).doubtful  # looked at, and found well
    assert not watched([9.0] * 9, start, 0.0).doubtful
    assert not watched([0.9] * 9, {0: 0.01}).doubtful  # 90 times its start, and still a loss below 1 nat
    assert watched([9.0] * 9, {0: 4.0}).doubtful and not watched([7.9] * 9, {0: 4.0}).doubtful
    everything = {"accepted": 0, "dropped": {"bound": 2}}
    assert watched([math.nan] * 5, start, **everything).doubtful
    assert (
        watched([0.69] * 5, start, max_scalar=0.0).doubtful and not watched([0.69] * 4, start, max_scalar=0.0).doubtful
    )


@pytest.mark.parametrize(
    ("losses", "evaluations", "summary", "said"),
    [
        ([0.7] * 3, {0: 0.7, 3: 2.1}, {}, "validation loss is 2.1, at the start it was 0.7"),
        ([0.7] * 3, {0: 0.7, 3: math.nan}, {}, "validation loss is nan"),
        ([0.7] * 5, {0: 0.7}, {"accepted": 0, "dropped": {"not-finite": 1, "no-reply": 1}}, "of the 1 clients"),
        ([0.7], {0: 0.7}, {"accepted": 0, "dropped": {"not-finite": 2}}, "of the 2 clients"),
        ([0.7] * 4, {0: 0.7}, {"accepted": 0, "dropped": {"not-finite": 1, "no-reply": 1}}, ""),  # it may be a liar
        ([0.7] * 5, {0: 0.5, 5: 0.7}, {"max_scalar": 0.0}, "all scalars of the last 5 rounds are 0"),
        ([0.7] * 3, {0: 0.7, 3: 1.9}, {}, ""),
        ([0.0] * 5, {0: 0.5, 5: 0.0}, {"max_scalar": 0.0}, ""),  # a loss of 0 has no slope
        ([0.7] * 3, {0: 0.7, 2: 2.1}, {}, ""),  # of an earlier round, which the user went on from
    ],
)
def test_verdicts(
    losses: list[float], evaluations: dict[int, float], summary: dict[str, Any], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told: list[str] = []

    def note(_: object, why: str) -> DivergedError:
        told.append(why)
        return DivergedError(why)

    monkeypatch.setattr("fedzo.divergence.diverged", note)
    watched(losses, evaluations, 0.0, **summary).check()
    assert not told
    watch = watched(losses, evaluations, **summary)
    if said:
        with pytest.raises(DivergedError):
            watch.check()
        assert said in told[0]
    else:
        watch.check()


def test_a_base_model_without_a_loss_is_named() -> None:
    with pytest.raises(RunError, match="base model's validation loss is not finite"):
        watched([], {0: math.nan})
