"""The mask of one model in two orders of loading, on 1 and 2 threads: all hashes must be the same.

The second order is a copy of the checkpoint cut into shards with its tensors in reverse. Ends with one line of JSON.

    python simulations/mask_repeat.py --quick
    python simulations/mask_repeat.py --model ../shared/models/reviews-6m
    python simulations/mask_repeat.py --model ../shared/models/minilm-l6 --kind encoder
"""

import fedzo  # isort: skip  (before torch: it sets how MKL computes)

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedzo.config import from_flat
from fedzo.experiment import Experiment

EMBEDDED = Path(fedzo.__file__).parent / "embedded" / "model"


def reorder(source: Path, target: Path) -> None:
    """A copy of a checkpoint in two shards, last tensors first."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = list(reversed(load_file(str(source / "model.safetensors")).items()))
    half = len(tensors) // 2
    places: dict[str, str] = {}
    for number, shard in enumerate((tensors[:half], tensors[half:]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({key: value.contiguous() for key, value in shard}, str(target / name), metadata={"format": "pt"})
        places |= {key: name for key, _ in shard}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded model and its data")
    parser.add_argument("--model", default="../shared/models/reviews-6m", help="directory with model.safetensors")
    parser.add_argument("--kind", default="causal")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", default="../shared/data/sst2")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--methods", default="sensitive,magnitude,random", help="forward takes longest")
    parser.add_argument("--density", type=float, default=0.001)
    options = parser.parse_args()
    source = EMBEDDED if options.quick else Path(options.model)
    task = {} if options.quick else {"task.name": options.task, "data.source": options.data, "data.test": ""}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reordered = Path(folder) / "reordered"
        reorder(source, reordered)
        for method in options.methods.split(","):
            for order, directory in (("as saved", source), ("reversed shards", reordered)):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    keys = {
                        "model.source": str(directory), "model.kind": options.kind, "space.kind": "sparse",
                        "space.mask": method, "space.density": options.density,
                        "space.calibration_examples": options.examples, "runtime.device": "cpu",
                    }  # fmt: skip
                    mask = Experiment(from_flat(keys | task)).mask
                    assert mask is not None and torch.get_num_threads() == threads
                    rows.append({"method": method, "order": order, "threads": threads, "hash": mask.hash})
                    print(f"{method:10} {order:16} {threads} threads  {mask.hash}", flush=True)
    same = all(len({row["hash"] for row in rows if row["method"] == m}) == 1 for m in options.methods.split(","))
    print(json.dumps({"model": str(source), "entries": mask.size, "same": same, "rows": rows}))
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
