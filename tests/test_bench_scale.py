import json
import os
from pathlib import Path

import bench_scale
import pytest


def test_a_run_of_the_server_alone(capsys: pytest.CaptureFixture[str]) -> None:
    bench_scale.main(["--engine", "server", "--clients", "40", "--per-round", "5", "--rounds", "6"])
    table = capsys.readouterr().out.strip().splitlines()
    (row,) = json.loads(table[-1])["rows"]
    assert table[1].split()[:3] == ["server", "40", "6"]
    assert (row["sampled"], row["accepted"], row["rounds"]) == (5.0, 5.0, 6)
    # A head of 46 bytes, 4 for each client's number, and two records of 12.
    assert row["ledger_payload_a_round"] == 46 + 4 * 5 + 2 * 12
    assert row["ledger_bytes_a_round"] > row["ledger_payload_a_round"] + 32
    assert row["server_peak_mib"] > 100
    assert row["rounds_per_second"] > 0 and row["client_steps_per_second"] == pytest.approx(
        5 * row["rounds_per_second"], rel=0.05
    )


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "server-4").mkdir()
    (tmp_path / "server-4" / "ledger.sqlite").touch()
    with pytest.raises(SystemExit, match=r"server, 4 clients: .*already holds a run"):
        bench_scale.play("server", 4, 2, 4, tmp_path, 100.0)


def test_sentences_are_enough_and_none_comes_twice(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    bench_scale.write_data(path, 25)
    examples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(examples) == 25 * bench_scale.EXAMPLES == len({example["sentence"] for example in examples})
    assert [example["label"] for example in examples[:4]] == [0, 1, 0, 1]


def test_processes_below() -> None:
    parents = {1: 0, 5: 1, 6: 5, 7: 6, 8: 1, 9: 5}
    assert sorted(bench_scale.processes_below(5, parents)) == [5, 6, 7, 9]


def test_roles_of_flowers_processes() -> None:
    commands = {
        "python\0/venv/bin/flwr-simulation\0--token\0x": "server",
        "python\0/venv/bin/flower-superlink\0--insecure": "superlink",
        "ray::ClientAppActor": "worker",
        "ray::IDLE": "other",
        "raylet": "other",
    }
    assert {command: bench_scale.role_of(command, "flower") for command in commands} == commands
    assert bench_scale.role_of("python\0bench_scale.py", "server") == "server"


def test_a_look_sees_this_process_and_its_memory() -> None:
    look = bench_scale.Look(os.getpid(), "local")
    look.start()
    held = bytearray(os.urandom(1)) * (64 * bench_scale.MIB)
    while not look.programs or len(look.programs[os.getpid()].times) < 2:
        pass
    look.stop()
    assert look.peak("server") > len(held)
    times = look.programs[os.getpid()].times
    assert look.cpu_between(times[0], times[-1]) > 0
