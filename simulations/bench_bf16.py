"""Memory of steps with theta in bfloat16, the model's own weights, over that of inference; and its accuracy.

The model has OPT-125M's shape and random weights. Each measurement is a process of its own that builds the model in
theta's dtype and makes theta of its weights; the high-water mark of its resident set is then set back, so that a figure
is the peak from there on (on CUDA: of torch's allocator).

    built        the model and nothing else, as a baseline
    inference    forward passes of the plain transformers model, in its own dtype
    at theta     forward passes by the evaluator, which computes in float32 from a scratch of one layer
    steps        two-point steps: losses at theta + eps z and theta - eps z, one after the other, then the update
    paired       the same, both losses in one doubled batch: more activations for less time

The largest layer is the largest parameter in theta's dtype. With --accuracy: the same run on SST-2 with either dtype,
from the base model and a random head.

    python simulations/bench_bf16.py [--quick] [--accuracy] [--threads N]
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_step import two_way_batch
from memory import forget_peak, peak
from torch import nn

from fedzo.evaluation import Evaluator, LossRequest, candidate_scores
from fedzo.optimizers import SGD, Records, Schedule, Setup
from fedzo.runtime import keep_memory
from fedzo.spaces import full

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WAYS = ("built", "inference", "at theta", "steps", "paired")
EPS, LR = 1e-3, 1e-6
MODEL, DATA = Path("../shared/models/minilm-l6"), Path("../shared/data/sst2")


def opt_125m(dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    config = OPTConfig(num_hidden_layers=12, hidden_size=768, ffn_dim=3072, num_attention_heads=12, vocab_size=50272)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load_code(device: str) -> None:
    """Compilers and kernels are loaded at their first use; they are no part of what is compared."""
    rule = SGD(Setup(Schedule("constant", LR, 1)))
    for dtype in DTYPES.values():
        theta = torch.zeros(300, dtype=dtype, device=device)
        rule.apply(theta, {}, [Records(0, np.zeros((1, 1), np.uint64), np.ones((1, 1), np.float32))])


def measure(way: str, dtype: torch.dtype, shape: tuple[int, int], count: int, device: str) -> int:
    """The peak in bytes of `count` forward passes or steps."""
    model = opt_125m(dtype).to(device)
    batch = two_way_batch(*shape).to(torch.device(device))
    space = full(model)
    load_code(device)
    forget_peak(device)
    if way == "inference":
        with torch.no_grad():
            for _ in range(count):
                candidate_scores(model, batch)
    elif way != "built":
        theta = space.adopt(model, dtype)
        evaluator = Evaluator(model, space, "paired" if way == "paired" else "sequential")
        rule = SGD(Setup(Schedule("constant", LR, count)))
        for step in range(count):
            if way == "at theta":
                evaluator.scores(theta, batch)
                continue
            losses = evaluator.losses(LossRequest(theta, batch, (EPS, -EPS), (step,))).mean(2)[0].tolist()
            scalar = np.full((1, 1), (losses[0] - losses[1]) / (2 * EPS), np.float32)
            rule.apply(theta, {}, [Records(step, np.full((1, 1), step, np.uint64), scalar)])
        if not bool(torch.isfinite(theta.sum())):
            raise SystemExit("theta is not finite")
    return peak(device)


def memory(shape: tuple[int, int], count: int, threads: int, device: str, quick: bool) -> list[dict[str, object]]:
    """A row for each dtype; every figure from a process of its own."""
    rows: list[dict[str, object]] = []
    for name, dtype in list(DTYPES.items())[: 1 if quick else None]:
        found: dict[str, float] = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", way, "--dtype", name, "--count", str(count)]
            command += ["--shape", f"{shape[0]}x{shape[1]}", "--threads", str(threads), "--device", device]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way] = int(output.split()[-1]) / 2**20
            print(f"{name:>9}  {way:<10} {found[way]:8.0f} MiB", flush=True)
        with torch.device("meta"):
            largest = max(p.numel() for p in opt_125m(dtype).parameters())
        layer = largest * dtype.itemsize / 2**20
        over = found["steps"] - found["inference"]
        scratch = largest * 4 / 2**20
        print(f"{name:>9}  steps over inference {over:.0f} MiB; the largest layer has {layer:.0f} MiB", end="")
        print(f", in float32, which its scratch would take, {scratch:.0f} MiB\n", flush=True)
        rows.append(
            {
                "theta_dtype": name,
                "tokens": f"{shape[0]}x{shape[1]}",
                "steps": count,
                **{f"{way.replace(' ', '_')}_mib": round(mib, 1) for way, mib in found.items()},
                "steps_over_inference_mib": round(over, 1),
                "steps_over_theta_mib": round(found["steps"] - found["at theta"], 1),
                "largest_layer_mib": round(layer, 1),
                "largest_layer_float32_mib": round(scratch, 1),
            }
        )
    return rows


def accuracy(rounds: int, seeds: int, learning_rate: float, threads: int, limit: int) -> list[dict[str, object]]:
    """minilm-l6 on SST-2 from the same configuration with either dtype: accuracy on the test split over the run."""
    from fedzo.config import from_flat
    from fedzo.engine import run
    from fedzo.experiment import Experiment
    from fedzo.run_folder import RunFolder

    body = "head.*, *attention.self.value.*, *intermediate.dense.*, *LayerNorm.bias, *token_type_embeddings*"
    rows: list[dict[str, object]] = []
    for seed in range(seeds):
        for name in DTYPES:
            config = from_flat(
                {
                    "seed": seed, "model.source": str(MODEL), "model.kind": "encoder", "model.max_length": 64,
                    "space.kind": "full", "space.include": body, "space.theta_dtype": name, "task.name": "sst2",
                    "data.source": str(DATA), "data.train": "train.jsonl", "data.test": "dev.jsonl",
                    "data.validation_fraction": 0.015, "data.clients": 2, "data.limit": limit, "data.partition": "iid",
                    "model.head": "random", "method.queries": 1, "method.batch_size": 16,
                    "method.learning_rate": learning_rate,
                    "federation.rounds": rounds, "evaluation.every": 0, "evaluation.limit": 200,
                    "runtime.threads": threads,
                }
            )  # fmt: skip
            with (
                tempfile.TemporaryDirectory() as folder,
                run(Experiment(config), RunFolder.create(Path(folder) / "run", config)) as ledger,
            ):
                found = ledger.evaluations("test")
                before, after = found[0], found[ledger.rounds]
            row: dict[str, object] = {
                "theta_dtype": name, "seed": seed, "rounds": rounds,
                "accuracy_before": round(before["accuracy"], 4), "accuracy": round(after["accuracy"], 4),
                "loss_before": round(before["loss"], 4), "loss": round(after["loss"], 4),
            }  # fmt: skip
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, bfloat16 only for memory")
    parser.add_argument("--accuracy", action="store_true", help="also the runs on SST-2, which need ../shared")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each dtype")
    parser.add_argument("--rounds", type=int, default=120, help="of each of them")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("--measure", "--dtype", "--count", "--shape"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        rows, length = map(int, arguments.shape.split("x"))
        dtype, count = DTYPES[arguments.dtype], int(arguments.count)
        print(measure(arguments.measure, dtype, (rows, length), count, arguments.device))
        return
    shape, count = (4, 16), 2 if arguments.quick else 100
    result: dict[str, object] = {
        "device": arguments.device,
        "threads": arguments.threads,
        "memory": memory(shape, count, arguments.threads, arguments.device, arguments.quick),
    }
    if arguments.accuracy:
        if not (MODEL.is_dir() and DATA.is_dir()):
            raise SystemExit(f"--accuracy needs {MODEL} and {DATA}")
        rounds, seeds, limit = (4, 1, 400) if arguments.quick else (arguments.rounds, arguments.seeds, 4000)
        result["accuracy"] = accuracy(rounds, seeds, arguments.learning_rate, arguments.threads, limit)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
