"""Masks from calibration data: the entries whose squared gradients are largest, by backward passes or forward only.

Sensitive (Guo et al., "Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity", arXiv 2406.02913): the diagonal of the
empirical Fisher matrix, the sum over calibration batches of the square of each batch's gradient. The mask is static.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedzo import directions
from fedzo.directions import philox
from fedzo.errors import DataError, SpaceError
from fedzo.evaluation import Batch, TokenTargets, candidate_scores, losses_from_scores
from fedzo.models import LoadedModel
from fedzo.spaces import Mask
from fedzo.spaces.selection import Selection, choose
from fedzo.spaces.sparse import candidates, gather
from fedzo.tasks import encoding

MASKED_SHARE = 0.15  # of the tokens of a sequence that a masked model must guess (Devlin et al. 2019)


def sensitive_mask(
    model: nn.Module,
    batches: Sequence[Batch],
    density: float,
    fingerprint: str,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    per_tensor: bool = False,
    settings: Mapping[str, Any] | None = None,
    group_entries: int = 2**28,
) -> Mask:
    """The share ``density`` of the matching matrices' entries with the largest summed squared gradients.

    One forward and one backward pass for each batch and group of parameters; beside the model and one batch's
    activations there are the float32 scores of one group and the candidates of the selection. Model and gradients are
    left as they were.

    Args:
        batches: the loss's gradient is squared for each, so usually one sequence or example in each.
        settings: what made the batches, to be recorded in the mask.
        group_entries: most entries whose scores are held at once; a larger matrix is a group of its own.

    Raises:
        SpaceError: density is not in (0, 1], or no matrix matches.
        DataError: there is no batch, or the loss of one is not finite.
    """
    parameters = candidates(model, include, exclude)
    selection = Selection({name: p.numel() for name, p in parameters.items()}, density, per_tensor)
    _check_some(batches)
    with _calibrating(model):
        for group in _groups(parameters, group_entries):
            for name, scores in _squared_gradients(model, group, batches).items():
                selection.add(name, scores)
    described = _settings(density, include, exclude, per_tensor, settings)
    return gather(parameters, selection.chosen(), fingerprint, "sensitive", described)


def forward_mask(
    model: nn.Module,
    batches: Sequence[Batch],
    density: float,
    fingerprint: str,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    per_tensor: bool = False,
    settings: Mapping[str, Any] | None = None,
    queries: int = 32,
    eps: float = 1e-2,
    seed: int = 0,
) -> Mask:
    """As :func:`sensitive_mask` from forward passes alone, over linear layers only.

    The expected squared gradient of weight (i, j) of a layer is taken for the product of two statistics: the mean
    square of input feature j, and the mean squared gradient of the loss at the layer's outputs. The latter comes from
    queries that add eps u to the layer's output at all positions (node perturbation), u of random signs: the expected
    square of the projected gradient is the squared length of the gradient. It is one number for a layer because the
    estimates of single outputs drown in their noise at any affordable number of queries; so all the weights that read
    one feature have one score, and ties go by index.

    Costs one forward for each batch, and 2 ``queries`` for each layer.

    Args:
        queries: of each layer, spread over the batches in turn.
        eps: size of the perturbation against the root mean square of the layer's output.

    Raises:
        SpaceError: density is not in (0, 1], no linear layer matches, or queries or eps make no sense.
        DataError: there is no batch, or the loss of one is not finite.
    """
    if queries < 1 or not eps > 0.0:
        raise SpaceError(f"a forward mask needs at least 1 query and eps above 0, found {queries} and {eps}")
    layers = _linear_layers(model, candidates(model, include, exclude))
    chosen = {layer.name: layer.weight for layer in layers}
    selection = Selection({name: p.numel() for name, p in chosen.items()}, density, per_tensor)
    _check_some(batches)
    with _calibrating(model), torch.no_grad():
        device = layers[0].weight.device
        moved = [batch.to(device) for batch in batches]
        statistics = [_feature_squares(model, layers, batch, number) for number, batch in enumerate(moved)]
        words = philox.words(seed, 2 * queries * len(layers)).astype(np.uint64)
        seeds = (words[0::2] | (words[1::2] << np.uint64(32))).reshape(len(layers), queries).tolist()
        for number, layer in enumerate(layers):
            scale = float(torch.stack([outputs[number] for _, outputs in statistics]).mean().sqrt())
            squares = [
                _projected(model, layer, moved[query % len(moved)], scale * eps, own, query % len(moved))
                .square()
                .mean()
                for query, own in enumerate(seeds[number])
            ]
            features = torch.stack([inputs[number] for inputs, _ in statistics]).mean(0)
            scores = features * (torch.stack(squares).mean() / layer.outputs)
            weight = layer.weight
            spread = scores.unsqueeze(1) if layer.transposed else scores.unsqueeze(0)
            selection.add(layer.name, spread.expand(weight.shape))
    described = _settings(density, include, exclude, per_tensor, settings)
    return gather(
        chosen, selection.chosen(), fingerprint, "forward", {**described, "queries": queries, "eps": eps, "seed": seed}
    )


def text_batches(loaded: LoadedModel, text: str, *, length: int, examples: int, seed: int) -> list[Batch]:
    """``examples`` sequences of the text of ``length`` tokens each, special tokens included, one in a batch.

    A causal model predicts every next token; a masked one a share of 15% of the tokens, at mask tokens. Sequences and
    masked places are a function of the seed.

    Raises:
        SpaceError: the model is an encoder without a language-model head.
        DataError: the text is too short, or length or examples are impossible.
    """
    if loaded.kind == "encoder":
        raise SpaceError(
            "an encoder has no language-model head to calibrate on text: give task data, or load it as kind masked"
        )
    limit = _longest(loaded)
    tokenizer = loaded.tokenizer
    before, after = encoding.special_frame(tokenizer)
    if loaded.kind == "causal":
        before, after = encoding.causal_prefix(tokenizer), []
    room = length - len(before) - len(after) + (loaded.kind == "causal")  # the last token is only predicted
    if room < 2 or length > limit or examples < 1:
        raise DataError(
            f"calibration asks for {examples} sequences of {length} tokens; wanted at least 1 sequence, and "
            f"{length - room + 2} to {limit} tokens with this model"
        )
    tokens = encoding.token_ids(tokenizer, [text])[text]
    blocks = len(tokens) // room
    if blocks < examples:
        raise DataError(
            f"the calibration text is too short: its {len(tokens)} tokens give {blocks} sequences of {length} tokens, "
            f"wanted {examples}; give a longer text, or fewer or shorter sequences"
        )
    batches = []
    for number in choose(blocks, examples, seed).tolist():
        whole = [*before, *tokens[number * room : (number + 1) * room], *after]
        if loaded.kind == "causal":
            batches.append(_batch(whole[:-1], list(range(len(whole) - 1)), whole[1:]))
            continue
        # The words of block 2**62 on: a draw of sequences never gets there.
        own = philox.words(seed, 2, offset_blocks=2**62 + number).astype(np.uint64)
        hidden = choose(room, max(1, round(MASKED_SHARE * room)), int(own[0] | own[1] << np.uint64(32)))
        places = (hidden + len(before)).tolist()
        wanted = [whole[place] for place in places]
        for place in places:
            whole[place] = tokenizer.mask_token_id
        batches.append(_batch(whole, places, wanted))
    return batches


def _longest(loaded: LoadedModel) -> int:
    config = getattr(loaded.model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or loaded.tokenizer.model_max_length
    return int(min(positions, loaded.tokenizer.model_max_length))


def _batch(tokens: list[int], places: list[int], wanted: list[int]) -> Batch:
    """One row with its scored tokens."""
    ids = torch.tensor([tokens])
    zeros = torch.zeros(len(places), dtype=torch.int64)
    targets = TokenTargets(zeros, torch.tensor(places), torch.tensor(wanted), zeros, 1)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros(1, dtype=torch.int64), targets)


def _settings(
    density: float,
    include: Sequence[str],
    exclude: Sequence[str],
    per_tensor: bool,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    own = {"density": density, "include": list(include), "exclude": list(exclude), "per_tensor": per_tensor}
    return {**(settings or {}), **own}


def _check_some(batches: Sequence[Batch]) -> None:
    if not batches:
        raise DataError("there is no calibration data: at least one batch is wanted")


@contextmanager
def _calibrating(model: nn.Module) -> Iterator[None]:
    """In eval mode with every gradient off; afterwards all is as before, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    # Other attention kernels sum gradients with atomics on CUDA, in another order each time.
    cuda = any(parameter.device.type == "cuda" for parameter, _, _ in states)
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if cuda else nullcontext()
    try:
        model.eval()
        for parameter, _, _ in states:
            parameter.requires_grad_(False)
            parameter.grad = None
        with kernel:
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad, grad in states:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _groups(parameters: Mapping[str, nn.Parameter], entries: int) -> Iterator[dict[str, nn.Parameter]]:
    group: dict[str, nn.Parameter] = {}
    held = 0
    for name, parameter in parameters.items():
        if group and held + parameter.numel() > entries:
            yield group
            group, held = {}, 0
        group[name] = parameter
        held += parameter.numel()
    yield group


def _losses(model: nn.Module, batch: Batch, number: int) -> Tensor:
    """[B] float32 on the model's device."""
    losses = losses_from_scores(candidate_scores(model, batch), batch.labels)
    if not bool(torch.isfinite(losses).all()):
        raise DataError(f"the loss of calibration batch {number} (counted from 0) is not finite: check model and data")
    return losses


def _squared_gradients(
    model: nn.Module, group: Mapping[str, nn.Parameter], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Summed squares of the batches' gradients, float32 and flat, on the model's device."""
    scores = {name: torch.zeros(p.numel(), device=p.device) for name, p in group.items()}
    handles = []

    def take(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            flat = gradient.reshape(-1).float()
            scores[name].addcmul_(flat, flat)
        parameter.grad = None

    try:
        for name, parameter in group.items():
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))  # type: ignore[no-untyped-call]
            handles.append(hook)
        for number, batch in enumerate(batches):
            device = next(iter(group.values())).device
            with torch.enable_grad():
                loss = _losses(model, batch.to(device), number).mean()
            if loss.requires_grad:  # else none of the group takes part in it
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        for parameter in group.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return scores


@dataclass(frozen=True)
class _Linear:
    name: str  # of its weight
    module: nn.Module
    weight: nn.Parameter
    transposed: bool  # [in, out], as transformers' Conv1D has it

    @property
    def outputs(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]


def _linear_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[_Linear]:
    """The linear layers with a chosen weight of their own, by name, without the output embedding."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    users = Counter(id(own) for module in model.modules() for own in module._parameters.values())
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers = []
    for module in model.modules():
        linear = isinstance(module, nn.Linear)
        weight = module._parameters.get("weight")
        if weight is None or id(weight) not in names or not (linear or type(module).__name__ == "Conv1D"):
            continue
        if module is not head and users[id(weight)] == 1:
            layers.append(_Linear(names[id(weight)], module, weight, not linear))
    if not layers:
        raise SpaceError(
            "no linear layer matches include and exclude (embeddings, the output embedding and tied weights do not "
            "count): a forward mask needs one"
        )
    return sorted(layers, key=lambda layer: layer.name)


def _feature_squares(
    model: nn.Module, layers: Sequence[_Linear], batch: Batch, number: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer the mean square of every input feature, [in], and of the output, []."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(layer: _Linear, x: Tensor, y: Tensor) -> None:
        inputs[layer.name] = x.float().reshape(-1, x.shape[-1]).square().mean(0)
        outputs[layer.name] = y.float().square().mean()

    handles = [
        layer.module.register_forward_hook(lambda _, args, y, layer=layer: note(layer, args[0], y)) for layer in layers
    ]
    try:
        _losses(model, batch, number)
    finally:
        for handle in handles:
            handle.remove()
    unused = [layer.name for layer in layers if layer.name not in inputs]
    if unused:
        raise SpaceError(f"layer {unused[0]} takes no part in the loss, or is never called: exclude it")
    return [inputs[layer.name] for layer in layers], [outputs[layer.name] for layer in layers]


def _projected(model: nn.Module, layer: _Linear, batch: Batch, eps: float, seed: int, number: int) -> Tensor:
    """[B] derivatives of the examples' losses along the signs of the seed at the layer's output."""
    signs = directions.fill(torch.empty(layer.outputs, device=layer.weight.device), seed, "rademacher")
    step = eps * signs
    handle = layer.module.register_forward_hook(lambda _, __, y: y + step.to(y.dtype))
    try:
        above = _losses(model, batch, number)
        step = -step
        below = _losses(model, batch, number)
    finally:
        handle.remove()
    return (above - below) / (2.0 * eps)
