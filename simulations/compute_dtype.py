"""What a compute dtype costs: the error of the projected gradient, direction by direction.

A projected gradient is (loss+ - loss-) / (2 eps), a small difference of two losses over a small number, so the
rounding of a forward is divided by eps. For a random mask over the model, unquantised and on nf4, each projected
gradient is measured by fedzo's evaluator in float32, bfloat16 and float16 compute and held against the same base in
float64 throughout. A row is the root mean square of the error over that of the projected gradient: 0.05 means that
noise of 5% is added to every scalar, 1 that the scalar is as much noise as signal.

    python simulations/compute_dtype.py [--quick]
        [--model DIR --kind KIND --task TASK --data DIR --train FILE --test FILE]
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import copy
import json

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedzo.directions import axpy
from fedzo.directions.base import Isotropic
from fedzo.evaluation import Batch, Evaluator, LossRequest
from fedzo.models import LoadedModel, add_head, load_model
from fedzo.quantisation import COMPUTE_DTYPES, quantise
from fedzo.runtime import keep_memory
from fedzo.spaces import Mask, TrainableSpace, draw_mask, sparse
from fedzo.tasks import EncodedDataset, build_task, load_splits

BASES = ("none", "nf4")
EPS = (1e-2, 1e-3, 1e-4)
FAMILY = "rademacher"


def load(arguments: argparse.Namespace) -> tuple[LoadedModel, Batch]:
    loaded = load_model(arguments.model, arguments.kind)
    task = build_task(arguments.task, loaded.kind, loaded.tokenizer, max_length=64)
    if loaded.kind == "encoder":
        loaded = add_head(loaded, task.num_labels or 0, task.label_texts)
    train = load_splits(arguments.data, task.spec, train=arguments.train, test=arguments.test).train
    examples = train[: arguments.batch_size]
    return loaded, EncodedDataset(task, examples).batch(np.arange(len(examples)))


def in_float64(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers, their weights as a float32 forward sees them."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and hasattr(child, "dequantised"):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                plain.weight, plain.bias = nn.Parameter(child.dequantised()), child.bias
                parent._modules[name] = plain
    return model.double()


@torch.no_grad()
def mean_loss(model: nn.Module, batch: Batch) -> float:
    """In the model's dtype from end to end."""
    output = model(**batch.inputs)
    scores: Tensor = output if isinstance(output, Tensor) else output.logits
    targets = batch.targets
    if targets is not None:
        values = functional.log_softmax(scores[targets.rows, targets.positions], -1)
        values = values[torch.arange(len(values)), targets.tokens]
        sums = values.new_zeros(len(batch) * targets.num_candidates).index_add(0, targets.candidates, values)
        counts = torch.bincount(targets.candidates, minlength=len(sums))
        scores = torch.where(counts > 0, sums / counts, -torch.inf).view(len(batch), -1)
    if scores.shape[1] == 1:
        return float(-scores.mean())
    return float(functional.cross_entropy(scores, batch.labels))


def reference(model: nn.Module, space: TrainableSpace, theta: Tensor, batch: Batch, eps: float, seeds: range) -> Tensor:
    """[len(seeds)] float64 projected gradients of a float64 model, whose masked entries are overwritten."""

    def loss(seed: int, offset: float) -> float:
        space.write(model, axpy(theta, seed, offset, FAMILY, out=torch.empty_like(theta)))
        return mean_loss(model, batch)

    differences = [loss(seed, eps) - loss(seed, -eps) for seed in seeds]
    return torch.tensor(differences, dtype=torch.float64) / (2 * eps)


def measured(evaluator: Evaluator, theta: Tensor, batch: Batch, eps: float, seeds: range) -> Tensor:
    """[len(seeds)] float64 projected gradients from float32 losses, as a run computes them."""
    losses = evaluator.losses(LossRequest(theta, batch, (eps, -eps), tuple(seeds), Isotropic(FAMILY))).double().mean(2)
    return (losses[:, 0] - losses[:, 1]) / (2 * eps)


def rows_of(loaded: LoadedModel, mask: Mask, batch: Batch, base: str, seeds: range) -> list[dict[str, object]]:
    space = sparse(loaded.model, mask)
    theta = space.theta0(loaded.model)
    masked = {entry.name: entry.indices for entry in mask.entries}
    models = {}
    for name, dtype in COMPUTE_DTYPES.items():
        models[name] = copy.deepcopy(loaded.model)
        quantise(models[name], base, compute_dtype=dtype, masked=masked)
    exact = in_float64(models["float32"])
    rows: list[dict[str, object]] = []
    for eps in EPS:
        expected = reference(exact, space, theta, batch, eps, seeds)
        size = expected.square().mean().sqrt()
        for name, model in models.items():
            evaluator = Evaluator(model, space, compute_dtype=COMPUTE_DTYPES[name])
            error = measured(evaluator, theta, batch, eps, seeds) - expected
            relative = float(error.square().mean().sqrt() / size)
            rows.append({"base": base, "compute_dtype": name, "eps": eps, "relative_error": float(f"{relative:.3g}")})
            print(f"{base:>6}  {name:<9} {eps:7.0e}  {relative:9.2%}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few directions, well under a minute")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--kind", default="causal", choices=("causal", "masked", "encoder"))
    parser.add_argument("--task", default="toy-reviews")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--train", default="train", help="the data's training split or file")
    parser.add_argument("--test", default="test", help="the data's test split or file")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--directions", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    keep_memory()
    if arguments.quick:
        arguments.directions = 8
    loaded, batch = load(arguments)
    mask = draw_mask(loaded.model, arguments.density, "random", loaded.fingerprint)
    print(f"{'base':>6}  {'compute':<9} {'eps':>7}  {'error':>9}")
    rows = [row for base in BASES for row in rows_of(loaded, mask, batch, base, range(1, arguments.directions + 1))]
    print(json.dumps({"model": arguments.model, "density": arguments.density, "trainable": mask.size,
                      "directions": arguments.directions, "examples": len(batch), "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
