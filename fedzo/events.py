"""What happens in a run, as events: one line of JSON each in events.jsonl, through the logger "fedzo.server".

Whoever wants them elsewhere adds a handler of `logging` to that logger, with `JsonFormatter` or a formatter of its own.
An event holds names, numbers and fedzo's own words: never training data, nor the text of an error that is not fedzo's.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedzo.errors import ConfigError, FedzoError, RunError
from fedzo.federation.ledger import Ledger
from fedzo.files import strict_json

Event = Literal[
    "run-started",
    "run-resumed",
    "run-finished",
    "run-ended",
    "run-interrupted",
    "run-failed",
    "clients-admitted",
    "client-admitted",
    "client-refused",
    "client-lost",
    "client-rejoined",
    "round-committed",
    "drop",
    "evaluation",
    "snapshot-sent",
    "artifact-sent",
]
# Those that say who takes part in a round.
_OF_A_ROUND = ("drop", "snapshot-sent", "client-lost")
# Lines of one event in one round at most, but for level DEBUG.
MOST = 50
_LONGEST = 1000  # characters of a text
LEVEL = "FEDZO_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_log = logging.getLogger("fedzo.server")


class Events:
    """Tells the events of one run."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._run = ledger, ledger.spec.run_id.hex()
        self._secret = ledger.spec.terms is not None and ledger.spec.terms.secret

    def tell(self, event: Event, level: int = logging.INFO, *, round_: int | None = None, **fields: Any) -> None:
        """Tells an event; one that says who takes part in a round is kept back where that is nobody's to know.

        Args:
            level: of `logging`; DEBUG for what happens to each client in each round.
            round_: that it belongs to; None: the round in flight, which is the number of committed ones.
            fields: numbers, texts (cut to 1,000 characters) and dicts of them, none called time, level, event or run.
        """
        if not _log.isEnabledFor(level) or (self._secret and event in _OF_A_ROUND):
            return
        told = {name: value[:_LONGEST] if isinstance(value, str) else value for name, value in fields.items()}
        which = self._ledger.rounds if round_ is None else round_
        text = " ".join(f"{name}={strict_json(value)}" for name, value in told.items())
        extra = {"fedzo": {"event": event, "run": self._run, "round": which, **told}}
        _log.log(level, "%s run=%s round=%d %s", event, self._run, which, text, extra=extra)

    def failed(self, error: BaseException) -> None:
        """Tells why a run stops before its end: what fedzo says, of any other error its type."""
        if isinstance(error, KeyboardInterrupt):
            self.tell("run-interrupted", logging.WARNING)
            return
        said: dict[str, Any] = {"message": str(error)} if isinstance(error, FedzoError) else {}
        self.tell("run-failed", logging.ERROR, error=type(error).__name__, **said)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, event, run, round, and the event's fields.

    Of a record that is no event: time, level, "log" as event, logger and message.
    """

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = _fields(record) or {"event": "log", "logger": record.name, "message": record.getMessage()}
        return strict_json({"time": at, "level": record.levelname, **fields})


class _File(logging.FileHandler):
    """events.jsonl: events only, appended, few of a kind in a round."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(JsonFormatter())
        self._round: object = None
        self._told: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        fields = _fields(record)
        if not fields or record.levelno <= logging.DEBUG:
            return bool(fields)
        if (at := (fields["run"], fields["round"])) != self._round:
            self._round, self._told = at, Counter()
        self._told[fields["event"]] += 1
        return self._told[fields["event"]] <= MOST

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise _cannot_write(Path(self.baseFilename), error) from error
        super().handleError(record)


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Within it events are appended to a file, from the level in $FEDZO_LOG_LEVEL on (INFO).

    Raises:
        ConfigError: there is no such level.
        RunError: the file cannot be written; also from whoever tells an event.
    """
    level = os.environ.get(LEVEL) or "INFO"
    if level not in _LEVELS:
        raise ConfigError(f"${LEVEL} is {level!r}, wanted one of {', '.join(_LEVELS)}")
    try:
        _end_line(path)
        handler = _File(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    handler.setLevel(level)
    before = _log.level
    _log.setLevel(min(handler.level, before) if before else handler.level)
    _log.addHandler(handler)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(before)
        with suppress(OSError):  # told when the line was written
            handler.close()


def read_events(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events in a file from byte `start` on, and where they end; a line that is not whole yet is left for later."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
    except FileNotFoundError:
        return [], start
    whole = data[: data.rfind(b"\n") + 1]
    found = []
    for line in whole.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # what a crash left
            continue
    return found, start + len(whole)


def _end_line(path: Path) -> None:
    """Ends the last line of a file, of which a crash may have left half."""
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
            file.write(b"\n")


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fedzo", {})
    return fields


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write {path}: {error.strerror}; committed rounds are intact: free space, then `fedzo resume`"
    )
