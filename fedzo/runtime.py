"""Settings of the process, made once by a program's entry point."""

import contextlib
import ctypes
import importlib
import logging
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Let glibc keep freed blocks for reuse instead of returning them to the system.

    By default every large tensor is mapped anew and its pages fault in again at each forward. No effect elsewhere.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def release_memory() -> None:
    """Return freed blocks to the system now, also those that `keep_memory` would keep. No effect elsewhere."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def import_bitsandbytes() -> None:
    """Import bitsandbytes, without code from the internet.

    On a CPU with avx512_bf16 its import looks for the package `kernels` to run a matmul from the Hugging Face hub, and
    logs a warning when that fails. Nothing of ours calls that matmul.

    Raises:
        ImportError: it is not installed.
    """
    if "bitsandbytes" in sys.modules:
        return
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
    logger.disabled = True
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        sys.modules.update(kernels)
        logger.disabled = False


def import_peft() -> None:
    """Import peft, and before it, as it does itself where that is installed, bitsandbytes without its side effects.

    Raises:
        ImportError: peft is not installed.
    """
    with contextlib.suppress(ImportError, OSError):
        import_bitsandbytes()
    importlib.import_module("peft")
