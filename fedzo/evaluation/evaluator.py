"""Losses at theta and at theta + a z without writing to a stored parameter.

While a module that owns trainable parameters computes, its ``_parameters`` entries point at a scratch that holds
fl32(theta + a z); before and after they do not. So there is no perturbed copy of the model, the scratch is still in
cache when it is used, and an exception at any place leaves the model as it was.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedzo.directions import axpy
from fedzo.errors import SpaceError
from fedzo.evaluation.batch import Batch
from fedzo.evaluation.scores import candidate_scores, losses_from_scores
from fedzo.spaces import Segment, TrainableSpace

# Spaces whose parameters have together at most this many entries are perturbed at once, before the forward: one call
# instead of one a module. A fixed number, not a timing, so that every run computes the same.
SMALL = 4_000_000
# Scratch places are multiples of this many floats (64 bytes): what a matmul computes may depend on alignment.
_ALIGN = 16


@dataclass(frozen=True)
class LossRequest:
    """Losses wanted at the points theta + a z, one for each a in ``offsets``.

    Attributes:
        theta: [space.size] float32, on the model's device.
        batch: what to evaluate.
        offsets: the a of each point; 0.0 is theta itself.
        seed: 64-bit seed of the direction z.
        family: direction family, see :data:`fedzo.directions.FAMILIES`.
    """

    theta: Tensor
    batch: Batch
    offsets: tuple[float, ...]
    seed: int = 0
    family: str = "rademacher"


@dataclass(frozen=True)
class _Point:
    theta: Tensor
    offset: float
    seed: int
    family: str


@dataclass(frozen=True)
class _Slot:
    """One trainable parameter in the module that owns it."""

    module: nn.Module
    name: str
    segment: Segment
    parameter: nn.Parameter
    place: int  # of its values in the scratch


@dataclass(frozen=True)
class _Run:
    """Dense slots that are neighbours in theta as in the scratch: one axpy."""

    offset: int
    size: int
    place: int


@dataclass(frozen=True)
class _Owner:
    module: nn.Module
    slots: tuple[_Slot, ...]
    runs: tuple[_Run, ...]
    size: int  # scratch floats it needs
    lookup: bool  # an embedding, of which only the rows looked up are needed


class Evaluator:
    """Evaluates one model at any number of theta vectors of one space.

    The model is put into eval mode. Its stored parameters are never written, whatever happens.

    Raises:
        SpaceError: the space does not belong to the model, or a trainable parameter is not float32.
    """

    def __init__(self, model: nn.Module, space: TrainableSpace) -> None:
        self.model = model.eval()
        self.space = space
        parameters = space.parameters(model)
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                raise SpaceError(f"parameter {name} has dtype {parameter.dtype}: load the model in float32 to train it")
        self.device = next(iter(parameters.values())).device
        self._owners = _owners(model, space, parameters)
        self._scratch: list[Tensor] = []  # by nesting depth of owning modules
        self._perturbed: Tensor | None = None  # reused between small evaluations
        self._nowhere = {
            segment.name: torch.full((), math.nan, device=self.device).expand(segment.shape)
            for segment in space.segments
        }
        materialised = sum(math.prod(segment.shape) for segment in space.segments)
        # PEFT reads its parameters from outside the modules that own them, so adapters are never streamed.
        self._resident = space.kind == "adapter" or materialised <= SMALL
        self._streamable: set[frozenset[str]] = set()  # kinds of input that streaming has served

    def losses(self, request: LossRequest) -> Tensor:
        """[len(offsets), B] float32 on CPU: the loss of every example at every point."""
        batch = request.batch.to(self.device)
        losses = [
            losses_from_scores(
                self._scores(_Point(request.theta, a, request.seed, request.family), batch), batch.labels
            )
            for a in request.offsets
        ]
        return torch.stack(losses).cpu()

    def scores(self, theta: Tensor, batch: Batch) -> Tensor:
        """[B, C] float32 on CPU: the candidate scores at theta."""
        return self._scores(_Point(theta, 0.0, 0, "rademacher"), batch.to(self.device)).cpu()

    def _scores(self, point: _Point, batch: Batch) -> Tensor:
        self.space.check(point.theta)
        if point.theta.device != self.device:
            raise SpaceError(f"theta is on {point.theta.device}, the model on {self.device}: put both on one device")
        if self.model.training:
            self.model.eval()
        if self._resident:
            return self._evaluate(self._materialised, point, batch)
        scores = self._evaluate(self._streamed, point, batch)
        kind = frozenset(batch.inputs)
        if kind in self._streamable:
            return scores
        if not bool(torch.isnan(scores).any()):
            self._streamable.add(kind)
            return scores
        # Either the loss is not finite, or a module reads the parameter of another, which streaming shows as NaN.
        again = self._evaluate(self._materialised, point, batch)
        self._resident = not bool(torch.isnan(again).any())
        return again

    @torch.no_grad()
    def _evaluate(self, place: Callable[[_Point], Any], point: _Point, batch: Batch) -> Tensor:
        with self._restored(), place(point):
            return candidate_scores(self.model, batch)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        try:
            yield
        finally:
            for owner in self._owners:
                for slot in owner.slots:
                    slot.module._parameters[slot.name] = slot.parameter

    @contextmanager
    def _materialised(self, point: _Point) -> Iterator[None]:
        """All trainable parameters hold their perturbed values for the whole forward."""
        theta = point.theta
        if point.offset != 0.0:
            if self._perturbed is None:
                self._perturbed = torch.empty_like(theta)
            theta = axpy(theta, point.seed, point.offset, point.family, out=self._perturbed)
        placed: dict[str, Tensor] = {}
        for owner in self._owners:
            for slot in owner.slots:
                segment = slot.segment
                if segment.name not in placed:
                    values = theta[segment.offset : segment.offset + segment.size]
                    if segment.indices is not None:
                        whole = slot.parameter.detach().reshape(-1).clone()
                        values = whole.index_copy_(0, segment.indices.to(self.device), values)
                    placed[segment.name] = values.view(segment.shape)
                _put(slot, placed[segment.name])
        yield

    @contextmanager
    def _streamed(self, point: _Point) -> Iterator[None]:
        """Every module sees its perturbed parameters while it computes; at other times they are NaN."""
        depth = 0

        def enter(owner: _Owner, args: tuple[Any, ...]) -> None:
            nonlocal depth
            self._fill(owner, point, depth, args)
            depth += 1

        def leave(owner: _Owner, output: Any) -> Any:
            nonlocal depth
            depth -= 1
            for slot in owner.slots:
                _put(slot, self._nowhere[slot.segment.name])
            return _detached(output, self._scratch[depth].untyped_storage().data_ptr())

        handles = []
        try:
            for owner in self._owners:
                handles.append(owner.module.register_forward_pre_hook(lambda _, args, o=owner: enter(o, args)))
                handles.append(owner.module.register_forward_hook(lambda _, __, output, o=owner: leave(o, output)))
                for slot in owner.slots:
                    _put(slot, self._nowhere[slot.segment.name])
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _fill(self, owner: _Owner, point: _Point, depth: int, args: tuple[Any, ...]) -> None:
        """Point the owner's parameters at their values at the point."""
        scratch = self._buffer(depth, owner.size)
        theta, plain = point.theta, point.offset == 0.0

        def perturb(offset: int, size: int, out: Tensor) -> Tensor:
            return axpy(theta[offset : offset + size], point.seed, point.offset, point.family, offset=offset, out=out)

        rows = _looked_up(owner, args) if owner.lookup and not plain else None
        if rows is not None:
            slot, width = owner.slots[0], owner.slots[0].segment.shape[1]
            for row in rows:
                start = slot.place + row * width
                perturb(slot.segment.offset + row * width, width, scratch[start : start + width])
        elif not plain:
            for run in owner.runs:
                perturb(run.offset, run.size, scratch[run.place : run.place + run.size])
        for slot in owner.slots:
            segment = slot.segment
            values = theta[segment.offset : segment.offset + segment.size]
            whole = scratch[slot.place : slot.place + math.prod(segment.shape)]
            if segment.indices is not None:
                if not plain:
                    values = perturb(segment.offset, segment.size, torch.empty_like(values))
                whole.copy_(slot.parameter.detach().reshape(-1))
                values = whole.index_copy_(0, segment.indices.to(self.device), values)
            elif not plain:
                values = whole
            _put(slot, values.view(segment.shape))

    def _buffer(self, depth: int, size: int) -> Tensor:
        while len(self._scratch) <= depth:
            self._scratch.append(torch.empty(0, device=self.device))
        if self._scratch[depth].numel() < size:
            self._scratch[depth] = torch.empty(size, device=self.device)
        return self._scratch[depth]


def _owners(model: nn.Module, space: TrainableSpace, parameters: dict[str, nn.Parameter]) -> list[_Owner]:
    """The modules that own a trainable parameter. A tied parameter has a slot in each of its modules."""
    segments = {id(parameters[segment.name]): segment for segment in space.segments}
    owners = []
    for module in model.modules():
        owned = [
            (segments[id(parameter)], name, parameter)
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in segments
        ]
        slots: list[_Slot] = []
        runs: list[_Run] = []
        place = 0
        for segment, name, parameter in sorted(owned, key=lambda item: item[0].offset):
            if segment.indices is None:
                last = runs[-1] if runs else None
                if last and last.offset + last.size == segment.offset and last.place + last.size == place:
                    runs[-1] = _Run(last.offset, last.size + segment.size, last.place)
                else:
                    runs.append(_Run(segment.offset, segment.size, place))
            slots.append(_Slot(module, name, segment, parameter, place))
            place += -(-math.prod(segment.shape) // _ALIGN) * _ALIGN
        if slots:
            lookup = type(module) is nn.Embedding and module.max_norm is None and slots[0].segment.indices is None
            owners.append(_Owner(module, tuple(slots), tuple(runs), place, lookup))
    return owners


def _looked_up(owner: _Owner, args: tuple[Any, ...]) -> list[int] | None:
    """The distinct rows an embedding is asked for, when they are few against its size."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].is_floating_point():
        return None
    height, width = owner.slots[0].segment.shape
    rows = torch.unique(args[0])
    # A row costs a call, some 10 us, in which about 10^4 entries could be perturbed in one go.
    if rows.numel() * (width + 10_000) > height * width:
        return None
    return [int(row) for row in rows.tolist()]


def _put(slot: _Slot, value: Tensor) -> None:
    slot.module._parameters[slot.name] = value  # type: ignore[assignment]


def _detached(output: Any, storage: int) -> Any:
    """The output with every tensor that lives in the scratch copied out of it."""
    if isinstance(output, Tensor):
        return output.clone() if output.untyped_storage().data_ptr() == storage else output
    if isinstance(output, (tuple, list)):
        fresh = [_detached(item, storage) for item in output]
        if all(new is old for new, old in zip(fresh, output, strict=True)):
            return output
        return type(output)(*fresh) if hasattr(output, "_fields") else type(output)(fresh)
    if isinstance(output, dict):
        for key, item in output.items():
            new = _detached(item, storage)
            if new is not item:
                output[key] = new
    return output
