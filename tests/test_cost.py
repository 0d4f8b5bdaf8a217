"""What a run will cost is what it did cost: bytes of each round, forward passes, and seconds from measured parts."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import Answer, config, fedzo, make_data, options, settings

from fedzo import cost, engine
from fedzo.cost import FLOWER_BYTES, FLOWER_SECONDS, SHARE, Payload, Speed, payload, plan_rounds
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator, RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.run_folder import RunFolder
from fedzo.terminal import human_seconds

RUNS: dict[str, dict[str, Any]] = {
    "shared seeds": {},
    "several steps": {"federation__local_steps": 3},
    "own seeds, some clients": {"federation__seeds": "independent", "federation__clients_per_round": 2},
    "each by chance": {"federation__seeds": "independent", "federation__client_rate": 0.4, "federation__rounds": 6},
    "a pool": {"federation__seeds": "pool", "federation__pool_size": 64, "federation__clients_per_round": 1},
    "snapshots of a pool": {
        "federation__seeds": "pool", "federation__pool_size": 8, "federation__clients_per_round": 1,
        "federation__rounds": 8, "federation__local_steps": 2, "data__clients": 4,
    },
    "a weighted pool": {"federation__seeds": "weighted-pool", "federation__pool_size": 8, "data__clients": 4},
    "rounds below the quorum": {"federation__client_rate": 0.5, "federation__quorum": 2, "federation__rounds": 6},
    "two scalars": {"method__name": "hizoo", "method__eps": 1e-3, "method__learning_rate": 1e-5},
    "gradients": {"method__first_order": "*norm*", "federation__clients_per_round": 2, "federation__local_steps": 2},
    "a mask": {"space__kind": "sparse", "space__density": 0.001},
    "lora": {"space__kind": "adapter", "space__rank": 2, "space__targets": "q_proj, v_proj"},
    "forward gradients": {"method__name": "forward-gradient", "space__kind": "sparse", "space__density": 0.01},
}  # fmt: skip
PRIVATE: dict[str, dict[str, Any]] = {
    "example-local": {"federation__local_steps": 2},
    "adaptive clipping": {"privacy__mode": "example-local", "privacy__clipping": "adaptive"},
    "client-local": {"federation__clients_per_round": 2, "federation__seeds": "independent"},
    "client-secagg": {"data__clients": 4},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


class Seen:
    """Keeps the summaries of a run's rounds, also what the ledger of a private run hides."""

    def __init__(self) -> None:
        self.rounds: list[RoundSummary] = []

    def round(self, summary: RoundSummary) -> None:
        self.rounds.append(summary)

    def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None: ...


def compare(path: Path, experiment: Experiment) -> tuple[Payload, dict[str, Any]]:
    """Tells the cost of a run, plays it, and asserts that its bytes were those."""
    figures = plan_rounds(experiment, speed=lambda _: None)
    folder, seen = RunFolder.create(path, experiment.config), Seen()
    with engine.run(experiment, folder, [seen]) as ledger:
        spec = ledger.spec
    mask = len(experiment.artifacts[spec.mask]) if spec.mask else 0
    told = payload(spec, experiment.replica(spec), mask)
    assert list(told.asked) == [one.sampled for one in seen.rounds]
    assert list(told.up) == [one.bytes_up for one in seen.rounds]
    assert list(told.down) == [one.bytes_down for one in seen.rounds]
    assert list(told.artifacts) == [one.artifact_bytes for one in seen.rounds]
    factor = spec.scalars  # records are of seeds, the summary counts scalars
    assert [factor * count for count in told.records] == [one.scalars for one in seen.rounds]
    return told, figures


@pytest.mark.parametrize("name", RUNS)
def test_the_bytes_are_those_of_the_run(name: str, data: Path, tmp_path: Path) -> None:
    if "adapter" in RUNS[name].values():
        pytest.importorskip("peft")
    experiment = Experiment(config(data, **RUNS[name]))
    told, figures = compare(tmp_path / "run", experiment)
    answer = json.loads(fedzo("inspect", tmp_path / "run", "--json").out)
    for key in ("bytes_up_per_client", "bytes_down_per_client", "artifact_bytes", "clients", "trainable"):
        assert figures[key] == answer[key]
    assert figures["payload_bytes"] == sum(told.down) + sum(told.up)
    if name == "snapshots of a pool":
        assert told.late == told.snapshot == 8 * 8
        assert 0 in told.caught[1:]  # of more than one missed round
    if name == "rounds below the quorum":
        assert 0 in told.records and max(told.records) > 0
    if name in ("gradients", "a mask"):
        assert sum(told.artifacts) > 0
    if name == "each by chance":
        assert len(set(told.asked)) > 1


@pytest.mark.parametrize("name", PRIVATE)
def test_the_bytes_of_private_runs(name: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("opendp")
    pytest.importorskip("dp_accounting")
    shared = {
        "privacy__mode": name, "privacy__epsilon": 50.0, "privacy__delta": 1e-3, "federation__aggregation": "uniform",
    }  # fmt: skip
    compare(tmp_path / "run", Experiment(config(data, **(shared | PRIVATE[name]))))


def test_a_secret_draw_is_stood_for_by_another_of_its_rate(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("opendp")
    pytest.importorskip("dp_accounting")
    chosen = config(
        data, privacy__mode="client-central", privacy__epsilon=50.0, privacy__delta=1e-3, data__clients=12,
        federation__client_rate=0.5, federation__rounds=4,
    )  # fmt: skip
    experiment = Experiment(chosen)
    told = payload(experiment.spec(), experiment.replica(experiment.spec()))
    assert told == payload(experiment.spec(), experiment.replica(experiment.spec()))
    assert 0 < sum(told.asked) < 4 * 12
    seen = Seen()
    with engine.run(experiment, RunFolder.create(tmp_path / "run", chosen), [seen]) as ledger:
        assert ledger.spec.terms is not None and ledger.spec.terms.secret
    assert [one.scalars for one in seen.rounds] == list(told.records)  # of nobody too
    each = {one.bytes_up // one.sampled for one in seen.rounds if one.sampled}
    assert each == {up // asked for up, asked in zip(told.up, told.asked, strict=True) if asked}


def test_a_late_client_is_sent_what_it_was_told(data: Path, tmp_path: Path) -> None:
    experiment = Experiment(config(data, data__clients=4, federation__seeds="independent", federation__rounds=5))
    spec = experiment.spec()
    told = payload(spec, experiment.replica(spec))
    with Ledger.create(tmp_path / "ledger.sqlite", spec, experiment.artifacts) as ledger:
        coordinator = Coordinator(ledger, experiment.replica(spec))
        transport = engine.in_process(experiment, coordinator)
        hello = experiment.worker(3, experiment.replica(spec)).hello()
        coordinator.dismiss(3)
        for _ in range(4):
            engine.play_round(coordinator, transport)
        coordinator.admit(hello)
        late = next(plan for plan in coordinator.open_round() if plan.client == 3)
    absent = 4 * 2 * 12  # of a round: 12 bytes for each of the late client's 2 records, which it did not send
    assert late.catch_up.kind == "records"
    assert told.late == late.catch_up.nbytes + absent


# Seconds.


def test_times_are_made_of_their_parts(data: Path) -> None:
    experiment = Experiment(
        config(data, federation__seeds="independent", federation__local_steps=3, evaluation__every=2)
    )  # fmt: skip
    parts = Speed(step=2.0, record=0.25, digest=0.5, example=0.125)
    figures = plan_rounds(experiment, speed=lambda _: parts)
    work = 3 * 2.0 + 2 * 2 * 0.25  # three steps, two updates between them of two records each
    records = 3 * 3 * 2 * 3  # rounds, clients, queries, steps
    # validation before, after rounds 2 and 3; test before and after
    evaluated = 0.125 * (3 * len(experiment.validation) + 2 * 12)
    assert figures["step_seconds"] == 2.0
    assert figures["evaluation_seconds"] == evaluated
    applied, digests = 0.25 * records, 3 * 0.5
    assert figures["local_seconds"] == pytest.approx(evaluated + 2 * (applied + digests) + 9 * work)
    caught = 0.25 * records * 2 / 3  # the last round's records reach nobody
    wanted = evaluated + applied + 2 * digests + caught + 3 * (FLOWER_SECONDS + work)
    assert figures["deployment_seconds"] == pytest.approx(wanted)
    assert figures["transport_seconds"] == pytest.approx(3 * FLOWER_SECONDS)
    assert figures["transport_share"] == pytest.approx(3 * FLOWER_SECONDS / wanted)
    assert figures["flower_bytes"] == 3 * 3 * FLOWER_BYTES


@pytest.mark.parametrize("step", [0.001, 0.37, 4.9, 49.0, 1000.0])
def test_so_many_steps_make_the_floor_less_than_a_tenth(step: float, data: Path) -> None:
    experiment = Experiment(config(data))
    enough = plan_rounds(experiment, speed=lambda _: Speed(step))["local_steps_for_a_tenth"]

    def share(steps: int) -> float:
        return FLOWER_SECONDS / (FLOWER_SECONDS + steps * step)

    assert share(enough) < SHARE
    assert enough == 1 or share(enough - 1) >= SHARE


def test_a_step_is_measured_on_the_loaded_model(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(config(data, method__batch_size=4))
    theta = experiment.theta0()
    spec, ticks = experiment.spec(), iter(range(100))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(ticks)))  # each part takes a second
    found = cost.measure(experiment, spec)
    assert found == Speed(step=1.0, record=1.0 / spec.queries, digest=1.0, example=1.0 / len(experiment.validation))
    assert (experiment.theta0() == theta).all()


@pytest.mark.parametrize("method", ["zo-sgd", "zo-sgd-cons", "one-point", "fzoo", "hizoo", "forward-gradient"])
def test_passes_are_counted_as_the_methods_state_them(method: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"method__name": method, "space__kind": "sparse", "space__density": 0.01}
    changes |= {"method__queries": 8} if method == "fzoo" else {}
    experiment = Experiment(config(data, **changes))
    ticks = iter(range(100))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(ticks)))
    assert cost.measure(experiment, experiment.spec(1e-4)).step == pytest.approx(1.0)  # neither more nor fewer


def test_a_step_on_all_examples_now_and_then_is_averaged(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(config(data, method__name="mezo-svrg", method__anchor_every=2))
    ticks = iter(range(100))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(ticks)))
    # 12 examples of a client at an anchor, 4 at theta and at the anchor in the other step; measured was a step on 4
    assert cost.measure(experiment, experiment.spec(1e-4)).step == pytest.approx((12 + 2 * 4) / 2 / 4)


def test_a_small_validation_set_counts_as_a_batch(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(config(data, method__batch_size=8, evaluation__limit=2))
    ticks = iter(range(100))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(ticks)))
    assert len(experiment.validation) == 2
    assert cost.measure(experiment, experiment.spec()).step == pytest.approx(8 / 2)


# The command.


def planned(*arguments: object) -> dict[str, Any]:
    answer = fedzo("plan-rounds", *arguments, "--json")
    assert (answer.code, answer.err) == (0, "") and answer.out.count("\n") == 1
    found: dict[str, Any] = json.loads(answer.out)
    return found


def test_the_command_says_what_the_run_then_costs(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    chosen = settings(data, federation__seeds="independent")
    file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in chosen.items()), encoding="utf-8")
    told = planned("--config", file, "-o", "federation.clients_per_round=2", "--no-measure")
    assert "step_seconds" not in told and "local_seconds" not in told
    assert not (tmp_path / "runs").exists()
    ran = fedzo("run", "-c", file, "-o", "federation.clients_per_round=2", "--out", tmp_path / "run", "--json")
    result = json.loads(ran.out)
    assert told["bytes_up_per_client"] == result["bytes_up_per_client"]
    assert told["bytes_down_per_client"] == result["bytes_down_per_client"]


def test_measured_or_given(data: Path) -> None:
    told = planned(*options(data))
    assert told["step_seconds"] > 0 and told["evaluation_seconds"] > 0
    assert told["local_seconds"] > 9 * told["step_seconds"]
    given = planned(*options(data), "--step-seconds", "2.5")
    assert given["step_seconds"] == 2.5 and given["local_steps_for_a_tenth"] == 18
    assert given["deployment_seconds"] == pytest.approx(3 * (FLOWER_SECONDS + 2.5))
    assert "evaluation_seconds" not in given
    answer = fedzo("plan-rounds", *options(data), "--step-seconds", "2.5", "--quiet")
    shown = dict(line.split("  ", 1) for line in answer.out.splitlines())
    assert (answer.code, answer.err) == (0, "")
    assert shown["step seconds"].strip() == "2.5 s" and shown["answer bytes"].strip() == "56 bytes"


def test_auto_is_not_looked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(self: Experiment) -> None:
        raise AssertionError

    monkeypatch.setattr(Experiment, "step_size", property(probe))
    assert planned(*options(data, method__learning_rate="auto"), "--no-measure")["rounds"] == 3


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--step-seconds", "-1"], "--step-seconds is -1, wanted a number above 0", 2),
        (["--step-seconds", "nan"], "--step-seconds is nan", 2),
        (["--config", "none.toml"], "no configuration file none.toml", 2),
        (["-o", "federation.round=3"], "unknown key 'federation.round'", 2),
        (["-o", "data.source=nowhere"], "nowhere", 1),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], said: str, code: int) -> None:
    answer: Answer = fedzo("plan-rounds", *arguments, "--quiet")
    assert answer.code == code and answer.out == ""
    assert answer.err.startswith("error: ") and said in answer.err and answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.00123, "1.23 ms"), (0.5, "500 ms"), (59.96, "60.0 s"), (90.0, "1.5 min"), (5400.0, "1.5 h"), (2e5, "2.3 days")],
)
def test_spans_of_time(seconds: float, shown: str) -> None:
    assert human_seconds(seconds) == shown
