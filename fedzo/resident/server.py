"""The worker's side of the socket: takes requests, one at a time, until nobody needs it any more."""

import fcntl
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

from fedzo.errors import FedzoError, RunError
from fedzo.processes import began
from fedzo.resident.wire import Parcel, key, receive, runtime_directory, send

IDLE = 900.0  # seconds without a request after which a worker ends; FEDZO_IDLE sets another
ORPHANED = 60.0  # seconds after the last node that used it is gone: a node that restarts finds its model
_TICK = 0.5

_log = logging.getLogger("fedzo.resident")


class Served:
    """A worker's life around what answers its requests.

    Args:
        answer: request -> reply; never called twice at once.
        close: called once, at the end.
        idle, orphaned: seconds, as the module's constants.
    """

    def __init__(
        self,
        answer: Callable[[Parcel], Parcel],
        close: Callable[[], None],
        *,
        idle: float = IDLE,
        orphaned: float = ORPHANED,
    ) -> None:
        self._answer, self._close, self._idle, self._orphaned = answer, close, idle, orphaned
        self._one, self._count = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._waiting, self._last = 0, time.monotonic()
        self._nodes: dict[int, str] = {}  # process id of a node -> when it began
        self._alone = 0.0  # since when no node is there
        self._started = time.monotonic()

    def serve(self, listener: Listener, secret: bytes) -> None:
        """Returns when the worker is not needed any more."""
        threading.Thread(target=self._accept, args=(listener, secret), daemon=True).start()
        while not self._ended.wait(_TICK):
            if why := self._over():
                _log.info("ends: %s", why)
                break
        with self._one:
            self._close()

    def _accept(self, listener: Listener, secret: bytes) -> None:
        while True:
            try:
                connection = listener.accept()
            except OSError as error:  # of who is gone already, or too many files are open
                _log.warning("cannot accept a connection: %s", error.strerror)
                time.sleep(_TICK)
                continue
            threading.Thread(target=self._talk, args=(connection, secret), daemon=True).start()

    def _talk(self, connection: Connection, secret: bytes) -> None:
        with connection, suppress(OSError, EOFError):
            try:
                deliver_challenge(connection, secret)
                answer_challenge(connection, secret)
            except AuthenticationError:
                _log.warning("a process that does not know the key was refused")
                return
            try:
                send(connection, self._reply(receive(connection)))
            except FedzoError as error:
                send(connection, Parcel({"error": str(error)}))

    def _reply(self, request: Parcel) -> Parcel:
        ask = request.fields.get("ask")
        if ask == "hello":
            return Parcel({})
        if ask == "status":  # also while a plan is being done
            now = time.monotonic()
            own = {"pid": os.getpid(), "seconds": round(now - self._started, 1), "idle": round(now - self._last, 1)}
            return Parcel(
                {**own, "busy": self._waiting > 0, "nodes": sorted(self._nodes), **self._answer(request).fields}
            )
        node = request.fields.get("parent")
        if isinstance(node, int):
            self._nodes[node] = began(node)
        with self._count:
            self._waiting += 1
        try:
            with self._one:
                reply = self._answer(request)
        finally:
            with self._count:
                self._waiting -= 1
                self._last = time.monotonic()
        if reply.fields.get("over"):
            _log.info("ends: the run is over")
            self._ended.set()
        return reply

    def _over(self) -> str:
        """Why nobody needs this worker any more; "": somebody does."""
        now = time.monotonic()
        if self._waiting:
            return ""
        if now - self._last > self._idle:
            return f"nothing asked for {self._idle:.0f} s"
        for node, when in list(self._nodes.items()):
            if began(node) != when:
                del self._nodes[node]
                self._alone = now
        if self._alone and not self._nodes and now - max(self._alone, self._last) > self._orphaned:
            return "its nodes are gone"
        return ""


def main(name: str) -> int:
    """Serves the worker of this name until it is not needed; at once back when there is one."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    folder = runtime_directory()
    path = folder / f"{name}.sock"
    with (folder / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0
        path.unlink(missing_ok=True)  # of one that was killed
        idle = os.environ.get("FEDZO_IDLE", "")
        try:
            seconds = float(idle) if idle else IDLE
        except ValueError:
            raise RunError(f"FEDZO_IDLE is {idle!r}, wanted seconds") from None
        with Listener(str(path), family="AF_UNIX", backlog=64) as listener:
            path.chmod(0o600)
            kept: list[Any] = []

            def host() -> Any:
                if not kept:
                    from fedzo.resident.host import Host

                    kept.append(Host())
                return kept[0]

            def status_or_answer(request: Parcel) -> Parcel:
                if request.fields.get("ask") == "status" and not kept:
                    return Parcel({})
                reply: Parcel = host().answer(request)
                return reply

            def close() -> None:
                if kept:
                    kept[0].close()

            Served(status_or_answer, close, idle=seconds).serve(listener, key(folder))
        path.unlink(missing_ok=True)
    return 0
