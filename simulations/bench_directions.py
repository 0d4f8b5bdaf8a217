"""Speed of directions against torch: ``python simulations/bench_directions.py [--quick] [--device cuda]``.

The baseline is one step of the usual in-place code: ``normal_`` with a generator, into memory that is already
there, then ``add_``. Candidates and baseline take turns, and a ratio is the median over turns of ratios within a turn,
so that a neighbour on the machine slows both sides. Prints a table, then one line of JSON (speeds in 10^9 elements of a
direction a second).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from fedzo import directions

RECORDS = 64
TURNS = 7


def measure(elements: int, device: str) -> dict[str, list[float]]:
    """10^9 elements a second of each contestant, in each turn."""
    theta, z = torch.zeros(elements, device=device), torch.zeros(elements, device=device)
    generator = torch.Generator(device).manual_seed(0)
    seeds = np.arange(RECORDS, dtype=np.uint64)
    coefficients = np.linspace(-1e-3, 1e-3, RECORDS, dtype=np.float32)

    def baseline() -> None:
        z.normal_(generator=generator)
        theta.add_(z, alpha=1e-3)

    contestants: dict[str, tuple[int, Callable[[], object]]] = {"torch": (1, baseline)}
    for family in directions.FAMILIES:
        contestants |= {
            f"{family}_fill": (1, lambda family=family: directions.fill(z, 1, family)),
            f"{family}_axpy": (1, lambda family=family: directions.axpy(theta, 1, 1e-3, family)),
            f"{family}_replay": (RECORDS, lambda family=family: directions.replay(theta, seeds, coefficients, family)),
        }
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS):
        for name, (records, call) in contestants.items():
            start = now(theta)
            call()
            speeds[name].append(records * elements / (now(theta) - start) / 1e9)
    return speeds


def now(tensor: torch.Tensor) -> float:
    """Seconds by the clock, when the tensor's device has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of directions against torch's normal_ and add_.")
    parser.add_argument("--quick", action="store_true", help="10^7 elements instead of 10^8")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or another device of torch")
    arguments = parser.parse_args()
    elements = 10**7 if arguments.quick else 10**8

    measure(1000, arguments.device)  # compiles the kernels, or loads them
    speeds = measure(elements, arguments.device)
    rates = {name: statistics.median(turns) for name, turns in speeds.items()}
    ratios = {
        name: statistics.median(mine / torchs for mine, torchs in zip(turns, speeds["torch"], strict=True))
        for name, turns in speeds.items()
    }
    threads = torch.get_num_threads()
    where = f"{threads} threads" if arguments.device == "cpu" else arguments.device
    print(f"{elements:.0e} elements, {RECORDS} records a replay, {where}, median of {TURNS} turns")
    print(f"{'':20} {'G elements/s':>12} {'times torch':>12}")
    for name, rate in rates.items():
        print(f"{name:20} {rate:12.2f} {ratios[name]:12.1f}")
    figures = {f"{name}_ratio": round(ratio, 1) for name, ratio in ratios.items() if name != "torch"}
    figures |= {f"{name}_gigaelements_per_s": round(rate, 3) for name, rate in rates.items()}
    figures |= {"elements": elements, "records": RECORDS, "threads": threads, "device": arguments.device}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
