"""Runs commands until standard input ends, then ends them with all that they started.

Each line of standard input is a command as JSON: {"command": [...], "folder": ..., "environment": {...}, "log": file}.
Its process id is written to standard output, and the log gets what the command says. The caller holds the other end of
standard input, so all of it ends with the caller however that ends, killed included. A script of its own, with the
standard library only, so that it starts at once and stays small.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE = 10.0  # seconds between asking a process to end and killing it
_PR_SET_CHILD_SUBREAPER = 36


def parents() -> dict[int, int]:
    """Process id -> its parent's, of all processes that still run."""
    rows = []
    if sys.platform == "linux":  # `ps` is missing in slim images
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
                rows.append((path.parent.name, parent, state))
    else:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=False)
        rows += [(pid, parent, state) for pid, parent, state in map(str.split, listing.stdout.splitlines())]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def descendants(pid: int) -> list[int]:
    known, found = parents(), [pid]
    for one in found:  # grows while it is walked
        found += [child for child, parent in known.items() if parent == one]
    return found[1:]


def end_all() -> None:
    """Asks every descendant once to end, and kills what is left after the grace."""
    asked: set[int] = set()
    deadline = time.monotonic() + GRACE
    while family := descendants(os.getpid()):
        late = time.monotonic() > deadline
        for pid in family if late else set(family) - asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked.update(family)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def start(line: bytes) -> "subprocess.Popen[bytes]":
    asked = json.loads(line)
    with Path(asked["log"]).open("ab") as log:
        return subprocess.Popen(
            asked["command"], cwd=asked["folder"], env=asked["environment"], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def main() -> None:
    if sys.platform == "linux":  # orphans become this process's children: none is missed
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    started: list[subprocess.Popen[bytes]] = []
    pending = b""
    while True:
        started = [process for process in started if process.poll() is None]  # none that has ended stays a zombie
        if not select.select([sys.stdin], [], [], 0.2)[0]:
            continue
        data = os.read(sys.stdin.fileno(), 2**16)
        if not data:
            break
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            try:
                started.append(start(line))
                said = str(started[-1].pid)
            except OSError as error:
                said = f"error {error.strerror}"
            print(said, flush=True)
    end_all()


if __name__ == "__main__":
    main()
