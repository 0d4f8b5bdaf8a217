"""What a node's process and its worker say to each other: a JSON header and byte strings. Nothing is unpickled."""

import json
import os
import secrets
import stat
import struct
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedzo.errors import ProtocolError, RunError

LIMIT = 2**31 - 1  # bytes of a message; snapshots of a full theta are the largest
_MOST_PARTS = 4


@dataclass(frozen=True)
class Parcel:
    """A request or a reply.

    Attributes:
        fields: what can be written as JSON.
        parts: what cannot: plans, answers, parts of artifacts.
    """

    fields: Mapping[str, Any]
    parts: tuple[bytes, ...] = field(default=())

    def to_bytes(self) -> bytes:
        """Header's length (4 bytes, little-endian), header, parts."""
        header = json.dumps({"fields": dict(self.fields), "sizes": [len(part) for part in self.parts]}).encode()
        return struct.pack("<I", len(header)) + header + b"".join(self.parts)

    @staticmethod
    def from_bytes(data: bytes) -> "Parcel":
        """Inverse of `to_bytes`.

        Raises:
            ProtocolError: the bytes are none.
        """
        try:
            (length,) = struct.unpack_from("<I", data)
            header = json.loads(data[4 : 4 + length])
            fields, sizes = header["fields"], header["sizes"]
            if not isinstance(fields, dict) or len(sizes) > _MOST_PARTS or any(size < 0 for size in sizes):
                raise ValueError
            if 4 + length + sum(sizes) != len(data):
                raise ValueError
        except (struct.error, ValueError, KeyError, TypeError):
            raise ProtocolError(f"{len(data)} bytes on the worker's socket are no parcel") from None
        parts, at = [], 4 + length
        for size in sizes:
            parts.append(data[at : at + size])
            at += size
        return Parcel(fields, tuple(parts))


def send(connection: Connection, parcel: Parcel) -> None:
    connection.send_bytes(parcel.to_bytes())


def receive(connection: Connection) -> Parcel:
    """The other side's parcel.

    Raises:
        EOFError, OSError: the other side is gone.
        ProtocolError: it sent something else.
    """
    return Parcel.from_bytes(connection.recv_bytes(LIMIT))


def runtime_directory() -> Path:
    """Where this user's workers have their sockets, mode 0700: $FEDZO_RUNTIME, else fedzo in $XDG_RUNTIME_DIR, else
    fedzo-UID in the folder for temporary files.

    Raises:
        RunError: it cannot be made, or another user could look into it.
    """
    if own := os.environ.get("FEDZO_RUNTIME"):
        path = Path(own).expanduser()
    elif shared := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(shared) / "fedzo"
    else:
        path = Path(tempfile.gettempdir()) / f"fedzo-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RunError(
            f"cannot make the folder {path} for workers' sockets: {error.strerror}; set FEDZO_RUNTIME"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RunError(
            f"{path} is not a folder of this user with mode 0700, found mode {stat.S_IMODE(found.st_mode):o} of user "
            f"{found.st_uid}: remove it, or set FEDZO_RUNTIME to another folder"
        )
    return path


def key(folder: Path) -> bytes:
    """The 32 random bytes that both sides of a socket in this folder must know; made when first asked for.

    Raises:
        RunError: the file cannot be made or read, or has another length.
    """
    path = folder / "key"
    scratch = folder / f".key.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        if not path.exists():
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
            with suppress(FileExistsError):
                os.link(scratch, path)  # the first of two that come at once wins, with a whole file
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read or make the key {path}: {error.strerror}") from None
    finally:
        scratch.unlink(missing_ok=True)
    if len(data) != 32:
        raise RunError(f"the key {path} has {len(data)} bytes, wanted 32: remove it and restart this machine's nodes")
    return data
