"""Time of one two-point step on a full space, against two plain forwards and the in-place way of MeZO.

The model has OPT-125M's shape and random weights (nothing is downloaded). The loss is the same in all three ways: the
log-probabilities of two candidate tokens at the last position, the head computed there only.

    two forwards   twice the plain loss, no perturbation: what any two-point method pays at least
    step           losses at theta + eps z and theta - eps z, then theta <- theta - lr g z (fedzo, Rademacher)
    in place       torch.normal over every parameter, seeded again each time: +eps, loss, -2 eps, loss, +eps, update
                   (Malladi et al. 2023, algorithm 1)

The ways take turns; a figure is the median over the turns of its ratio to the same turn's two forwards, by the wall
clock and, less disturbed by other programs, by the CPU time of all threads. Peak memory is the peak resident set of a
process of its own that loads the model and does fedzo's steps.

    python simulations/bench_step.py [--quick] [--threads N]
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numba
import torch
from torch import nn

from fedzo.directions import axpy
from fedzo.evaluation import Batch, Evaluator, LossRequest, TokenTargets, candidate_scores, losses_from_scores
from fedzo.runtime import keep_memory
from fedzo.spaces import full

EPS, LR = 1e-3, 1e-6
SHAPES = ((8, 32), (16, 64))


def opt_125m() -> nn.Module:
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    config = OPTConfig(num_hidden_layers=12, hidden_size=768, ffn_dim=3072, num_attention_heads=12, vocab_size=50272)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def two_way_batch(rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 50_000, (rows, length), generator=generator)
    examples = torch.arange(rows).repeat_interleave(2)
    targets = TokenTargets(
        rows=examples,
        positions=torch.full((2 * rows,), length - 1),
        tokens=torch.tensor([372, 6587]).repeat(rows),
        candidates=torch.arange(2 * rows),
        num_candidates=2,
    )
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, targets)


@torch.no_grad()
def plain_loss(model: nn.Module, batch: Batch) -> float:
    return float(losses_from_scores(candidate_scores(model, batch), batch.labels).mean())


def fedzo_step(evaluator: Evaluator, theta: torch.Tensor, batch: Batch, seed: int) -> None:
    plus, minus = evaluator.losses(LossRequest(theta, batch, (EPS, -EPS), (seed,)))[0].mean(1).tolist()
    axpy(theta, seed, -LR * (plus - minus) / (2 * EPS), "rademacher")


@torch.no_grad()
def in_place_step(model: nn.Module, batch: Batch, seed: int) -> None:
    def perturb(scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(0.0, 1.0, parameter.shape, generator=generator)
            parameter.add_(z, alpha=scale)

    perturb(EPS)
    plus = plain_loss(model, batch)
    perturb(-2 * EPS)
    minus = plain_loss(model, batch)
    perturb(EPS)
    perturb(-LR * (plus - minus) / (2 * EPS))


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the wall clock and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(models: tuple[nn.Module, nn.Module], shape: tuple[int, int], turns: int) -> dict[str, object]:
    """One row of the result; the in-place way drifts, so it has the second model for itself."""
    model, other = models
    batch = two_way_batch(*shape)
    space = full(model)
    theta = space.theta0(model)
    space.bind(model, theta)
    evaluator = Evaluator(model, space)
    ways: dict[str, Callable[[int], object]] = {
        "two forwards": lambda _: (plain_loss(model, batch), plain_loss(model, batch)),
        "step": lambda seed: fedzo_step(evaluator, theta, batch, seed),
        "in place": lambda seed: in_place_step(other, batch, seed),
    }
    fedzo_step(evaluator, theta, batch, 0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(turns):
        # In turn each way goes first, so that no way has always the same neighbour.
        for name in [*ways][turn % 3 :] + [*ways][: turn % 3]:
            seconds[name].append(timed(partial(ways[name], turn + 1)))

    def over(name: str, clock: int) -> float:
        pairs = zip(seconds[name], seconds["two forwards"], strict=True)
        return round(statistics.median(mine[clock] / base[clock] for mine, base in pairs), 3)

    tokens = f"{shape[0]}x{shape[1]}"
    for name in ways:
        wall = statistics.median(value[0] for value in seconds[name])
        print(f"{tokens:>6}  {name:<13} {wall:7.3f} s  {over(name, 0):5.2f} times two forwards", flush=True)
    return {
        "tokens": tokens,
        "step_over_two_forwards": over("step", 0),
        "inplace_over_two_forwards": over("in place", 0),
        "step_over_two_forwards_cpu": over("step", 1),
        "inplace_over_two_forwards_cpu": over("in place", 1),
        "two_forwards_seconds": round(statistics.median(value[0] for value in seconds["two forwards"]), 3),
        "turns": turns,
    }


def peak_memory(threads: int) -> list[int]:
    """MiB for each shape."""
    command = [sys.executable, __file__, "--memory", "--threads", str(threads)]
    return [int(n) for n in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def report_memory() -> None:
    model = opt_125m()
    space = full(model)
    theta = space.theta0(model)
    space.bind(model, theta)
    evaluator = Evaluator(model, space)
    for shape in SHAPES:  # from the small to the large one, since a peak never falls
        fedzo_step(evaluator, theta, two_way_batch(*shape), 1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns, under a minute on two idle cores")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(arguments.threads)
    if arguments.memory:
        report_memory()
        return
    models = (opt_125m(), opt_125m())
    turns = (3, 1) if arguments.quick else (21, 11)
    rows = [compare(models, shape, count) for shape, count in zip(SHAPES, turns, strict=True)]
    for row, mib in zip(rows, peak_memory(arguments.threads), strict=True):
        row["peak_memory_mib"] = mib
    print(json.dumps({"threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
