"""Writing files that are there whole or not at all, and JSON that every reader takes."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file so that after a crash it is the old or the new one, never half; once this returns, the new one.

    Args:
        data: text is written as UTF-8.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        scratch.unlink(missing_ok=True)


def strict_json(value: Any) -> str:
    """JSON that every reader takes: a number that is not finite (the loss of a diverged model) is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, float) and not math.isfinite(part):
            return None
        return {key: finite(item) for key, item in part.items()} if isinstance(part, dict) else part

    return json.dumps(finite(value))
