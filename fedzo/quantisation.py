"""4-bit and 8-bit bases: the linear layers of a model, quantised in place with bitsandbytes.

The entries of a sparse space are taken out first: they are set to zero, which nf4, fp4 and int8 all represent exactly,
and live in theta. So theta does not depend on how a party quantised.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fedzo.errors import ModelError
from fedzo.models import EncoderClassifier, is_quantised
from fedzo.runtime import import_bitsandbytes
from fedzo.spaces import TrainableSpace

QUANTISATIONS = ("none", "nf4", "fp4", "int8")
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantise(
    model: nn.Module,
    kind: str,
    *,
    compute_dtype: torch.dtype = torch.float32,
    masked: Mapping[str, Tensor] = MappingProxyType({}),
    kept: Collection[str] = (),
    device: torch.device | str = "cpu",
    double: bool = True,
) -> None:
    """Quantise a model's linear layers in place, one after the other, and move it to a device.

    Every :class:`torch.nn.Linear` becomes a layer with ``dequantised() -> [out, in]`` and a forward that is
    dequantise + ``F.linear``. Beside the model there is never more than one layer in float32. What stays as it is:
    the output embeddings, a classification head, a layer whose weight is tied to another's, for nf4 and fp4 a layer
    whose weights do not fill blocks of 64; and all that is no ``nn.Linear``:
    embeddings, norms, GPT-2's Conv1D, experts stacked in one parameter. Values are rounded from float32 whatever the
    model's dtype, so a checkpoint gives the same layers from any dtype that holds it.

    Floating parameters that stay are cast to the compute dtype, norms too; a classification head stays float32, as do
    adapters, which are added afterwards.

    Args:
        kind: "nf4", "fp4", "int8" (weights only) or "none", which only casts and moves.
        compute_dtype: float32, bfloat16 or float16; see ``simulations/compute_dtype.py`` for what it costs.
        masked: parameter name -> flat int64 indices that dequantise to exactly 0.0. Entries of a weight that is not
            quantised stay as they are.
        kept: names of parameters that keep their dtype, unless they are quantised.
        double: for nf4 and fp4, quantise the scales too; else they stay float32.

    Raises:
        ModelError: an unknown kind or dtype, bitsandbytes is missing, the model is quantised or has an adapter
            already, no layer can be quantised, or ``masked`` does not fit the model. The model is unchanged then.
    """
    if kind not in QUANTISATIONS:
        raise ModelError(f"unknown quantisation {kind!r}; known: {', '.join(QUANTISATIONS)}")
    if compute_dtype not in COMPUTE_DTYPES.values():
        raise ModelError(f"compute dtype is {compute_dtype}; known: {', '.join(COMPUTE_DTYPES)}")
    if is_quantised(model):
        raise ModelError("the model is quantised already: load it again to quantise it in another way")
    if any(hasattr(module, "peft_config") for module in model.modules()):
        raise ModelError("the model has an adapter already: quantise the base first, then add the adapter")
    _check_masked(model, masked)
    if kind != "none":
        layer_class = _layer_class(kind)
        places = _places(model, kind)
        for name, parents in places.items():
            layer = layer_class.of(*_taken_out(model, name, masked, device), kind, compute_dtype, double)
            _check_zeros(name, layer, masked)
            for parent, attribute in parents:
                parent._modules[attribute] = layer
    heads = {id(p) for m in model.modules() if isinstance(m, EncoderClassifier) for p in m.head.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and id(parameter) not in heads and name not in kept:
            parameter.data = parameter.data.to(device, compute_dtype)
    model.to(device)


@torch.no_grad()
def dequantise(model: nn.Module, space: TrainableSpace, theta: Tensor) -> None:
    """Inverse of `quantise` at a theta of a space of scales or codes: plain linear layers with its weights.

    The quantised layers are replaced one after the other; weights that theta does not cover get their stored values,
    and theta's other entries are written into their parameters.
    """
    space.check(theta)
    segments = {segment.name: segment for segment in space.segments}
    places = {
        name: [(p, a) for p in model.modules() for a, child in p._modules.items() if child is layer]
        for name, layer in model.named_modules()
        if hasattr(layer, "dequantised")
    }
    for name, parents in places.items():
        old: Any = model.get_submodule(name)
        segment = segments.pop(f"{name}.weight", None)
        if segment is None:
            weight = old.dequantised()
        else:
            held = theta[segment.offset : segment.offset + segment.size].to(old.weight.device)
            scales = segment.holds == "scales"
            weight = old.at_scales(old.units(), held) if scales else old.at_codes(held.view(segment.shape))
        layer = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), old.bias
        for parent, attribute in parents:
            parent._modules[attribute] = layer.train(old.training)
    parameters = dict(model.named_parameters())
    for segment in segments.values():
        values = theta[segment.offset : segment.offset + segment.size].view(segment.shape)
        parameters[segment.name].copy_(values)


def _layer_class(kind: str) -> Any:
    try:
        import_bitsandbytes()
        from fedzo import _bitsandbytes
    except (ImportError, OSError) as error:
        raise ModelError(
            f"quantisation {kind} needs the package bitsandbytes, which cannot be imported: install fedzo[quantised], "
            "or choose quantisation none"
        ) from error
    return _bitsandbytes.Linear8bit if kind == "int8" else _bitsandbytes.Linear4bit


def _places(model: nn.Module, kind: str) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name of each layer to quantise -> the (parent, attribute) pairs that hold it, in the order of the model."""
    owners: dict[int, int] = {}
    heads: set[int] = set()
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        for attribute, child in module._modules.items():
            parents.setdefault(id(child), []).append((module, attribute))
        getter = getattr(module, "get_output_embeddings", None)
        heads.add(id(module.head if isinstance(module, EncoderClassifier) else getter() if getter else None))

    def fits(layer: nn.Linear) -> bool:
        whole = kind == "int8" or layer.weight.numel() % 64 == 0
        return whole and id(layer) not in heads and owners[id(layer.weight)] == 1

    places = {
        name: parents[id(layer)]
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and name and fits(layer)  # a subclass may read its weight in ways of its own
    }
    if not places:
        raise ModelError(
            f"no layer of this {type(model).__name__} can be quantised to {kind}: only nn.Linear layers outside the "
            "head are (GPT-2 has Conv1D layers); choose quantisation none"
        )
    return places


def _taken_out(
    model: nn.Module, name: str, masked: Mapping[str, Tensor], device: torch.device | str
) -> tuple[nn.Linear, Tensor]:
    """The layer, and its weight in float32 on the device with zeros at the masked entries."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().to(device, torch.float32).contiguous()
    indices = masked.get(f"{name}.weight")
    if indices is not None:
        weight = weight.reshape(-1).index_fill(0, indices.to(device), 0.0).view(weight.shape)
    return layer, weight


def _check_masked(model: nn.Module, masked: Mapping[str, Tensor]) -> None:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, indices in masked.items():
        if name not in sizes:
            raise ModelError(f"the mask names parameter {name}, which this model does not have: make a mask for it")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < sizes[name]:
            raise ModelError(
                f"the mask has an index out of range for parameter {name} of {sizes[name]} entries: "
                f"{int(indices.min())} to {int(indices.max())}"
            )


def _check_zeros(name: str, layer: Any, masked: Mapping[str, Tensor]) -> None:
    """Every party's theta relies on it, and what a new bitsandbytes or backend does with a zero is not ours."""
    indices = masked.get(f"{name}.weight")
    if indices is None:
        return
    weight = layer.dequantised().reshape(-1)
    if bool(weight[indices.to(weight.device)].count_nonzero()):
        raise ModelError(
            f"layer {name} does not represent zero exactly when quantised on {weight.device}: use quantisation none "
            "or another version of bitsandbytes"
        )
