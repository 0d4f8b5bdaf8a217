"""The ledger: a run's records in order, hash-chained, in one SQLite file; a round is one transaction."""

import hashlib
import json
import os
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fedzo.errors import LedgerError
from fedzo.federation.artifact import artifact_name
from fedzo.federation.spec import RunSpec
from fedzo.optimizers import Records, Scalars, Seeds

_SCHEMA = """
CREATE TABLE header (id INTEGER PRIMARY KEY CHECK (id = 0), spec TEXT NOT NULL, head_round INTEGER NOT NULL,
                     head_hash BLOB NOT NULL);
CREATE TABLE rounds (round INTEGER PRIMARY KEY, payload BLOB NOT NULL, hash BLOB NOT NULL, summary TEXT NOT NULL);
CREATE TABLE artifacts (hash TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE evaluations (round INTEGER NOT NULL, split TEXT NOT NULL, metrics TEXT NOT NULL,
                          PRIMARY KEY (round, split));
CREATE TABLE members (client INTEGER PRIMARY KEY, details TEXT NOT NULL);
CREATE TABLE charges (round INTEGER NOT NULL, client INTEGER, releases INTEGER NOT NULL);
CREATE TABLE ending (id INTEGER PRIMARY KEY CHECK (id = 0), reason TEXT NOT NULL);
"""
_PAYLOAD = struct.Struct("<IHI32sI")
_WITH_GRADIENTS = 1 << 31  # in a payload's number of records
NO_DIGEST = bytes(32)


@dataclass(frozen=True)
class LedgerRound:
    """One round of the ledger.

    Attributes:
        round: from 0.
        seeds, scalars: uint64 [K, R] and float32 [K, C R]; R is 0 in a round that missed its quorum.
        clients: numbers of the clients whose contributions it holds, ascending.
        digest: SHA-256 of theta after the round, or 32 zero bytes where none was taken.
        gradients: float32 [K, F] as in `Records`, or None; an artifact, which the chain names by its SHA-256.
    """

    round: int
    seeds: Seeds
    scalars: Scalars
    clients: tuple[int, ...]
    digest: bytes
    gradients: Scalars | None = None

    @cached_property
    def artifacts(self) -> dict[str, bytes]:
        """The gradients as little-endian bytes, if there are any, by their SHA-256."""
        data = b"" if self.gradients is None else self.gradients.astype("<f4", copy=False).tobytes()
        return {artifact_name(data): data} if data else {}

    def to_bytes(self) -> bytes:
        """The bytes that the chain hashes."""
        steps, width = self.seeds.shape
        names = b"".join(map(bytes.fromhex, self.artifacts))
        marked = width | _WITH_GRADIENTS if names else width
        head = _PAYLOAD.pack(self.round, steps, marked, self.digest, len(self.clients)) + names
        clients = np.array(self.clients, dtype="<u4").tobytes()
        return head + clients + self.seeds.astype("<u8").tobytes() + self.scalars.astype("<f4").tobytes()

    @staticmethod
    def from_bytes(data: bytes, artifact: Callable[[str], bytes]) -> "LedgerRound":
        """Inverse of `to_bytes`, given the artifacts by their names; a wrong length is a ValueError."""
        if len(data) < _PAYLOAD.size:
            raise ValueError("payload too short")
        round_, steps, marked, digest, count = _PAYLOAD.unpack_from(data)
        width = marked & ~_WITH_GRADIENTS
        start = _PAYLOAD.size + (32 if marked != width else 0)
        at, each = start + 4 * count, 4 * steps * width
        rest = len(data) - at - 2 * each
        if rest < each or rest % each if each else rest:
            raise ValueError("payload of a wrong length")
        clients = np.frombuffer(data[start:at], dtype="<u4")
        seeds = np.frombuffer(data[at : at + 8 * steps * width], dtype="<u8").astype(np.uint64)
        scalars = np.frombuffer(data[at + 8 * steps * width :], dtype="<f4").astype(np.float32)
        of_a_step = scalars.size // max(1, steps)
        gradients = None
        if marked != width:
            values = artifact(data[_PAYLOAD.size : start].hex())
            if steps == 0 or len(values) % (4 * steps):
                raise ValueError("gradients of a wrong length")
            gradients = np.frombuffer(values, dtype="<f4").astype(np.float32).reshape(steps, -1)
        return LedgerRound(
            round_, seeds.reshape(steps, width), scalars.reshape(steps, of_a_step), tuple(clients.tolist()), digest,
            gradients,
        )  # fmt: skip

    def records(self) -> Records:
        """As the update rule takes them."""
        return Records(self.round * self.seeds.shape[0], self.seeds, self.scalars, self.gradients)


def chain(previous: bytes, payload: bytes) -> bytes:
    """The hash of a round: SHA-256 over the hash before it and its payload."""
    return hashlib.sha256(previous + payload).digest()


def _connect(path: Path, write: bool) -> sqlite3.Connection:
    """A connection in autocommit; transactions are written out."""
    uri = path.absolute().as_uri()
    folder_writable = os.access(path.parent, os.W_OK)
    if write and not (folder_writable and os.access(path, os.W_OK)):
        raise LedgerError(f"{path} cannot be opened for writing: it or its folder is read-only")
    # Without a write-ahead log the file is complete; "immutable" then spares SQLite from making one, which a read-only
    # directory would refuse.
    settled = not path.with_name(f"{path.name}-wal").exists() and not folder_writable
    mode = "rw" if write else "ro&immutable=1" if settled else "ro"
    try:
        return sqlite3.connect(f"{uri}?mode={mode}", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise LedgerError(f"{path} cannot be opened ({error})") from error


class Ledger:
    """A ledger file, opened for reading or, by the one process that runs the run, for appending.

    Raises:
        LedgerError: from every method, when the file is damaged or cannot be written.
    """

    def __init__(self, path: Path, *, write: bool = False) -> None:
        if not path.is_file():
            raise LedgerError(f"no ledger at {path}; give the run's folder or its ledger.sqlite")
        self.path = path
        self._db = _connect(path, write)
        try:
            self._open(write)
        except BaseException:
            self._db.close()
            raise

    def _open(self, write: bool) -> None:
        row = self._one("SELECT spec, head_round, head_hash FROM header")
        if row is None:
            raise LedgerError(f"{self.path} has no header: it is truncated")
        text, rounds, head = row
        if not isinstance(rounds, int) or not isinstance(head, bytes):
            raise LedgerError(f"{self.path}: the header is damaged; restore the ledger from a copy")
        self.spec, self._rounds, self._head = RunSpec.from_json(text), rounds, head
        self._check_header(text)
        if write:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            except sqlite3.Error as error:
                raise LedgerError(f"{self.path} cannot be opened for writing ({error})") from error

    def _check_header(self, text: str) -> None:
        """The header starts the chain, so an edited one no longer fits the first round."""
        first = self._one("SELECT payload, hash FROM rounds WHERE round = 0") if self._rounds else None
        if self._rounds == 0:
            fits = self._head == self.spec.hash
        else:  # a first round that is missing or no blob is for `read` to name
            fits = first is None or not isinstance(first[0], bytes) or chain(self.spec.hash, first[0]) == first[1]
        if self.spec.to_json() != text or not fits:
            raise LedgerError(
                f"{self.path}: header and round 0 do not match the hash of round 0: the ledger was edited or damaged"
            )

    @staticmethod
    def create(path: Path, spec: RunSpec, artifacts: Mapping[str, bytes] | None = None) -> "Ledger":
        """A new ledger with this header; artifacts are checked against the SHA-256 that names them."""
        if path.exists():
            raise LedgerError(f"{path} exists; a new ledger does not replace it")
        scratch = path.with_name(f".{path.name}.new")
        try:
            scratch.unlink(missing_ok=True)
            db = sqlite3.connect(scratch)
            try:
                db.executescript(_SCHEMA)
                db.execute("INSERT INTO header VALUES (0, ?, 0, ?)", (spec.to_json(), spec.hash))
                for name, data in (artifacts or {}).items():
                    if hashlib.sha256(data).hexdigest() != name:
                        raise LedgerError(f"artifact {name[:12]} does not have the hash that names it")
                    db.execute("INSERT INTO artifacts VALUES (?, ?)", (name, data))
                db.commit()
                db.execute("PRAGMA journal_mode=WAL")  # here, where nobody reads it yet: readers would be in the way
            finally:
                db.close()
            scratch.replace(path)  # a ledger is there whole or not at all
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"cannot create the ledger {path}: {error}") from error
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
        return Ledger(path, write=True)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @property
    def rounds(self) -> int:
        """Rounds committed."""
        return self._rounds

    @property
    def head(self) -> bytes:
        """Hash of the last committed round: the hash of the ledger."""
        return self._head

    def append(self, entry: LedgerRound, summary: Mapping[str, Any]) -> None:
        """Commits the next round, its artifacts too; `summary` (counts, bytes, losses) is beside it, not hashed."""
        if entry.round != self._rounds:
            raise LedgerError(f"round {entry.round} cannot follow {self._rounds} committed rounds")
        payload = entry.to_bytes()
        head = chain(self._head, payload)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO artifacts VALUES (?, ?)", entry.artifacts.items())
            self._db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?)", (entry.round, payload, head, json.dumps(dict(summary)))
            )
            self._db.execute("UPDATE header SET head_round = ?, head_hash = ?", (entry.round + 1, head))
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._rollback()
            raise LedgerError(
                f"round {entry.round} could not be written to {self.path} ({error}); the {self._rounds} rounds "
                "before it are intact: free disk space, then `fedzo resume`"
            ) from error
        self._rounds, self._head = entry.round + 1, head

    def _rollback(self) -> None:
        with suppress(sqlite3.Error):  # the error that led here is the one to tell
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[LedgerRound]:
        """The rounds start, ..., stop - 1, each checked against the hash chain; an error names the first bad round."""
        previous = self.hash_before(start)
        for round_ in range(start, self._rounds if stop is None else stop):
            try:
                row = self._one("SELECT payload, hash FROM rounds WHERE round = ?", round_)
            except LedgerError as error:
                raise LedgerError(f"{self.path}: round {round_} cannot be read: {error.__cause__}") from error
            if row is None:
                raise LedgerError(
                    f"{self.path}: round {round_} is missing of {self._rounds}: the ledger is truncated; "
                    "restore it from a copy"
                )
            # SQLite keeps whatever type an edit put there.
            if not isinstance(row[0], bytes) or chain(previous, row[0]) != row[1]:
                raise LedgerError(
                    f"{self.path}: round {round_} does not match its hash: the ledger was edited or damaged"
                )
            previous = row[1]
            try:
                entry = LedgerRound.from_bytes(row[0], self.artifact)
            except LedgerError as error:
                raise LedgerError(f"{error}, and round {round_} is made of it; restore it from a copy") from error
            except ValueError as error:
                raise LedgerError(f"{self.path}: round {round_} is damaged ({error})") from error
            if entry.round != round_:
                raise LedgerError(f"{self.path}: round {round_} holds the records of round {entry.round}")
            yield entry
        if stop is None and previous != self._head:
            raise LedgerError(f"{self.path}: the last round does not match the header's hash: the ledger was edited")

    def hash_before(self, round_: int) -> bytes:
        """The chain's hash before a round."""
        if round_ == 0:
            return self.spec.hash
        row = self._one("SELECT hash FROM rounds WHERE round = ?", round_ - 1)
        if row is None or not isinstance(row[0], bytes):
            raise LedgerError(f"{self.path}: round {round_ - 1} is missing or damaged; the ledger has {self._rounds}")
        return row[0]

    def artifact(self, name: str) -> bytes:
        """The artifact with this SHA-256, checked."""
        row = self._one("SELECT data FROM artifacts WHERE hash = ?", name)
        if row is None or not isinstance(row[0], bytes) or hashlib.sha256(row[0]).hexdigest() != name:
            raise LedgerError(f"{self.path}: the artifact {name[:12]} is missing or damaged")
        return row[0]

    def record_evaluation(self, round_: int, split: str, metrics: Mapping[str, float]) -> None:
        """Keeps metrics of theta after `round_` rounds on a split ("validation" or "test"); not hashed."""
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?)", (round_, split, json.dumps(dict(metrics)))
            )
        except sqlite3.Error as error:
            raise LedgerError(
                f"the evaluation after {round_} rounds could not be written to {self.path} ({error}); all "
                f"{self._rounds} rounds are intact: free disk space, then `fedzo resume`"
            ) from error

    def evaluations(self, split: str) -> dict[int, dict[str, float]]:
        """Rounds applied -> metrics."""
        rows = self._all("SELECT round, metrics FROM evaluations WHERE split = ? ORDER BY round", split)
        return {int(round_): self._json(text) for round_, text in rows}

    def record_members(self, members: Mapping[int, Mapping[str, Any]]) -> None:
        """Keeps what clients said of themselves when they registered last; not hashed."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT OR REPLACE INTO members VALUES (?, ?)",
                [(client, json.dumps(dict(details))) for client, details in members.items()],
            )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._rollback()
            raise LedgerError(
                f"the registered clients could not be written to {self.path} ({error}); all {self._rounds} rounds are "
                "intact: free disk space, then `fedzo resume`"
            ) from error

    def members(self) -> dict[int, dict[str, Any]]:
        """Client -> quantisation, compute_dtype and examples, as it registered last."""
        rows = self._all("SELECT client, details FROM members ORDER BY client")
        return {int(client): self._json(text) for client, text in rows}

    def charge(self, round_: int, clients: Sequence[int] | None, releases: int) -> None:
        """Writes down the releases that a private round is about to make of its clients' data (None: of everyone's).

        A round that is begun anew after a crash is charged anew: what it had asked for may have been released.
        """
        rows = [(round_, client, releases) for client in ([None] if clients is None else sorted(clients))]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO charges VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._rollback()
            raise LedgerError(
                f"the privacy budget of round {round_} could not be charged in {self.path} ({error}), so the round was "
                f"not begun; all {self._rounds} rounds are intact: free disk space, then `fedzo resume`"
            ) from error

    def charges(self) -> "Counter[int | None]":
        """Releases charged: of each client, and (None) of everyone."""
        rows = self._all("SELECT client, SUM(releases) FROM charges GROUP BY client")
        return Counter({None if client is None else int(client): int(total) for client, total in rows})

    def record_end(self, reason: str) -> None:
        """Keeps why a run ended before its last round; not hashed."""
        try:
            self._db.execute("INSERT OR REPLACE INTO ending VALUES (0, ?)", (reason,))
        except sqlite3.Error as error:
            raise LedgerError(f"the end of the run could not be written to {self.path} ({error})") from error

    @property
    def ended(self) -> str:
        """Why the run ended before its last round; "": it did not."""
        row = self._one("SELECT reason FROM ending")
        return str(row[0]) if row else ""

    def summaries(self, start: int = 0) -> list[dict[str, Any]]:
        """The summaries of the rounds from `start` on, in order."""
        rows = self._all("SELECT summary FROM rounds WHERE round >= ? ORDER BY round", start)
        return [self._json(text) for (text,) in rows]

    def _json(self, text: str) -> dict[str, Any]:
        try:
            return dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise LedgerError(f"{self.path}: a summary, evaluation or member is damaged: restore the file") from error

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        rows = self._all(query, *values)
        return rows[0] if rows else None

    def _all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path} is no ledger that can be read ({error}); restore it from a copy") from error
