"""What a client on a CUDA machine needs: torch, numpy and safetensors; over a quantised base also transformers and
bitsandbytes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ABSENT = ("numba", "pydantic", "typer", "rich", "peft", "flwr", "flwr_datasets", "datasets", "matplotlib", "triton")
BLOCK = f"import sys; sys.modules |= dict.fromkeys({ABSENT})\n"
MODULES = (
    "directions",
    "spaces",
    "evaluation",
    "estimators",
    "optimizers",
    "federation.replica",
    "federation.worker",
    "federation.ledger",
    "quantisation",
    "sensitivity",
)


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports() -> None:
    fewest = "sys.modules |= dict.fromkeys(('transformers', 'bitsandbytes'))\n"
    run("-c", BLOCK + fewest + "\n".join(f"import fedzo.{module}" for module in MODULES))


def test_benchmark_of_the_llama_shape() -> None:
    """With few packages, too; numba stays, since on a CPU the sparse products are its."""
    pytest.importorskip("bitsandbytes")
    command = ["bench", "--shape", "tiny", "--quick", "--tokens", "16", "--device", "cpu"]
    program = BLOCK + (
        f"import runpy; del sys.modules['numba']; sys.argv = {command}\n"
        "runpy.run_path('simulations/bench_llama7b.py', run_name='__main__')"
    )
    figures = json.loads(run("-c", program).splitlines()[-1])
    assert [row["batch"] for row in figures["rows"]] == [1, 8]
    assert figures["masked_entries"] == 377
    assert all(figures[key] > 0 for key in ("peak_gib", "step_over_two_forwards", "records_per_s"))
