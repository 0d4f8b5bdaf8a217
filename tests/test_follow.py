"""`fedzo inspect --follow`: rounds and evaluations of a run that another process plays, in order, until its end."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from small_runs import fedzo, make_data, options
from tiny import Federation, make_spec, make_terms, private_spec, start

from fedzo.errors import RunError
from fedzo.events import recorded
from fedzo.federation.ledger import Ledger
from fedzo.report import follow
from fedzo.run_folder import RunFolder
from fedzo.terminal import shown_event

PROGRAM = [sys.executable, "-c", "from fedzo.cli import main; main()"]
PAUSE = 0.02


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    assert fedzo("run", *options(data), "--out", path, "--json").code == 0
    return path


def places(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [
        ("round", e["round"]) if e["event"] == "round" else (str(e["split"]), int(e["rounds"])) for e in events
    ]  # fmt: skip


def played(path: Path, spec: Any = None) -> Federation:
    """A run on least squares, of which its base model has been evaluated."""
    run = start(path, spec or make_spec())
    for split in ("test", "validation"):
        run.ledger.record_evaluation(0, split, {"loss": 2.0, "accuracy": 0.5})
    return run


def while_following(folder: RunFolder, do: Callable[[], None]) -> list[dict[str, Any]]:
    """What is followed while another thread plays."""
    thread = threading.Thread(target=do)
    thread.start()
    found = list(follow(folder, PAUSE))
    thread.join()
    return found


def test_rounds_are_shown_as_they_are_committed_until_the_last_evaluation(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    def play() -> None:
        time.sleep(5 * PAUSE)  # there is no ledger yet, nor a folder
        run = played(folder.path)
        while not run.coordinator.finished:
            run.round()
            time.sleep(2 * PAUSE)
            if run.ledger.rounds == 3:
                run.ledger.record_evaluation(3, "validation", {"loss": 1.0, "accuracy": 0.5})
        for split in ("validation", "test"):  # both come a while after the last round
            time.sleep(5 * PAUSE)
            run.ledger.record_evaluation(6, split, {"loss": 0.5, "accuracy": 0.75})
        run.ledger.close()

    found = while_following(folder, play)
    assert set(places(found)[:2]) == {("validation", 0), ("test", 0)}
    assert places(found)[2:] == [
        ("round", 0), ("round", 1), ("round", 2), ("validation", 3), ("round", 3),
        ("round", 4), ("round", 5), ("validation", 6), ("test", 6),
    ]  # fmt: skip
    with Ledger(folder.ledger) as ledger:
        rounds = [{k: v for k, v in event.items() if k != "event"} for event in found if event["event"] == "round"]
        assert rounds == ledger.summaries()
    assert found[-1] == {"event": "evaluation", "rounds": 6, "split": "test", "loss": 0.5, "accuracy": 0.75}


def test_a_run_that_ended_early_is_over(tmp_path: Path) -> None:
    run = played(tmp_path)
    run.round()
    run.ledger.record_end("the run has no privacy budget left")
    for split in ("validation", "test"):
        run.ledger.record_evaluation(1, split, {"loss": 0.5, "accuracy": 0.75})
    assert places(list(follow(RunFolder(tmp_path), PAUSE)))[-3:] == [("round", 0), ("validation", 1), ("test", 1)]


def test_a_run_without_test_data_ends_with_its_validation(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    run.finish()
    run.ledger.record_evaluation(0, "validation", {"loss": 2.0})
    run.ledger.record_evaluation(6, "validation", {"loss": 0.5})
    assert len(list(follow(RunFolder(tmp_path), PAUSE))) == 8


@pytest.mark.parametrize("error", [RunError("it has no disk"), ValueError("a secret example"), KeyboardInterrupt()])
def test_a_run_that_stops_is_told_but_not_one_that_stopped_before(error: BaseException, tmp_path: Path) -> None:
    folder, run = RunFolder(tmp_path), played(tmp_path)
    with recorded(folder.event_log):
        run.coordinator.events.failed(RunError("long ago"))
    run.round()
    seen = follow(folder, PAUSE)
    assert places(list(islice(seen, 3))) == [("validation", 0), ("test", 0), ("round", 0)]
    with recorded(folder.event_log):
        run.coordinator.events.failed(error)
    said = {RunError: "it has no disk", ValueError: "ValueError", KeyboardInterrupt: "it was interrupted"}[type(error)]
    with pytest.raises(RunError, match=rf"stopped after 1 rounds: {said}$"):
        next(seen)


def test_following_does_not_hold_up_the_writer(tmp_path: Path) -> None:
    run = played(tmp_path)
    stop = threading.Event()
    reads = []

    def look() -> None:
        while not stop.is_set():
            with Ledger(tmp_path / "ledger.sqlite") as ledger:
                reads.append(len(ledger.summaries()))

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        head = run.finish()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert head == run.ledger.head and run.ledger.rounds == 6
    assert reads and max(reads) <= 6


def test_a_new_ledger_is_in_the_mode_in_which_readers_are_not_in_the_way(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.sqlite", make_spec()):
        # The bytes of the file's header that say so (sqlite.org/fileformat.html, 1.3.3).
        assert (tmp_path / "ledger.sqlite").read_bytes()[18:20] == b"\x02\x02"
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]


# What is shown.


def test_a_line_for_each(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    run.round(lambda round_, client, answer: [] if client == 1 else [b"?"] if client == 2 else [answer])
    run.round(lambda round_, client, answer: [])
    first, second = ({"event": "round", **summary} for summary in run.ledger.summaries())
    shown = shown_event(first, 6)
    assert shown.startswith(f"round 1/6  loss {first['loss']:.4f}  2 of 4 clients  ")
    assert shown.endswith("  dropped: malformed 1, no-reply 1")
    assert "round 2/6  no quorum  0 of 4 clients  0 B up" in shown_event(second, 6)
    evaluation = {"event": "evaluation", "rounds": 2, "split": "test", "loss": 0.25, "accuracy": 0.125}
    assert shown_event(evaluation, 6) == "after 2 rounds: test accuracy 12.5%, loss 0.2500"
    for name, text in (("f1", "f1 50.0%"), ("perplexity", "perplexity 0.500")):
        measured = {"event": "evaluation", "rounds": 2, "split": "test", "loss": 0.25, name: 0.5}
        assert shown_event(measured, 6) == f"after 2 rounds: test {text}, loss 0.2500"


def test_a_private_run_keeps_to_itself_who_took_part(tmp_path: Path) -> None:
    spec = private_spec(make_terms("client-central", rate=0.5, sampling="poisson"), client_rate=0.5)
    run = start(tmp_path, spec)
    run.round()
    (summary,) = run.ledger.summaries()
    assert shown_event({"event": "round", **summary}, 6) == "round 1/6  private"


# The command.


def test_of_a_finished_run_everything_and_its_figures(finished: Path) -> None:
    answer = fedzo("inspect", "--follow", finished)
    assert (answer.code, answer.err) == (0, "")
    head, _, figures = answer.out.partition("\n\n")
    rounds = [line for line in head.splitlines() if line.startswith("round ")]
    assert [line.split("  ")[0] for line in rounds] == ["round 1/3", "round 2/3", "round 3/3"]
    assert head.splitlines()[-1].startswith("after 3 rounds: test accuracy ")
    assert "ledger hash" in figures and "configuration" in figures
    assert fedzo("inspect", finished / "ledger.sqlite", "-f").out == answer.out


def test_json_is_a_line_for_each_and_the_figures(finished: Path) -> None:
    answer = fedzo("inspect", finished, "--follow", "--json")
    *events, figures = [json.loads(line) for line in answer.out.splitlines()]
    assert places(events) == [
        ("validation", 0), ("test", 0), ("round", 0), ("round", 1), ("validation", 2), ("round", 2), ("validation", 3),
        ("test", 3),
    ]  # fmt: skip
    assert figures == json.loads(fedzo("inspect", finished, "--json").out)
    assert answer.err == ""


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    answer = fedzo("inspect", tmp_path / "none", "--follow")
    assert answer.code == 1 and answer.out == ""
    assert "there is no folder" in answer.err and "fedzo run --out" in answer.err


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts commands as processes of their own, that end with the test."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*arguments: object) -> "subprocess.Popen[str]":
        command, environment = [*PROGRAM, *map(str, arguments)], os.environ | {"PYTHONUNBUFFERED": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return begun[-1]

    yield begin
    for one in begun:
        if one.poll() is None:
            one.kill()
        one.communicate()


def test_two_processes(data: Path, tmp_path: Path, process: Callable[..., "subprocess.Popen[str]"]) -> None:
    (tmp_path / "run").mkdir()
    follower = process("inspect", tmp_path / "run", "--follow", "--json")
    runner = process("run", *options(data), "--out", tmp_path / "run", "--json")
    out, err = follower.communicate(timeout=200)
    assert (follower.returncode, err) == (0, "")
    result = json.loads(runner.communicate(timeout=60)[0])
    *events, figures = [json.loads(line) for line in out.splitlines()]
    assert [e["round"] for e in events if e["event"] == "round"] == [0, 1, 2]
    assert figures["ledger_hash"] == result["ledger_hash"]


def test_ctrl_c_ends_it_without_a_traceback(
    finished: Path, tmp_path: Path, process: Callable[..., "subprocess.Popen[str]"]
) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "copy"))
    with sqlite3.connect(path / "ledger.sqlite") as db:  # as if its last evaluation were still to come
        db.execute("DELETE FROM evaluations WHERE split = 'test' AND round = 3")
    db.close()
    follower = process("inspect", path, "--follow")
    assert follower.stdout is not None
    for line in follower.stdout:
        if line.startswith("after 3 rounds: validation"):
            break
    time.sleep(0.2)
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert err == "interrupted\n"
