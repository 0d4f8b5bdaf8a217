"""Scores of candidates and per-example losses, in float32, with the language-model head at answer positions only."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedzo.evaluation.batch import Batch, TokenTargets

_FORWARD = 128


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Length-normalised log-probabilities of every example's candidates.

    Args:
        model: a causal or masked language model with ``get_output_embeddings()``, or, for a batch without targets, a
            module that returns class logits (a tensor or an output with ``.logits``).
        batch: on the model's device.

    Returns:
        [B, C] float32: the mean over a candidate's tokens of log p(token); -inf where an example has no such
        candidate. Class logits [B, C] when the batch has no targets. A row's scores do not depend on other rows.
    """
    return repeated_scores(model, batch, 1)[0]


def repeated_scores(model: nn.Module, batch: Batch, copies: int) -> Tensor:
    """[copies, B, C] float32: the scores of copies of the batch that go through the model together.

    The rows of a forward are those of the first copy, then those of the second, and so on; a model whose layers treat
    the copies differently gives each its own scores.
    """
    targets = batch.targets
    if targets is None:
        parts = _by_length(batch.inputs)
        logits = [_by_copy(_logits(model(**_repeat(inputs, copies))).float(), copies) for _, inputs in parts]
        order = torch.cat([rows for rows, _ in parts])
        return torch.cat(logits, 1)[:, torch.argsort(order)]
    log_probabilities = torch.empty(copies, len(targets.rows), device=targets.rows.device)
    for rows, inputs in _by_length(batch.inputs):
        place = torch.full((len(batch.inputs["input_ids"]),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        scored = torch.nonzero(place[targets.rows] >= 0)[:, 0]
        if len(scored):
            log_probabilities[:, scored] = _log_probabilities(
                model, inputs, copies, place[targets.rows[scored]], targets.positions[scored], targets.tokens[scored]
            )
    return _means(log_probabilities, targets, len(batch))


def _repeat(inputs: dict[str, Tensor], copies: int) -> dict[str, Tensor]:
    return inputs if copies == 1 else {name: torch.cat([value] * copies) for name, value in inputs.items()}


def _by_copy(values: Tensor, copies: int) -> Tensor:
    """[copies, rows, ...] of [copies * rows, ...]."""
    return values.view(copies, -1, *values.shape[1:])


def _log_probabilities(
    model: nn.Module, inputs: dict[str, Tensor], copies: int, rows: Tensor, positions: Tensor, tokens: Tensor
) -> Tensor:
    """[copies, N] float32 log p(token) at the (row, position) pairs; equal pairs go through the head once."""
    length = inputs["input_ids"].shape[1]
    places, which = torch.unique(rows * length + positions, return_inverse=True)
    logits = _logits_at(model, inputs, copies, places // length, places % length)
    return functional.log_softmax(logits.float(), dim=-1)[:, which, tokens]


def _by_length(inputs: dict[str, Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The rows in groups of like length, each padded to its own longest: (row numbers, inputs of those rows).

    One more forward costs about as much as `_FORWARD` tokens; a batch is cut where that saves at least as many. On a
    CPU only, where a forward's time grows with its tokens. The cut is a function of the lengths alone.
    """
    mask = inputs.get("attention_mask")
    some = next(iter(inputs.values()))
    everything = torch.arange(len(some), device=some.device)
    if mask is None or some.device.type != "cpu":
        return [(everything, inputs)]
    lengths, order = torch.sort(mask.sum(1), stable=True)
    groups = _cut(lengths.tolist(), 0, len(lengths))
    if len(groups) == 1:
        return [(everything, inputs)]
    return [
        (order[a:b], {name: value[order[a:b], : int(lengths[b - 1])] for name, value in inputs.items()})
        for a, b in groups
    ]


def _cut(lengths: list[int], start: int, stop: int) -> list[tuple[int, int]]:
    """Ascending lengths[start:stop] as ranges, cut in two wherever that saves `_FORWARD` padding tokens."""
    longest = lengths[stop - 1]
    saved, at = max(((at - start) * (longest - lengths[at - 1]), at) for at in range(start + 1, stop + 1))
    if saved < _FORWARD:
        return [(start, stop)]
    return _cut(lengths, start, at) + _cut(lengths, at, stop)


def losses_from_scores(scores: Tensor, labels: Tensor) -> Tensor:
    """[B] float32: cross-entropy of the softmax over candidates, or -score when there is one candidate only."""
    if scores.shape[1] == 1:
        return -scores[:, 0]
    return functional.cross_entropy(scores, labels, reduction="none")


def _means(values: Tensor, targets: TokenTargets, examples: int) -> Tensor:
    """Mean of the [copies, N] values by candidate, [copies, B, C]. A padded row each, so that no sum has atomics."""
    total = examples * targets.num_candidates
    order = torch.argsort(targets.candidates, stable=True)
    groups = targets.candidates[order]
    counts = torch.bincount(groups, minlength=total)
    rank = torch.arange(len(groups), device=groups.device) - (torch.cumsum(counts, 0) - counts)[groups]
    table = values.new_zeros(len(values), total, max(1, int(counts.max())))
    table[:, groups, rank] = values[:, order]
    means = torch.where(counts > 0, table.sum(2) / counts, -torch.inf)
    return means.view(len(values), examples, targets.num_candidates)


def _logits_at(model: nn.Module, inputs: dict[str, Tensor], copies: int, rows: Tensor, positions: Tensor) -> Tensor:
    """[copies, N, V] logits at the (row, position) pairs of each copy.

    The output embedding sees only those where it can be found.
    """
    height, length = inputs["input_ids"].shape
    from_end = positions - length  # adapters may put virtual tokens in front of the text
    selected = False

    def at(values: Tensor) -> Tensor:
        return _by_copy(values, copies)[:, rows, values.shape[1] + from_end]

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal selected
        if not (args and isinstance(args[0], Tensor) and args[0].dim() == 3):
            return None
        if args[0].shape[0] != copies * height or args[0].shape[1] < length:
            return None
        selected = True
        return (at(args[0]), *args[1:])

    head = _output_embeddings(model)
    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        keywords = {"use_cache": False} if _knows_use_cache(_base_forward(model)) else {}
        logits = _logits(model(**_repeat(inputs, copies), **keywords))
    finally:
        if handle is not None:
            handle.remove()
    return logits if selected else at(logits)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    return head if isinstance(head, nn.Module) else None


def _base_forward(model: nn.Module) -> Callable[..., Any]:
    unwrap = getattr(model, "get_base_model", None)  # PEFT's wrappers take any keyword and pass it on
    return type(model if unwrap is None else unwrap()).forward


@lru_cache
def _knows_use_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
