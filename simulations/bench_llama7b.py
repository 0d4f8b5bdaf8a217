"""Memory and time of ZO steps on 0.1% of a 4-bit model of Llama2-7B's shape, beside two plain forwards of it.

The base is random (nothing is downloaded) and is never there in 16 bit: the model starts on the meta device, then one
linear layer after the other gets seeded float32 weights, loses its masked entries to theta and is quantised (nf4,
double quantisation). Embeddings, norms and head are in the compute dtype, float32 by default: in 16 bit the projected
gradient is off by several percent (``simulations/compute_dtype.py``). theta is float32.

    two forwards   twice the plain loss of the 4-bit model, no perturbation
    step           losses at theta + eps z and theta - eps z, then theta <- theta - lr g z (SGD, Rademacher)
    replay         many records in one call, theta of the same space

The loss is that of two candidate tokens at the last position. The ways take turns; a ratio is the median over turns of
ratios within a turn. Peak memory is what torch allocated on the GPU, on a CPU the peak resident set of the process.
Needs only torch, transformers and bitsandbytes beside fedzo. Prints progress, then one line of JSON.

    python simulations/bench_llama7b.py --shape llama2-7b|small|tiny [--quick]
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import hashlib
import json
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fedzo import directions
from fedzo.directions.base import Isotropic
from fedzo.evaluation import Batch, Evaluator, LossRequest, TokenTargets, candidate_scores, losses_from_scores
from fedzo.optimizers import SGD, Records, Schedule, Setup
from fedzo.quantisation import COMPUTE_DTYPES, quantise
from fedzo.runtime import keep_memory
from fedzo.spaces import Mask, MaskEntry, TrainableSpace, sparse
from fedzo.spaces.selection import draw

SHAPES = {  # hidden size, feed-forward size, layers, heads, vocabulary
    "llama2-7b": (4096, 11008, 32, 32, 32000),
    "small": (1024, 2752, 8, 16, 32000),
    "tiny": (128, 320, 2, 4, 512),
}
EPS, LR = 1e-3, 1e-6
STD = 0.02
FAMILY = "rademacher"


def build(shape: str, density: float, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, TrainableSpace]:
    """The quantised model and the space of its masked entries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, feed_forward, layers, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocabulary,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    chosen = draw({f"{name}.weight": m.weight.numel() for name, m in linears.items()}, density, 0, False)
    generator = torch.Generator(device).manual_seed(0)

    def random(module: nn.Module) -> Tensor:
        return torch.randn(module.weight.shape, generator=generator, device=device).mul_(STD)

    entries = []
    for name, linear in linears.items():
        parameter = f"{name}.weight"
        indices = torch.from_numpy(chosen.get(parameter, np.zeros(0, np.int64)))
        weight = random(linear)
        values = weight.view(-1)[indices.to(device)].cpu()
        entries.append(MaskEntry(parameter, tuple(weight.shape), indices, values))
        linear.weight = nn.Parameter(weight, requires_grad=False)
        del weight
        alone = nn.ModuleDict({"layer": linear})
        quantise(alone, "nf4", compute_dtype=dtype, masked={"layer.weight": indices}, device=device)
        model.set_submodule(name, alone["layer"])
        linear.weight = None
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight = nn.Parameter(random(module).to(dtype), requires_grad=False)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(hidden, dtype=dtype, device=device), requires_grad=False)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    fingerprint = hashlib.sha256(f"random {shape} {STD}".encode()).hexdigest()
    settings = {"density": density, "seed": 0}
    mask = Mask(fingerprint, "random", settings, tuple(sorted(entries, key=lambda entry: entry.name)))
    return model, sparse(model, mask)


def two_way_batch(rows: int, length: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, vocabulary, (rows, length), generator=generator)
    targets = TokenTargets(
        rows=torch.arange(rows).repeat_interleave(2),
        positions=torch.full((2 * rows,), length - 1),
        tokens=torch.tensor([372, 301]).repeat(rows),
        candidates=torch.arange(2 * rows),
        num_candidates=2,
    )
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, targets)


@torch.no_grad()
def plain_loss(model: nn.Module, batch: Batch) -> float:
    return float(losses_from_scores(candidate_scores(model, batch), batch.labels).mean())


def step(evaluator: Evaluator, rule: SGD, theta: Tensor, batch: Batch, number: int) -> None:
    losses = evaluator.losses(LossRequest(theta, batch, (EPS, -EPS), (number,), Isotropic(FAMILY)))
    plus, minus = losses[0].mean(1).tolist()
    scalar = np.array([[(plus - minus) / (2 * EPS)]], np.float32)
    rule.apply(theta, {}, [Records(number, np.array([[number]], np.uint64), scalar)])


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time, the device's queue empty at both ends."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = wait()
    function()
    return wait() - start


def peak_gib(device: torch.device) -> float:
    """Since `forget_peak` on a GPU, since the start of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def compare(
    model: nn.Module, space: TrainableSpace, theta: Tensor, arguments: argparse.Namespace, rows: int, turns: int
) -> dict[str, object]:
    """One row of the result: a batch of this many rows."""
    device = theta.device
    batch = two_way_batch(rows, arguments.tokens, model.config.vocab_size)
    on_device = batch.to(device)
    rule = SGD(Setup(Schedule("constant", LR, 10**6)))
    forget_peak(device)
    plain_loss(model, on_device)
    forward_peak = peak_gib(device)
    forget_peak(device)
    evaluator = Evaluator(model, space, arguments.evaluation, COMPUTE_DTYPES[arguments.compute_dtype])
    step(evaluator, rule, theta, batch, 0)
    times: dict[str, list[float]] = {"two forwards": [], "step": []}
    for turn in range(1, turns + 1):
        ways: list[tuple[str, Callable[[], object]]] = [
            ("two forwards", lambda: (plain_loss(model, on_device), plain_loss(model, on_device))),
            ("step", lambda turn=turn: step(evaluator, rule, theta, batch, turn)),
        ]
        for name, call in ways if turn % 2 else reversed(ways):
            times[name].append(seconds(call, device))
    ratio = statistics.median(mine / base for mine, base in zip(times["step"], times["two forwards"], strict=True))
    row = {
        "batch": rows,
        "tokens": arguments.tokens,
        "evaluation": evaluator.evaluation,
        "step_over_two_forwards": round(ratio, 3),
        "two_forwards_seconds": round(statistics.median(times["two forwards"]), 4),
        "step_seconds": round(statistics.median(times["step"]), 4),
        "peak_gib": round(peak_gib(device), 3),
        "forward_peak_gib": round(forward_peak, 3),
        "turns": turns,
    }
    print(
        f"{rows:3} x {arguments.tokens} tokens: step {row['step_seconds']} s ({row['evaluation']}), {ratio:.3f} times "
        f"two forwards; peak {row['peak_gib']} GiB, of a plain forward {row['forward_peak_gib']} GiB",
        flush=True,
    )
    return row


def replay_speed(theta: Tensor, records: int, turns: int) -> float:
    """Records a second, median over the turns."""
    seeds = np.arange(records, dtype=np.uint64)
    coefficients = np.linspace(-LR, LR, records, dtype=np.float32)
    copy = theta.clone()

    def once() -> None:
        directions.replay(copy, seeds, coefficients, FAMILY)

    once()
    return statistics.median(records / seconds(once, theta.device) for _ in range(turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--mask-density", type=float, default=0.001)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, default="float32")
    parser.add_argument("--evaluation", choices=("auto", "paired", "sequential"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="3 turns and 256 records instead of 15 and 4096")
    arguments = parser.parse_args()
    keep_memory()
    device = torch.empty(0, device=arguments.device).device
    turns, records = (3, 256) if arguments.quick else (15, 4096)

    start = time.perf_counter()
    forget_peak(device)
    model, space = build(arguments.shape, arguments.mask_density, COMPUTE_DTYPES[arguments.compute_dtype], device)
    theta = space.theta0(model)
    build_peak, build_seconds = peak_gib(device), time.perf_counter() - start
    print(f"{arguments.shape}: {space.size} masked entries; built in {build_seconds:.0f} s, peak {build_peak:.3f} GiB")
    rows = [compare(model, space, theta, arguments, count, turns) for count in arguments.batch]
    speed = replay_speed(theta, records, turns)
    print(f"replay of {records} records: {speed:.0f} records/s")
    figures = {
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compute_dtype": arguments.compute_dtype,
        "masked_entries": space.size,
        "peak_gib": max(round(build_peak, 3), *(float(str(row["peak_gib"])) for row in rows)),
        "build_peak_gib": round(build_peak, 3),
        "step_over_two_forwards": max(float(str(row["step_over_two_forwards"])) for row in rows),
        "records_per_s": round(speed, 1),
        "rows": rows,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
