"""Events: lines that say what happened and to whom it may be known, few of a kind, appended across resumes."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from small_runs import config, make_data
from tiny import Federation, answer, make_spec, make_terms, private_spec, start

from fedzo import engine
from fedzo.engine import TimedRound, Transport, play_round
from fedzo.errors import ConfigError, DataError, RunError
from fedzo.events import LEVEL, MOST, Events, JsonFormatter, read_events, recorded
from fedzo.experiment import Experiment
from fedzo.federation.messages import Behind
from fedzo.privacy_report import epsilon_spent, spent
from fedzo.run_folder import BUDGETS, RunFolder

LOGGER = logging.getLogger("fedzo.server")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _no_level(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(LEVEL, raising=False)
    yield


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def play(path: Path, rounds: int, spec: Any, replies: Any = None) -> tuple[list[dict[str, Any]], Federation]:
    """The events of the first rounds of a run on least squares."""
    path.mkdir(exist_ok=True)
    with recorded(path / "events.jsonl"):
        run = start(path, spec)
        for _ in range(rounds):
            run.round(replies)
    return events(path / "events.jsonl"), run


def lose(round_: int, client: int, answer: bytes) -> list[bytes]:
    """Client 1 does not answer, client 2 answers nonsense."""
    return [] if client == 1 else [b"nonsense"] if client == 2 else [answer]


# What a line is.


def test_an_event_is_a_line_with_time_level_event_run_and_round(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    run = start(tmp_path, make_spec())
    run.round()
    before, reason = datetime.now().astimezone(), "a\nb \x1b[31m\u2028" + "c" * 5000
    with recorded(path):
        run.coordinator.events.tell("client-refused", logging.WARNING, client=3, reason=reason)
    assert path.read_text(encoding="utf-8").isascii() and path.read_text(encoding="utf-8").count("\n") == 1
    (line,) = events(path)
    at = datetime.fromisoformat(line.pop("time"))
    assert at.utcoffset() == timedelta(0) and abs(at - before) < timedelta(minutes=1)
    assert line.pop("reason") == reason[:1000]
    run_id = run.coordinator.spec.run_id.hex()
    assert line == {"level": "WARNING", "event": "client-refused", "run": run_id, "round": 1, "client": 3}


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    with recorded(tmp_path / "events.jsonl"):
        run.coordinator.events.tell("evaluation", metrics={"loss": float("nan")}, x=float("inf"))
    (line,) = events(tmp_path / "events.jsonl")
    assert line["metrics"] == {"loss": None} and line["x"] is None


def test_other_lines_of_the_logger_are_not_in_the_file(tmp_path: Path) -> None:
    with recorded(tmp_path / "events.jsonl"):
        LOGGER.error("node 3 answered something else")
    assert events(tmp_path / "events.jsonl") == []
    record = LOGGER.makeRecord("fedzo.server", logging.ERROR, "", 0, "node %d", (3,), None)
    line = json.loads(JsonFormatter().format(record))
    assert (line["event"], line["level"], line["message"]) == ("log", "ERROR", "node 3")


def test_events_go_where_a_user_sends_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start(tmp_path, make_spec())
    with caplog.at_level(logging.INFO, "fedzo.server"):
        run.round()
    assert f"clients-admitted run={run.coordinator.spec.run_id.hex()} round=0 new=4 registered=4" in caplog.messages
    LOGGER.info("afterwards")
    assert "afterwards" not in caplog.messages


# Levels and rates.


def test_drops_are_counted_by_reason_and_told_by_client_at_debug_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, run = play(tmp_path / "info", 1, make_spec(), lose)
    assert [line["event"] for line in told] == ["clients-admitted"]
    assert run.ledger.summaries()[0]["dropped"] == {"malformed": 1, "no-reply": 1}
    monkeypatch.setenv(LEVEL, "DEBUG")
    told, _ = play(tmp_path / "debug", 1, make_spec(), lose)
    assert Counter(line["event"] for line in told) == {"client-admitted": 4, "clients-admitted": 1, "drop": 2}
    drops = {(line["client"], line["reason"]) for line in told if line["event"] == "drop"}
    assert drops == {(1, "no-reply"), (2, "malformed")}


def test_ten_thousand_clients_write_few_lines_a_round(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    tell = run.coordinator.events.tell
    with recorded(tmp_path / "events.jsonl"):
        for client in range(10_000):
            tell("client-refused", logging.WARNING, client=client)
            tell("client-lost", client=client)
            tell("drop", logging.DEBUG, client=client, reason="late")
        run.round()
        tell("client-refused", logging.WARNING, client=1)
    told = events(tmp_path / "events.jsonl")
    assert Counter((line["event"], line["round"]) for line in told) == {
        ("client-refused", 0): MOST, ("client-lost", 0): MOST, ("clients-admitted", 0): 1, ("client-refused", 1): 1
    }  # fmt: skip


def test_an_unknown_level_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL, "loud")
    mistake = pytest.raises(ConfigError, match=r"\$FEDZO_LOG_LEVEL is 'loud', wanted one of DEBUG, INFO")
    with mistake, recorded(tmp_path / "events.jsonl"):
        raise AssertionError


# The file.


def test_the_file_is_appended_to_and_half_a_line_ended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    run = start(tmp_path, make_spec())
    with recorded(path):
        run.coordinator.events.tell("run-started")
    path.write_text(path.read_text() + '{"time": "20', encoding="utf-8")
    with recorded(path):
        run.coordinator.events.tell("run-resumed")
    assert len(path.read_text().splitlines()) == 3
    found, end = read_events(path)
    assert [event["event"] for event in found] == ["run-started", "run-resumed"]
    with recorded(path):
        run.coordinator.events.tell("run-finished")
    with path.open("a") as file:
        file.write('{"half')
    found, at = read_events(path, end)
    assert [event["event"] for event in found] == ["run-finished"]
    assert at == path.stat().st_size - len('{"half')
    assert read_events(tmp_path / "none", 7) == ([], 7)


def test_the_logger_is_as_before_afterwards(tmp_path: Path) -> None:
    before = LOGGER.level, list(LOGGER.handlers)
    with pytest.raises(KeyError), recorded(tmp_path / "events.jsonl"):
        raise KeyError
    assert (LOGGER.level, LOGGER.handlers) == before
    mistake = pytest.raises(RunError, match=r"cannot write .*events.jsonl: No such file")
    with mistake, recorded(tmp_path / "none" / "events.jsonl"):
        raise AssertionError
    assert (LOGGER.level, LOGGER.handlers) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_to_whoever_tells_an_event(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    told = pytest.raises(RunError, match=r"events.jsonl: No space left on device; committed rounds are intact")
    with recorded(tmp_path / "events.jsonl"), told:
        run.coordinator.events.tell("run-started")


# What must not be told.


def test_nothing_tells_who_took_part_in_a_secret_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL, "DEBUG")
    spec = private_spec(make_terms("client-central", rate=0.5, sampling="poisson"), client_rate=0.5)
    _, run = play(tmp_path, 3, spec, lose)
    with recorded(tmp_path / "events.jsonl"):
        run.coordinator.events.tell("client-lost", client=3)
        run.coordinator.events.tell("snapshot-sent", client=3, bytes=7)
        observer = engine._Told(run.ledger, run.coordinator.events)
        observer.round(TimedRound(3, 2, 1, {"late": 1}, None, 1, 1, 0, 3, 1.0, 2.0, 2, 0.5, 0.25, 0.25))
    told = events(tmp_path / "events.jsonl")
    assert {line["event"] for line in told} == {"client-admitted", "clients-admitted", "round-committed"}
    committed = told[-1]
    for name in ("sampled", "accepted", "dropped", "bytes_up", "bytes_down", "artifact_bytes", "replies", "seconds",
                 "latency_median", "latency_max"):  # fmt: skip
        assert committed[name] is None
    assert committed["round"] == 3 and committed["clip"] == 2.0


def test_a_failure_says_what_fedzo_says_and_of_others_the_type(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    told = Events(run.ledger)
    with recorded(tmp_path / "events.jsonl"):
        told.failed(DataError("no file x.jsonl"))
        told.failed(ValueError("the movie was great"))
        told.failed(KeyboardInterrupt())
    first, second, third = events(tmp_path / "events.jsonl")
    assert (first["event"], first["error"], first["message"]) == ("run-failed", "DataError", "no file x.jsonl")
    assert (second["event"], second["error"]) == ("run-failed", "ValueError") and "message" not in second
    assert third["event"] == "run-interrupted"
    assert "great" not in (tmp_path / "events.jsonl").read_text()


# What a run tells.


def test_snapshots_and_artifacts_are_told(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(seeds="independent", rounds=6), clients=[0, 1, 2])
    with recorded(tmp_path / "events.jsonl"):
        run.coordinator.sent_artifact(700)
        for _ in range(4):
            run.round()
        run.join(3)
        run.round()
    told = {line["event"]: line for line in events(tmp_path / "events.jsonl")}
    assert told["artifact-sent"]["bytes"] == 700 and told["artifact-sent"]["round"] == 0
    snapshot = run.plans[4, 3][0].catch_up
    assert snapshot.kind == "snapshot"
    sent = told["snapshot-sent"]
    assert (sent["client"], sent["round"], sent["bytes"]) == (3, 4, len(snapshot.snapshot))


def test_a_whole_run_and_a_resumed_one(data: Path, tmp_path: Path) -> None:
    chosen = config(data)
    folder = RunFolder.create(tmp_path / "run", chosen)

    class Stop:
        def round(self, summary: TimedRound) -> None:
            if summary.round == 1:
                raise KeyboardInterrupt

        def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        engine.run(Experiment(chosen), folder, [Stop()])
    with engine.run(Experiment(chosen), folder) as ledger:
        head, run_id, summaries = ledger.head.hex(), ledger.spec.run_id.hex(), ledger.summaries()
    told = events(folder.event_log)
    assert {line["run"] for line in told} == {run_id}
    assert [(line["event"], line["round"]) for line in told if line["event"] != "evaluation"] == [
        ("run-started", 0), ("clients-admitted", 0), ("round-committed", 0), ("round-committed", 1),
        ("run-interrupted", 2), ("run-resumed", 2), ("clients-admitted", 2), ("round-committed", 2),
        ("run-finished", 3),
    ]  # fmt: skip
    assert told[-1]["ledger_hash"] == head
    rounds = [line for line in told if line["event"] == "round-committed"]
    for line, summary in zip(rounds, summaries, strict=True):
        assert all(line[name] == value for name, value in summary.items())
        assert line["replies"] == 3 and 0.0 < line["latency_median"] <= line["latency_max"] <= line["seconds"]
    evaluations = [(line["split"], line["rounds"]) for line in told if line["event"] == "evaluation"]
    assert evaluations == [
        ("test", 0), ("validation", 0), ("validation", 2), ("validation", 3), ("test", 3)
    ]  # fmt: skip
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    timed = {line["round"]: "latency_max" in line for line in lines if line["event"] == "round"}
    assert timed == {0: False, 1: False, 2: True}  # nobody knows any more how long the rounds before took


def test_latencies_are_of_the_replies_that_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path, make_spec())
    clock = iter([100.0, 101.0, 103.0, 104.0, 108.0, 110.0])  # begin, plans leave, three replies, commit
    monkeypatch.setattr(engine.time, "perf_counter", lambda: next(clock))

    def exchange(parcels: Any) -> Iterator[tuple[int, bytes]]:
        for client, plan in list(parcels)[:3]:
            yield client, answer(run.workers[client], plan) if client else b""

    found = play_round(run.coordinator, Transport(exchange))
    assert (found.replies, found.accepted, found.dropped) == (3, 2, {"malformed": 1, "no-reply": 1})
    assert (found.seconds, found.latency_median, found.latency_max) == (10.0, 3.0, 7.0)
    assert "seconds" not in run.ledger.summaries()[0]


def test_a_round_without_replies_has_no_latency_and_a_second_plan_counts_its_reply(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    assert play_round(run.coordinator, Transport(lambda parcels: iter(()))).latency_median is None
    for _ in range(2):
        play_round(run.coordinator, Transport(lambda ps: ((c, answer(run.workers[c], p)) for c, p in ps)))
    again = []

    def exchange(parcels: Any) -> Iterator[tuple[int, bytes]]:
        for client, plan in parcels:
            if client == 0 and not again:
                again.append(client)
                yield client, Behind(run.coordinator.spec.run_id, 3, 0, 1).to_bytes()
            else:
                yield client, answer(run.workers[client], plan)

    found = play_round(run.coordinator, Transport(exchange))
    assert (found.replies, found.accepted) == (5, 4)


# Epsilon.


@pytest.mark.parametrize("mode", ["example-local", "client-local", "client-central"])
def test_the_epsilon_that_is_logged_is_the_one_that_is_spent(mode: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    pytest.importorskip("opendp")
    changes: dict[str, Any] = {
        "privacy__mode": mode, "privacy__epsilon": 50.0, "privacy__delta": 1e-3, "federation__aggregation": "uniform",
        **({"federation__client_rate": 0.5} if mode == "client-central" else {}),
    }  # fmt: skip
    chosen = config(data, **changes)
    folder = RunFolder.create(tmp_path / "run", chosen)
    with engine.run(Experiment(chosen), folder) as ledger:
        wanted = max(one.epsilon for one in spent(ledger, folder.path / BUDGETS))
        assert epsilon_spent(ledger, folder.path / BUDGETS) == wanted
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    rounds = [line for line in lines if line["event"] == "round"]
    assert rounds[-1]["epsilon"] == wanted > 0.0
    logged = [line["epsilon"] for line in rounds]
    assert logged == sorted(logged)
    for line in rounds:
        assert (line["seconds"] is None) == (line["replies"] is None) == (mode == "client-central")
