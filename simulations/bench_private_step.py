"""What privacy costs a client in time: a private local step against a plain one, on OPT-125M's shape.

Both are `Worker.round` over a real plan: the same model with random weights, batch, directions and two-point queries.
The plain one answers means over the batch; the private one (`example-local`) draws its examples from the system's
entropy, charges its budget in a file, clips each example's vector, adds OpenDP's discrete Gaussian noise and divides by
the expected count. So that both forward the same examples, the draw's rate is 1. The ways take turns, in alternating
order; a figure is the median over the turns of the ratio within a turn, by the wall clock and, less disturbed by other
programs, by the CPU time of all threads.

    python simulations/bench_private_step.py [--quick] [--turns N] [--threads N]
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from bench_step import opt_125m, timed, two_way_batch

from fedzo.engine import answer
from fedzo.evaluation import Batch, Evaluator, TokenTargets
from fedzo.federation.messages import CatchUp, Plan
from fedzo.federation.randomness import derive, words64
from fedzo.federation.replica import Replica
from fedzo.federation.spec import PROTOCOL, RunSpec
from fedzo.federation.worker import Worker
from fedzo.privacy.account import Account, Budget
from fedzo.privacy.mechanisms import LEVELS
from fedzo.privacy.terms import Terms
from fedzo.runtime import keep_memory
from fedzo.spaces import full

SHAPES = ((16, 64, 1), (16, 64, 4), (8, 32, 1))  # examples, tokens, queries


class Rows:
    """A client's examples: the rows of one batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch)

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        rows, targets = torch.from_numpy(indices), self._batch.targets
        assert targets is not None
        chosen = torch.cat([2 * rows, 2 * rows + 1]).sort().values  # two candidates a row
        examples = torch.arange(len(rows)).repeat_interleave(2)
        candidates = 2 * examples + torch.arange(2).repeat(len(rows))
        own = TokenTargets(examples, targets.positions[chosen], targets.tokens[chosen], candidates, 2)
        inputs = {name: value[rows] for name, value in self._batch.inputs.items()}
        return Batch(inputs, self._batch.labels[rows], own)


def run_spec(size: int, rows: int, queries: int, privacy: dict[str, Any]) -> RunSpec:
    return RunSpec(
        protocol=PROTOCOL, fingerprint="f" * 64, parameters=size, space="full", space_hash="5" * 64, size=size,
        theta_dtype="float32", theta0="0" * 64, initial="", mask="", family="rademacher", estimator="two-point",
        eps=1e-3, queries=queries, batch_size=rows, optimizer="sgd", learning_rate=1e-6, schedule="constant",
        warmup_steps=0,
        rounds=1, local_steps=1, seed=0, seeds="shared", pool_size=2, clients=1, clients_per_round=0, client_rate=0.0,
        aggregation="uniform", trim=0.1, quorum=1, scalar_bound=1e9, digest_every=1, experiment="e" * 64,
        privacy=privacy,
    )  # fmt: skip


def terms() -> Terms:
    return Terms(
        mode="example-local", mechanism="gaussian", epsilon=1e6, delta=1e-5, noise_multiplier=1.0, clip=1.0,
        clipping="fixed", quantile=0.5, clip_rate=0.2, clip_share=0.05, sampling="none", rate=1.0, releases=1,
        tolerance=0, asked=0, levels=LEVELS, nonce="bench",
    )  # fmt: skip


def compare(model: torch.nn.Module, shape: tuple[int, int, int], turns: int, folder: Path) -> dict[str, object]:
    """One row of the result."""
    rows, length, queries = shape
    space = full(model)
    theta = space.theta0(model)
    space.bind(model, theta)
    evaluator, data = Evaluator(model, space), Rows(two_way_batch(rows, length))
    workers: dict[str, tuple[Worker, RunSpec]] = {}
    for name, privacy in (("plain", {}), ("private", terms().to_header())):
        spec = run_spec(theta.numel(), rows, queries, privacy)
        account = None
        if spec.terms is not None and spec.sanitiser is not None:
            release = spec.terms.release(spec.sanitiser.coordinates)
            account = Account(folder / f"{rows}-{queries}.json", spec.run_id, Budget(spec.terms, release))
        worker = Worker(
            0, Replica(spec, lambda: theta), data, fingerprint=spec.fingerprint, space_hash=spec.space_hash,
            theta0=spec.theta0, account=account,
        )  # fmt: skip
        workers[name] = worker, spec

    def step(name: str, turn: int) -> None:
        worker, spec = workers[name]
        seeds = words64(derive(0, "bench", turn), queries).reshape(1, queries)
        clip = 1.0 if spec.terms else 0.0
        plan = Plan(spec.run_id, 0, 0, seeds, 1e-3, rows, bytes(32), CatchUp("none", 0, 0), clip=clip)
        answer(worker, evaluator, plan.to_bytes())

    for name in workers:
        step(name, 0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for turn in range(turns):
        for name in list(workers)[:: 1 if turn % 2 else -1]:
            seconds[name].append(timed(partial(step, name, turn + 1)))

    def over(clock: int) -> float:
        return statistics.median(a[clock] / b[clock] for a, b in zip(seconds["private"], seconds["plain"], strict=True))

    return {
        "examples": rows,
        "tokens": length,
        "queries": queries,
        "plain_seconds": round(statistics.median(wall for wall, _ in seconds["plain"]), 3),
        "private_over_plain": round(over(0), 3),
        "private_over_plain_cpu": round(over(1), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, three turns")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    keep_memory()
    model = opt_125m()
    shapes, turns = (SHAPES[-1:], 3) if options.quick else (SHAPES, options.turns)
    with TemporaryDirectory() as folder:
        rows = [compare(model, shape, turns, Path(folder)) for shape in shapes]
    for row in rows:
        print(
            f"{row['examples']} x {row['tokens']} tokens, {row['queries']} queries: {row['plain_seconds']} s, private "
            f"{row['private_over_plain']} times (CPU {row['private_over_plain_cpu']})"
        )
    print(json.dumps({"threads": options.threads, "rows": rows}))


if __name__ == "__main__":
    main()
