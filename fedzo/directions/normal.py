"""The table behind gaussian directions: 65,536 equally likely values, so that a draw is a look-up and no logarithm.

Value k is the standard normal quantile at (k + 0.5) / 65536, scaled so that the 65,536 values have variance 1, rounded
to float32. Value 65535 - k is minus value k: the file holds only the upper, positive half. The largest value is 4.325,
the kurtosis 2.999.

The file is part of the definition of a direction: libraries of mathematics differ in last bits, so it is shipped, not
computed, and its hash is checked. ``python -m fedzo.directions.normal`` wrote it.
"""

import hashlib
import math
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fedzo.errors import RunError

SIZE = 1 << 16
PATH = Path(__file__).with_name("normal.f32")
SHA256 = "e230179c3827e615b4f063e99741aa697a3a8925635cf89f6dddf2f8182450ef"


def compute() -> npt.NDArray[np.float32]:
    """The upper half of the table from ``statistics.NormalDist``: [32768] float32, increasing."""
    quantile = NormalDist().inv_cdf
    half = [quantile((k + 0.5) / SIZE) for k in range(SIZE // 2, SIZE)]
    scale = math.sqrt(math.fsum(value**2 for value in half) / len(half))
    return (np.array(half) / scale).astype("<f4")


def read(path: Path) -> npt.NDArray[np.float32]:
    """Read, check and mirror the file.

    Returns:
        [65536] float32, increasing, read-only.

    Raises:
        RunError: the file cannot be read or is not the one that directions are defined by.
    """
    advice = "reinstall fedzo, or write the file anew with `python -m fedzo.directions.normal`"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read the table of normal quantiles {path}: {error.strerror}; {advice}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise RunError(f"the table of normal quantiles {path} has sha256 {found} instead of {SHA256}; {advice}")
    half = np.frombuffer(data, "<f4").astype(np.float32)
    table = np.concatenate((-half[::-1], half))
    table.flags.writeable = False
    return table


@cache
def table() -> npt.NDArray[np.float32]:
    """The whole table, [65536] float32, increasing, read-only; checked at the first call (see ``read``)."""
    return read(PATH)


def _write() -> None:
    data = compute().tobytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise SystemExit(f"this Python's NormalDist gives a table with sha256 {found}, not {SHA256}; nothing written")
    PATH.write_bytes(data)
    print(f"wrote {PATH}")


if __name__ == "__main__":
    _write()
