"""Speed of directions against torch: ``python simulations/bench_directions.py [--quick]``.

The baseline is one step of the usual in-place code: ``torch.normal`` with a generator, into memory that is already
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


def measure(elements: int) -> dict[str, list[float]]:
    """10^9 elements a second of each contestant, in each turn."""
    theta, z = torch.zeros(elements), torch.zeros(elements)
    generator = torch.Generator().manual_seed(0)
    seeds = np.arange(RECORDS, dtype=np.uint64)
    coefficients = np.linspace(-1e-3, 1e-3, RECORDS, dtype=np.float32)

    def baseline() -> None:
        torch.normal(0.0, 1.0, (elements,), generator=generator, out=z)
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
            start = time.perf_counter()
            call()
            speeds[name].append(records * elements / (time.perf_counter() - start) / 1e9)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of directions against torch.normal and add_.")
    parser.add_argument("--quick", action="store_true", help="10^7 elements instead of 10^8")
    elements = 10**7 if parser.parse_args().quick else 10**8

    measure(1000)  # loads the compiled kernel
    speeds = measure(elements)
    rates = {name: statistics.median(turns) for name, turns in speeds.items()}
    ratios = {
        name: statistics.median(mine / torchs for mine, torchs in zip(turns, speeds["torch"], strict=True))
        for name, turns in speeds.items()
    }
    threads = torch.get_num_threads()
    print(f"{elements:.0e} elements, {RECORDS} records a replay, {threads} threads, median of {TURNS} turns")
    print(f"{'':20} {'G elements/s':>12} {'times torch':>12}")
    for name, rate in rates.items():
        print(f"{name:20} {rate:12.2f} {ratios[name]:12.1f}")
    figures = {f"{name}_ratio": round(ratio, 1) for name, ratio in ratios.items() if name != "torch"}
    figures |= {f"{name}_gigaelements_per_s": round(rate, 3) for name, rate in rates.items()}
    figures |= {"elements": elements, "records": RECORDS, "threads": threads}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
