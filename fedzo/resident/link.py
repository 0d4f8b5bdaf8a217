"""The thin side: finds or starts the worker of a run and device, and asks it. Imports nothing heavy."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from fedzo.cache import cache_directory, state_directory
from fedzo.errors import ProtocolError, RunError
from fedzo.resident.wire import Parcel, key, receive, runtime_directory, send

START_TIMEOUT = 60.0  # seconds for a worker to listen; it does so before it imports anything heavy
_LOG_BYTES = 2**20  # of a worker's log, above which the next one starts it anew


def name_of(spec: str, run_config: Mapping[str, Any], device: str) -> str:
    """The name of a worker: one for each run and device. Nodes that are configured differently share none."""
    config = {name: value for name, value in run_config.items() if name != "out"}
    told = json.dumps([spec, config, device, str(state_directory()), str(cache_directory())], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def ask(name: str, request: Parcel) -> Parcel:
    """The worker's reply. A worker that is not there is started; one that dies on it is started once more.

    Raises:
        RunError: no worker could be started, or it died again.
        ProtocolError: whoever listens there does not know this user's key.
    """
    folder = runtime_directory()
    for _ in range(2):
        reply = _try(folder, name, request)
        if reply is None:
            _start(folder, name)
            reply = _try(folder, name, request)
        if reply is not None:
            return reply
    raise RunError(f"the worker died while it answered, and so did the next; their log is {folder / name}.log")


def ask_running(name: str, request: Parcel) -> Parcel | None:
    """The reply of a worker, if it is there.

    Raises:
        ProtocolError: as `ask`.
    """
    return _try(runtime_directory(), name, request)


def status(folder: Path | None = None) -> dict[str, Mapping[str, Any]]:
    """What each worker says of itself, by its name.

    Args:
        folder: with their sockets; None: this user's.
    """
    folder = runtime_directory() if folder is None else folder
    found = {path.stem: _try(folder, path.stem, Parcel({"ask": "status"})) for path in folder.glob("*.sock")}
    return {name: reply.fields for name, reply in sorted(found.items()) if reply is not None}


def _try(folder: Path, name: str, request: Parcel) -> Parcel | None:
    """The reply; None: no worker listens, or it went away."""
    path = folder / f"{name}.sock"
    if len(os.fsencode(path)) > 100:
        raise RunError(
            f"the socket's path {path} is longer than a Unix socket's may be: set FEDZO_RUNTIME to a short one"
        )
    try:
        with Client(str(path), family="AF_UNIX", authkey=key(folder)) as connection:
            send(connection, request)
            return receive(connection)
    except AuthenticationError:
        raise ProtocolError(f"the worker at {path} has another key") from None
    except (OSError, EOFError):
        return None


def _start(folder: Path, name: str) -> None:
    """Starts a worker and waits until it listens.

    Raises:
        RunError: it does not.
    """
    path, log = folder / f"{name}.sock", folder / f"{name}.log"
    with suppress(OSError):
        if log.stat().st_size > _LOG_BYTES:
            log.unlink()
    with log.open("a", encoding="utf-8") as file:
        # Not from the working directory's modules (-P), and not ended with this process's group.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedzo.resident", name], stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        with suppress(OSError, EOFError), Client(str(path), family="AF_UNIX", authkey=key(folder)) as connection:
            send(connection, Parcel({"ask": "hello"}))
            receive(connection)
            return
        if process.poll() not in (None, 0):  # 0: another process has just started the same worker
            break
        time.sleep(0.02)
    raise RunError(f"the worker did not start; its log is {log}")
