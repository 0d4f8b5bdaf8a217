"""The run folder: one process at a time, files whole or not at all, notes that follow the ledger."""

import json
from pathlib import Path

import pytest
from tiny import Federation, make_spec, make_terms, private_spec, start

from fedzo.config import Config, load_config
from fedzo.engine import TimedRound
from fedzo.errors import RunError
from fedzo.federation.coordinator import RoundSummary
from fedzo.files import write_atomically
from fedzo.run_folder import MetricsLog, RunFolder, new_run_path


def lines(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def played(path: Path, rounds: int) -> tuple[RunFolder, Federation]:
    folder, run = RunFolder(path), start(path, make_spec())
    run.ledger.record_evaluation(0, "validation", {"loss": 2.0, "accuracy": 0.5})
    for _ in range(rounds):
        run.round()
    return folder, run


def test_create_and_open(tmp_path: Path) -> None:
    config = load_config(None, ["seed=5", "method.eps=0.5"])
    folder = RunFolder.create(tmp_path / "a" / "run", config)
    assert folder.load_config() == config
    assert RunFolder.open(folder.path) == RunFolder.open(folder.ledger) == folder
    assert [path.name for path in folder.path.iterdir()] == ["config.toml"]
    RunFolder.create(folder.path, config)  # nothing has been run there
    folder.ledger.write_bytes(b"")
    with pytest.raises(RunError, match="already holds a run; `fedzo resume"):
        RunFolder.create(folder.path, config)
    with pytest.raises(RunError, match="is no run"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        RunFolder.create(tmp_path / "file", config)
    with pytest.raises(RunError, match="cannot write the run folder"):
        RunFolder.create(tmp_path / "file" / "run", config)


def test_names_of_new_runs() -> None:
    assert new_run_path(load_config(None, ["name=x"])) == Path("runs/x")
    assert new_run_path(Config(), 0.0).name.startswith("toy-reviews-19")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(RunError, match="being run by another process"), folder.locked():
        pass
    with folder.locked():
        pass
    with pytest.raises(RunError, match="cannot write the run folder"), RunFolder(tmp_path / "none").locked():
        pass


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.toml"]


def test_the_log_follows_the_ledger(tmp_path: Path) -> None:
    folder, run = played(tmp_path, 2)
    log = MetricsLog(folder, run.ledger)
    summary = run.round()
    log.round(summary)
    log.evaluation(3, "test", {"loss": 1.0})
    log.close()
    found = lines(folder)
    assert [line["event"] for line in found] == ["round", "round", "evaluation", "round", "evaluation"]
    assert found[3] == {"event": "round", **vars(summary)}
    assert found[2] == {"event": "evaluation", "rounds": 0, "split": "validation", "loss": 2.0, "accuracy": 0.5}


def test_resume_makes_log_and_events_anew(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, run = played(tmp_path, 1)
    log = MetricsLog(folder, run.ledger)
    run.round()  # committed, but the process dies before it is noted
    lost = RoundSummary(7, 1, 1, {}, 9.0, 1, 1, 0, 1, 1.0)
    log.round(lost)  # and this was noted, but is not in the ledger
    log._file.write('{"event": "rou')  # half a line
    log.close()
    log = MetricsLog(folder, run.ledger)
    log.round(run.round())
    log.evaluation(3, "validation", {"loss": 1.0, "accuracy": 0.75})
    log.close()
    assert [line["round"] for line in lines(folder) if line["event"] == "round"] == [0, 1, 2]
    events = accumulator.EventAccumulator(str(folder.events)).Reload()
    wanted = [(s["round"] + 1, s["loss"]) for s in run.ledger.summaries()]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("round/loss")] == wanted
    assert [(e.step, e.value) for e in events.Scalars("validation/accuracy")] == [(0, 0.5), (3, 0.75)]
    assert [e.value for e in events.Scalars("round/dropped")] == [0, 0, 0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once(tmp_path: Path) -> None:
    folder, run = played(tmp_path, 1)
    log = MetricsLog(folder, run.ledger)
    log._file.close()
    log._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(RunError, match="No space left on device; committed rounds are intact"):
        log.round(run.round())
    log.close()
    assert run.ledger.rounds == 2


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    folder, run = played(tmp_path, 1)
    folder.metrics.mkdir()
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl"):
        MetricsLog(folder, run.ledger)
    assert not list(tmp_path.glob(".metrics*"))


def test_drops_by_reason_and_times_are_plotted(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, run = played(tmp_path, 1)
    log = MetricsLog(folder, run.ledger)
    for tamper, seconds in ((lambda r, c, a: [] if c else [a], 1.5), (lambda r, c, a: [a], 0.5)):
        log.round(
            TimedRound(**vars(run.round(tamper)), replies=4, seconds=seconds, latency_median=0.25, latency_max=1.0)
        )
    log.close()
    events = accumulator.EventAccumulator(str(folder.events)).Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read["round/dropped/no-reply"] == [(2, 3.0), (3, 0.0)]
    assert read["round/dropped"] == [(1, 0.0), (2, 3.0), (3, 0.0)]
    # of the round before the log was opened nobody knows the time
    assert read["round/seconds"] == [(2, 1.5), (3, 0.5)] and read["round/replies"] == [(2, 4.0), (3, 4.0)]
    assert read["round/latency_median"] == [(2, 0.25), (3, 0.25)] and read["round/latency_max"] == [(2, 1.0), (3, 1.0)]
    assert "round/epsilon" not in read
    assert "seconds" not in lines(folder)[0] and lines(folder)[-1]["latency_max"] == 1.0


def test_a_secret_round_has_no_scalar_that_tells_of_it(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("dp_accounting")
    folder = RunFolder(tmp_path)
    terms = make_terms("client-central", rate=0.5, sampling="poisson")
    run = start(tmp_path, private_spec(terms, client_rate=0.5))
    log = MetricsLog(folder, run.ledger)
    for _ in range(6):
        log.round(TimedRound(**vars(run.round()), replies=2, seconds=1.0, latency_median=0.25, latency_max=1.0))
    log.close()
    events = accumulator.EventAccumulator(str(folder.events)).Reload()
    assert set(events.Tags()["scalars"]) == {"round/clip", "round/max_scalar", "round/epsilon"}
    spent = [event.value for event in events.Scalars("round/epsilon")]
    assert len(spent) == 6 and spent == sorted(spent) and spent[0] > 0.0
