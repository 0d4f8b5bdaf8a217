"""What a client's machine keeps of a run: theta and the round it stands at, so that a restart costs a few records.

Which examples a round takes follows from the round (or, where privacy rests on the draw, from nothing at all), so the
round is also the position in the data.
"""

import hashlib
import json
import logging
import time
from pathlib import Path

from fedzo.errors import FedzoError
from fedzo.federation.replica import Replica
from fedzo.files import write_atomically

EVERY = 10.0  # seconds between two writes at least
_SHARE = 0.05  # of the time that writing may take at most
_log = logging.getLogger("fedzo.resident")


class ReplicaFile:
    """A replica's file, in which it stands as it last did. The file may always be lost: the server has all it needs.

    Args:
        path: the file; its folder is made when first written.
        replica: at theta0; brought to where the file says, when it holds this run.
    """

    def __init__(self, path: Path, replica: Replica) -> None:
        self._path, self._replica = path, replica
        self._due, self._kept = 0.0, 0
        self._load()

    def _load(self) -> None:
        replica = self._replica
        try:
            head, _, data = self._path.read_bytes().partition(b"\n")
            told = json.loads(head)
            if told["run"] != replica.spec.run_id.hex() or hashlib.sha256(data).hexdigest() != told["sha256"]:
                raise ValueError
            replica.restore(told["rounds"], data[: told["initial"]], data[told["initial"] :])
            if replica.digest().hex() != told["theta"]:
                raise ValueError
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, FedzoError) as error:
            _log.warning("%s is of no use (%s): starts from theta0", self._path, type(error).__name__)
            replica.reset()
            return
        self._kept = replica.rounds
        _log.info("theta of round %d read from %s", replica.rounds, self._path)

    def save(self, *, now: bool = False) -> None:
        """Writes the file when it is due.

        Args:
            now: also when it is not.
        """
        replica, start = self._replica, time.monotonic()
        if replica.rounds == self._kept or (start < self._due and not now):
            return
        snapshot = replica.snapshot()
        data = replica.initial + snapshot
        told = {
            "run": replica.spec.run_id.hex(), "rounds": replica.rounds, "theta": replica.digest().hex(),
            "initial": len(replica.initial), "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._path, json.dumps(told).encode() + b"\n" + data)
            self._kept = replica.rounds
        except OSError as error:  # a full disk costs a later restart some records, and nothing else
            _log.warning("cannot write %s: %s", self._path, error.strerror)
        took = time.monotonic() - start
        self._due = start + max(EVERY, took / _SHARE)
