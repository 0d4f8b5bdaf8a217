"""Processes that end with this one, whatever happens to it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fedzo import guard
from fedzo.errors import RunError


def began(pid: int) -> str:
    """When a process began, in the system's own words, so that another with its number is not taken for it; "": it is
    gone."""
    if Path("/proc/self/stat").exists():
        try:
            told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        fields = told.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
    return "there"


@dataclass(frozen=True)
class Process:
    """A process of `Processes`.

    Attributes:
        pid: its id.
        when: it began.
    """

    pid: int
    when: str

    @property
    def alive(self) -> bool:
        return bool(self.when) and began(self.pid) == self.when

    def signal(self, number: int) -> None:
        """Sends a signal, if it is there."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Processes:
    """Starts commands, which end with its `with` block or this process, and with them all that they started."""

    def __enter__(self) -> "Processes":
        self._guard = subprocess.Popen(
            [sys.executable, "-I", guard.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._guard.stdin is not None and self._guard.stdout is not None
        self._guard.stdin.close()
        self._guard.wait()
        self._guard.stdout.close()

    def start(self, command: Sequence[str], *, folder: Path, environment: Mapping[str, str], log: Path) -> Process:
        """Starts a command.

        Args:
            folder: its working directory.
            log: what it says is added to this file.

        Raises:
            RunError: it cannot be started.
        """
        asked = {
            "command": list(command), "folder": str(folder), "environment": dict(environment), "log": str(log)
        }  # fmt: skip
        assert self._guard.stdin is not None and self._guard.stdout is not None
        try:
            self._guard.stdin.write(json.dumps(asked).encode() + b"\n")
            self._guard.stdin.flush()
        except OSError:
            raise RunError(f"cannot start {command[0]}: the process that guards the others is gone") from None
        said = self._guard.stdout.readline().decode().strip()
        if not said.isdecimal():
            raise RunError(f"cannot start {command[0]}: {said.removeprefix('error ') or 'it was not tried'}")
        return Process(int(said), began(int(said)))
