"""What this machine keeps beside the runs: artifacts that a run's server sent, and its clients' budgets and theta."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from fedzo.errors import ProtocolError, RunError


def cache_directory() -> Path:
    """$FEDZO_CACHE, else fedzo in $XDG_CACHE_HOME, else ~/.cache/fedzo."""
    if own := os.environ.get("FEDZO_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "fedzo"


def state_directory() -> Path:
    """Where this machine's clients keep, by run, their privacy budgets and theta: $FEDZO_STATE, else fedzo in
    $XDG_STATE_HOME, else ~/.local/state/fedzo."""
    if own := os.environ.get("FEDZO_STATE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_STATE_HOME")
    return (Path(shared) if shared else Path.home() / ".local" / "state") / "fedzo"


class ArtifactCache:
    """The files artifacts/SHA-256 of a directory; several processes may use it at once.

    Raises:
        ProtocolError: from every method, when a name is no SHA-256 in hex.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = (directory or cache_directory()) / "artifacts"

    def get(self, name: str) -> bytes | None:
        """The artifact, or None when it is not here; a file that no longer has its hash is as good as none."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == name else None

    def receive(self, name: str, sender: str, offset: int, part: bytes, size: int) -> int:
        """Takes the part of an artifact that begins at `offset`; the first one starts over. Kept when whole and right.

        Args:
            name: the SHA-256 that the whole must have.
            sender: keeps transfers of the same artifact apart.
            size: bytes of the whole.

        Returns:
            Bytes held so far.

        Raises:
            ProtocolError: a part does not follow the ones before, or the whole has another hash; nothing is kept then.
            RunError: the directory cannot be written.
        """
        path = self._path(name)
        scratch = self._scratch(name, sender)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held = scratch.stat().st_size if offset and scratch.exists() else 0
            if offset != held or not part or held + len(part) > size:
                scratch.unlink(missing_ok=True)
                raise ProtocolError(
                    f"artifact {name[:12]}: a part of {len(part)} bytes at {offset} does not follow the {held} bytes "
                    f"that are here of {size}"
                )
            with scratch.open("ab" if offset else "wb") as file:
                file.write(part)
                file.flush()
                os.fsync(file.fileno())
            held += len(part)
            if held == size:
                found = hashlib.sha256(scratch.read_bytes()).hexdigest()
                if found != name:
                    scratch.unlink()
                    raise ProtocolError(f"the artifact that was sent as {name[:12]} has the hash {found[:12]}: refused")
                scratch.replace(path)
        except OSError as error:
            raise RunError(
                f"cannot write the cache {path.parent}: {error.strerror}; set FEDZO_CACHE to a directory that can be "
                "written"
            ) from error
        return held

    def discard(self, name: str, sender: str) -> None:
        """Forgets the parts of a transfer that came to no end."""
        with suppress(OSError):
            self._scratch(name, sender).unlink(missing_ok=True)

    def _scratch(self, name: str, sender: str) -> Path:
        return self._path(name).with_name(f".{name}.{hashlib.sha256(sender.encode()).hexdigest()[:16]}")

    def _path(self, name: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", name):  # it comes from the network and becomes a path
            raise ProtocolError(f"{name[:64]!r} is no SHA-256 in hex")
        return self._directory / name
