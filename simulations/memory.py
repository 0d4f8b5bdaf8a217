"""The peak memory of a part of a process: the high-water mark of its resident set, or of torch's allocator on CUDA."""

import resource
from pathlib import Path

import torch

from fedzo.runtime import release_memory


def forget_peak(device: str) -> None:
    """Peaks count from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        release_memory()
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
