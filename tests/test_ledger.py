"""The ledger: what was committed stays, and what was changed is found."""

import hashlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from tiny import initial_values, make_spec, rounds_of, start, with_initial

from fedzo.errors import LedgerError
from fedzo.federation.ledger import Ledger, LedgerRound, chain
from fedzo.federation.replica import Replica
from fedzo.federation.spec import RunSpec

ROUNDS = 6


def entry(round_: int, width: int = 3) -> LedgerRound:
    """A round with records that depend on its number alone."""
    rng = np.random.default_rng(round_)
    seeds = rng.integers(0, 2**64, (1, width), dtype=np.uint64)
    return LedgerRound(
        round_, seeds, rng.normal(size=(1, width)).astype(np.float32), (0, 2), bytes([round_ % 256]) * 32
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's ledger; copy it, do not touch it."""
    run = start(tmp_path_factory.mktemp("whole"), with_initial())
    run.finish()
    run.ledger.record_evaluation(6, "test", {"loss": 0.5})
    run.ledger.close()
    return run.ledger.path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path))


def edit(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def read_all(path: Path) -> list[LedgerRound]:
    with Ledger(path) as ledger:
        return rounds_of(ledger)


# -- reading back


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    path, spec = tmp_path / "ledger.sqlite", make_spec(rounds=20)
    entries = [entry(0), entry(1, 0), entry(2, 7)]
    with Ledger.create(path, spec) as ledger:
        assert (ledger.rounds, ledger.head) == (0, spec.hash)
        for e in entries:
            ledger.append(e, {"round": e.round, "loss": None})
        ledger.record_evaluation(0, "validation", {"loss": 2.0, "accuracy": 0.5})
        ledger.record_evaluation(3, "validation", {"loss": 9.0})
        ledger.record_evaluation(3, "validation", {"loss": 1.0})
    with Ledger(path) as ledger:
        assert ledger.spec == spec
        assert [e.to_bytes() for e in ledger.read()] == [e.to_bytes() for e in entries]
        assert [e.round for e in ledger.read(1, 2)] == [1]
        head = spec.hash
        for e in entries:
            head = hashlib.sha256(head + e.to_bytes()).digest()
        assert ledger.head == head == ledger.hash_before(3)
        assert ledger.summaries() == [{"round": i, "loss": None} for i in range(3)]
        assert ledger.evaluations("validation") == {0: {"loss": 2.0, "accuracy": 0.5}, 3: {"loss": 1.0}}
        assert ledger.evaluations("test") == {}


def test_the_header_survives(tmp_path: Path) -> None:
    spec = make_spec(eps=1e-3, learning_rate=0.1 + 0.2)
    assert RunSpec.from_json(spec.to_json()) == spec
    assert len(spec.run_id) == 8 and spec.hash == hashlib.sha256(spec.to_json().encode()).digest()
    assert make_spec(seed=8).run_id != spec.run_id


def test_rounds_come_in_order(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l", make_spec()) as ledger:
        with pytest.raises(LedgerError, match="round 1 cannot follow 0"):
            ledger.append(entry(1), {})
        ledger.append(entry(0), {})
        with pytest.raises(LedgerError, match="round 0 cannot follow 1"):
            ledger.append(entry(0), {})
        assert len(rounds_of(ledger)) == 1


def test_a_new_ledger_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(LedgerError, match="does not have the hash"):
        Ledger.create(path, make_spec(), {"0" * 64: b"data"})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LedgerError, match="cannot create"):
        Ledger.create(tmp_path / "no" / "folder", make_spec())
    Ledger.create(path, make_spec()).close()
    with pytest.raises(LedgerError, match="exists"):
        Ledger.create(path, make_spec(seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_artifacts_are_checked(copy: Path) -> None:
    with Ledger(copy) as ledger:
        assert ledger.artifact(ledger.spec.initial) == initial_values()
        with pytest.raises(LedgerError, match="is missing or damaged"):
            ledger.artifact("0" * 64)
    for value in ("x'00ff'", "'text'"):
        edit(copy, f"UPDATE artifacts SET data = {value}")
        with Ledger(copy) as ledger, pytest.raises(LedgerError, match="is missing or damaged"):
            ledger.artifact(ledger.spec.initial)


# -- edited


def _flip(column: str, round_: int, at: int) -> str:
    """SQL that changes one byte of a blob."""
    before, byte, after = f"substr({column}, 1, {at})", f"substr({column}, {at + 1}, 1)", f"substr({column}, {at + 2})"
    changed = f"CASE {byte} WHEN x'00' THEN x'01' ELSE x'00' END"
    return f"UPDATE rounds SET {column} = CAST({before} || {changed} || {after} AS BLOB) WHERE round = {round_}"


SWAP = (
    "UPDATE rounds SET round = -1 WHERE round = 2",
    "UPDATE rounds SET round = 2 WHERE round = 3",
    "UPDATE rounds SET round = 3 WHERE round = -1",
)
EDITS = {
    "payload's first byte": ([_flip("payload", 3, 0)], "round 3 does not match its hash"),
    "payload's digest": ([_flip("payload", 3, 12)], "round 3 does not match its hash"),
    "payload's last byte": ([_flip("payload", 5, 97)], "round 5 does not match its hash"),
    "hash": ([_flip("hash", 2, 7)], "round 2 does not match its hash"),
    "last hash": ([_flip("hash", 5, 31)], "round 5 does not match its hash"),
    "hash of the first": ([_flip("hash", 0, 0)], "round 0"),
    "first payload": ([_flip("payload", 0, 60)], "round 0"),
    "payload is text": (["UPDATE rounds SET payload = 'abc' WHERE round = 4"], "round 4 does not match its hash"),
    "hash is text": (["UPDATE rounds SET hash = 'abc' WHERE round = 4"], "round 4 does not match its hash"),
    "payload is empty": (["UPDATE rounds SET payload = x'' WHERE round = 4"], "round 4 does not match its hash"),
    "first payload is a number": (["UPDATE rounds SET payload = 1 WHERE round = 0"], "round 0"),
    "first round deleted": (["DELETE FROM rounds WHERE round = 0"], "round 0 is missing of 6"),
    "middle round deleted": (["DELETE FROM rounds WHERE round = 3"], "round 3 is missing of 6"),
    "last round deleted": (["DELETE FROM rounds WHERE round = 5"], "round 5 is missing of 6"),
    "rounds swapped": (SWAP, "round 2 does not match its hash"),
    "head too short": (["UPDATE header SET head_round = 5"], "last round does not match"),
    "head too long": (["UPDATE header SET head_round = 7"], "round 6 is missing of 7"),
    "head's hash": (["UPDATE header SET head_hash = zeroblob(32)"], "last round does not match"),
    "head is text": (["UPDATE header SET head_hash = 'a'"], "header is damaged"),
    "head round is text": (["UPDATE header SET head_round = 'a'"], "header is damaged"),
    "no header": (["DELETE FROM header"], "no header"),
    "header is no JSON": (["UPDATE header SET spec = '{'"], "not one of this version"),
    "header is a list": (["UPDATE header SET spec = '[1]'"], "not one of this version"),
    "header is a blob": (["UPDATE header SET spec = x'ff00'"], "not one of this version"),
    "header lacks a field": (["UPDATE header SET spec = json_remove(spec, '$.eps')"], "not one of this version"),
    "header has a field more": (["UPDATE header SET spec = json_set(spec, '$.x', 1)"], "not one of this version"),
    "header's version": (["UPDATE header SET spec = json_set(spec, '$.protocol', 1)"], "protocol version 1"),
    "header's seed": (["UPDATE header SET spec = json_set(spec, '$.seed', 8)"], "round 0"),
    "header's type": (["UPDATE header SET spec = json_set(spec, '$.rounds', 'six')"], "round 0"),
    "header's spelling": (["UPDATE header SET spec = spec || ' '"], "round 0"),
    "table gone": (["DROP TABLE rounds"], "no such table"),
}


@pytest.mark.parametrize("name", list(EDITS))
def test_an_edited_ledger_names_the_first_bad_round(copy: Path, name: str) -> None:
    statements, message = EDITS[name]
    edit(copy, *statements)
    with pytest.raises(LedgerError, match=message):
        read_all(copy)


def test_a_header_without_rounds_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "l"
    Ledger.create(path, make_spec()).close()
    edit(path, "UPDATE header SET spec = json_set(spec, '$.seed', 8)")
    with pytest.raises(LedgerError, match="round 0"):
        Ledger(path)


def test_edited_notes_are_a_ledger_error(copy: Path) -> None:
    edit(copy, "UPDATE rounds SET summary = 'abc' WHERE round = 1", "UPDATE evaluations SET metrics = '7'")
    with Ledger(copy) as ledger:
        with pytest.raises(LedgerError, match="damaged"):
            ledger.summaries()
        with pytest.raises(LedgerError, match="damaged"):
            ledger.evaluations("test")


def test_an_edit_that_rewrites_the_chain_is_found_by_the_next_digest(copy: Path) -> None:
    """Whoever rewrites every hash still cannot make theta fit the recorded digest."""
    from tiny import theta0

    from fedzo.federation.coordinator import replay

    entries = read_all(copy)
    with Ledger(copy) as ledger:
        spec = ledger.spec
    entries[2].scalars[0, 0] += 1.0
    head = spec.hash
    with sqlite3.connect(copy) as db:
        for e in entries:
            head = chain(head, e.to_bytes())
            db.execute("UPDATE rounds SET payload = ?, hash = ? WHERE round = ?", (e.to_bytes(), head, e.round))
        db.execute("UPDATE header SET head_hash = ?", (head,))
    db.close()
    with Ledger(copy) as ledger, pytest.raises(LedgerError, match="another theta than the digest recorded"):
        replay(ledger, Replica(spec, theta0))


# -- damaged files


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger(path)
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="no such table"):
        Ledger(path)
    path.write_bytes(b"this is a text file\n" * 500)
    for write in (False, True):
        with pytest.raises(LedgerError, match="not a database"):
            Ledger(path, write=write)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, make_spec(rounds=100)) as ledger:
        for i in range(100):
            ledger.append(entry(i, 100), {})
    data = path.read_bytes()
    for part in (0.99, 0.9, 0.7, 0.5, 0.2, 0.05, 0.001):
        path.write_bytes(data[: int(part * len(data))])
        for write in (False, True):
            with (
                pytest.raises(LedgerError, match=r"restore it from a copy|cannot be read"),
                Ledger(path, write=write) as kept,
            ):
                rounds_of(kept)


def test_random_damage_is_never_another_exception(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, make_spec(rounds=20)) as ledger:
        for i in range(20):
            ledger.append(entry(i, 50), {})
    data, good = path.read_bytes(), [entry(i, 50).to_bytes() for i in range(20)]
    rng = random.Random(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        at = rng.randrange(len(data))
        damaged[at : at + 8] = rng.randbytes(8)
        path.write_bytes(damaged)
        try:
            assert [e.to_bytes() for e in read_all(path)] == good  # it hit nothing that counts
        except LedgerError:
            refused += 1
    assert refused > 30


def in_child(action: Callable[[], object]) -> tuple[int, IO[str]]:
    """Runs an action in a forked process; its number and what it prints."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, os.fdopen(reader)
    status = 1
    try:
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(writer, "w", buffering=1)
        action()
        status = 0
    finally:
        os._exit(status)


def test_a_read_only_ledger_can_be_read_but_not_run(whole: Path) -> None:
    def look() -> None:
        if os.getuid() == 0:  # whom permissions do not stop
            os.setgid(65534)
            os.setuid(65534)
        print(len(read_all(path)), [p.name for p in path.parent.iterdir()])
        try:
            Ledger(path, write=True)
        except LedgerError as error:
            print(error)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(whole, folder))
        path.chmod(0o444)
        path.parent.chmod(0o555)
        child, output = in_child(look)
        lines = output.read().splitlines()
        os.waitpid(child, 0)
        path.parent.chmod(0o755)
    assert lines[0] == "6 ['ledger.sqlite']"
    assert "cannot be opened for writing" in lines[1]


# -- crashes


def test_a_full_disk_leaves_earlier_rounds_and_goes_on_after(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, make_spec(rounds=500)) as ledger:
        ledger.append(entry(0), {})
        (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
        ledger._db.execute(f"PRAGMA max_page_count = {pages + 20}")
        with pytest.raises(LedgerError, match=r"round \d+ could not be written .* free disk space") as caught:
            for i in range(1, 500):
                ledger.append(entry(i, 200), {})
        done = ledger.rounds
        assert f"round {done} could" in str(caught.value) and f"the {done} rounds before it are intact" in str(
            caught.value
        )
        assert len(read_all(path)) == len(rounds_of(ledger)) == done > 1
        ledger._db.execute("PRAGMA max_page_count = 1000000")  # space was freed
        ledger.append(entry(done, 200), {})
        assert len(read_all(path)) == done + 1


def test_writes_that_the_system_refuses(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.create(path, make_spec(rounds=2000)).close()

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        with Ledger(path, write=True) as ledger:
            try:
                for i in range(2000):
                    ledger.append(entry(i, 200), {})
            except LedgerError as error:
                print(ledger.rounds, error)

    child, output = in_child(fill)
    text = output.read()
    os.waitpid(child, 0)
    rounds = int(text.split()[0])
    assert "could not be written" in text and rounds > 5
    assert len(read_all(path)) == rounds
    with Ledger(path, write=True) as ledger:
        ledger.append(entry(rounds), {})
    assert len(read_all(path)) == rounds + 1


@pytest.mark.parametrize("statement", ["INSERT INTO rounds", "UPDATE header", "COMMIT"])
def test_kill_9_within_a_round_loses_that_round(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, make_spec()) as ledger:
        ledger.append(entry(0), {})

    def die() -> None:
        with Ledger(path, write=True) as ledger:
            # SQLite calls it before it runs a statement
            ledger._db.set_trace_callback(
                lambda sql: os.kill(os.getpid(), signal.SIGKILL) if statement in sql else None
            )
            ledger.append(entry(1), {})

    child, _ = in_child(die)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [e.round for e in read_all(path)] == [0]
    with Ledger(path, write=True) as ledger:
        ledger.append(entry(1), {})
    assert [e.round for e in read_all(path)] == [0, 1]


def test_kill_9_loses_at_most_the_round_in_flight(tmp_path: Path) -> None:
    path, spec = tmp_path / "ledger.sqlite", make_spec(rounds=10**6)
    Ledger.create(path, spec).close()

    def append() -> None:
        with Ledger(path, write=True) as ledger:
            for i in range(ledger.rounds, 10**6):
                ledger.append(entry(i), {})
                print(ledger.rounds)

    rng, told = random.Random(0), 0
    for _ in range(8):
        child, output = in_child(append)
        output.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        told = max([told, *(int(line) for line in output.read().split("\n")[:-1])])
        os.waitpid(child, 0)
        with Ledger(path) as ledger:
            assert told <= ledger.rounds <= told + 1
            head = spec.hash
            for i, e in enumerate(ledger.read()):
                assert e.to_bytes() == entry(i).to_bytes()
                head = chain(head, e.to_bytes())
            assert ledger.head == head
    assert told >= 8
