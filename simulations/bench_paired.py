"""Time and memory of a two-point step: both halves in one batch, one at a time, and two plain forwards.

The model has OPT-125M's shape and random weights (nothing is downloaded), in float32 or with its linear layers in nf4.
The space is LoRA (rank 8 on the query and value projections, PEFT's choice) or a random 0.1% of all matrices.

    two forwards   twice the plain loss through the model's own forward, no perturbation
    paired         losses at theta + eps z and theta - eps z in one doubled batch, then theta <- theta - lr g z
    one at a time  the same, a forward each

The ways take turns; a figure is the median over the turns of its ratio to the same turn's two forwards. Peak memory is
the largest resident set (CUDA: allocated memory) of a process of its own after the model is built. Sizes are the tokens
of one half.

    python simulations/bench_paired.py [--quick] [--spaces sparse] [--bases nf4] [--threads N] [--device cuda]
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from bench_step import two_way_batch
from memory import forget_peak, peak
from torch import nn

from fedzo.directions import axpy
from fedzo.evaluation import Batch, Evaluator, LossRequest, candidate_scores, losses_from_scores
from fedzo.quantisation import quantise
from fedzo.runtime import import_peft, keep_memory
from fedzo.spaces import TrainableSpace, adapter, draw_mask, sparse

EPS, LR = 1e-3, 1e-6
SHAPES = {32: (1, 32), 128: (4, 32), 1024: (8, 128)}
SPACES, BASES = ("lora", "sparse"), ("float32", "nf4")


def build(space: str, base: str, device: str) -> tuple[nn.Module, TrainableSpace]:
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    config = OPTConfig(num_hidden_layers=12, hidden_size=768, ffn_dim=3072, num_attention_heads=12, vocab_size=50272)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    mask = draw_mask(model, 0.001, "random", "0" * 64) if space == "sparse" else None
    taken = {entry.name: entry.indices for entry in mask.entries} if mask else {}
    quantise(model, "none" if base == "float32" else base, masked=taken, device=device)
    if mask is not None:
        return model, sparse(model, mask)
    import_peft()
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)).eval()
    return model, adapter(model)


@torch.no_grad()
def plain_loss(model: nn.Module, batch: Batch) -> float:
    return float(losses_from_scores(candidate_scores(model, batch), batch.labels).mean())


def two_forwards(model: nn.Module, batch: Batch, _: int) -> None:
    plain_loss(model, batch)
    plain_loss(model, batch)


def step(evaluator: Evaluator, theta: torch.Tensor, batch: Batch, seed: int) -> None:
    plus, minus = evaluator.losses(LossRequest(theta, batch, (EPS, -EPS), (seed,)))[0].mean(1).tolist()
    axpy(theta, seed, -LR * (plus - minus) / (2 * EPS), "rademacher")


def timed(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(space_kind: str, base: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    model, space = build(space_kind, base, arguments.device)
    rows = []
    for tokens, shape in SHAPES.items():
        batch = two_way_batch(*shape).to(arguments.device)
        theta = space.theta0(model)
        ways: dict[str, Callable[[int], object]] = {
            "two": partial(two_forwards, model, batch),
            "paired": partial(step, Evaluator(model, space, "paired"), theta, batch),
            "sequential": partial(step, Evaluator(model, space, "sequential"), theta, batch),
        }
        for way in ways.values():  # a warm-up, in which pairing checks itself
            way(0)
        turns = (5 if tokens < 1024 else 2) if arguments.quick else (21 if tokens < 1024 else 7)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(turns):
            for name in [*ways][turn % 3 :] + [*ways][: turn % 3]:
                seconds[name].append(timed(partial(ways[name], turn + 1), arguments.device))
        ratios = {
            name: round(statistics.median(a / b for a, b in zip(seconds[name], seconds["two"], strict=True)), 3)
            for name in ("paired", "sequential")
        }
        row = {
            "space": space_kind,
            "base": base,
            "tokens": tokens,
            "step_over_two_forwards": ratios["paired"],
            "sequential_over_two_forwards": ratios["sequential"],
            "two_forwards_ms": round(1e3 * statistics.median(seconds["two"]), 1),
            **memory(space_kind, base, tokens, arguments),
        }
        rows.append(row)
        print(
            f"{space_kind:<7}{base:<8}{tokens:>5}  two forwards {row['two_forwards_ms']:>8} ms  paired "
            f"{ratios['paired']:.2f}  one at a time {ratios['sequential']:.2f}  peak MiB {row['peak_mib']} against "
            f"{row['peak_mib_two_forwards']}",
            flush=True,
        )
    return rows


def memory(space: str, base: str, tokens: int, arguments: argparse.Namespace) -> dict[str, int]:
    """Peak memory in MiB of a step and of a plain forward, each in a process of its own."""
    found = {}
    for name, what in (("peak_mib", "paired"), ("peak_mib_two_forwards", "plain")):
        command = [sys.executable, __file__, "--memory", space, base, str(tokens), what, "--device", arguments.device]
        command += ["--threads", str(arguments.threads)]
        found[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def report_memory(space_kind: str, base: str, tokens: str, what: str, device: str) -> None:
    model, space = build(space_kind, base, device)
    batch = two_way_batch(*SHAPES[int(tokens)]).to(device)
    forget_peak(device)
    if what == "plain":
        plain_loss(model, batch)
    else:
        theta = space.theta0(model)
        evaluator = Evaluator(model, space, what)
        for seed in range(3):
            step(evaluator, theta, batch, seed)
    print(peak(device) // 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda"')
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        report_memory(*arguments.memory, arguments.device)
        return
    rows = [row for space in arguments.spaces for base in arguments.bases for row in compare(space, base, arguments)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
