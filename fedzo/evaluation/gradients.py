"""Exact derivatives of the losses at theta: along a direction in forward mode, of all its entries in backward mode.

As for the losses alone, no stored parameter is written. While the model runs, each module that owns trainable
parameters finds them at theta, as dual numbers (forward mode) or leaves of the graph (backward mode); all products are
torch's own, which have derivatives.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedzo.directions.base import Directions
from fedzo.errors import SpaceError
from fedzo.evaluation.batch import Batch
from fedzo.evaluation.layers import (
    Forward,
    Slot,
    Split,
    Values,
    everywhere,
    frozen_weight,
    nowhere,
    own,
    placed,
    readers,
    replaced,
)
from fedzo.evaluation.scores import losses_from_scores, repeated_scores
from fedzo.spaces import Segment, TrainableSpace


@dataclass(frozen=True)
class DerivativeRequest:
    """Losses at theta and their exact derivatives along directions, grad loss . z, by forward-mode differentiation.

    The answer is float32 [len(seeds) + 1, B] on the CPU: row 0 the loss of every example, row s + 1 its derivative
    along z(seeds[s]).

    Attributes:
        theta: [space.size] float32 (or bfloat16, for a full space), on the model's device.
        batch: what to evaluate.
        seeds: 64-bit seeds of the directions.
        directions: seed -> z.
    """

    theta: Tensor
    batch: Batch
    seeds: tuple[int, ...]
    directions: Directions


@dataclass(frozen=True)
class GradientRequest:
    """Losses at theta and the gradient of their mean with respect to some entries of theta, by back-propagation.

    The answer is float32 [B + F] on the CPU: the loss of every example, then the gradient with respect to the F entries
    of the ranges, one range behind the other.

    Attributes:
        theta: [space.size] float32 (or bfloat16, for a full space), on the model's device.
        batch: what to evaluate.
        ranges: (offset, length) in theta of the entries.
    """

    theta: Tensor
    batch: Batch
    ranges: tuple[tuple[int, int], ...]


class Differentiator:
    """Answers derivative and gradient requests over one model and space.

    Args:
        model: in eval mode.
        slots: where the space's parameters are in the model.
        stored: [space.size] float32, what the model holds at theta's entries; None for a space without masked ones.
    """

    def __init__(self, model: nn.Module, space: TrainableSpace, slots: Sequence[Slot], stored: Tensor | None) -> None:
        self.model, self.space = model, space
        self._slots, self._stored = slots, stored
        self._readers = readers(model, slots)
        self._nowhere = nowhere(slots)
        self._frozen = [m for m in model.modules() if hasattr(m, "dequantised") and m not in self._readers]

    def derivatives(self, request: DerivativeRequest) -> Tensor:
        """[len(seeds) + 1, B] float32 on the CPU.

        Beside the losses' own forward there are one module's direction and the tangents of the activations; each
        direction takes a forward of its own, of two products where a layer is frozen and three where it is trained.

        Raises:
            SpaceError: theta does not fit the space, no seed is given, or an operation of the model has no forward-mode
                derivative.
        """
        self._check(request.theta)
        if not request.seeds:
            raise SpaceError("a derivative is asked for along no direction: give at least one seed")
        _refuse_codes(self.space.segments)
        rows: list[Tensor] = []
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            for seed in request.seeds:
                values = _Dual(request.theta, self._stored, request.directions, seed)
                with forward_ad.dual_level():
                    losses = self._forward_mode(values, request.batch)
                    loss, tangent = forward_ad.unpack_dual(losses)  # type: ignore[no-untyped-call]
                    rows = rows or [loss.clone()]
                    rows.append(torch.zeros_like(loss) if tangent is None else tangent.clone())
        return torch.stack(rows).float().cpu()

    def gradient(self, request: GradientRequest) -> Tensor:
        """[B + F] float32 on the CPU.

        The graph reaches from the loss down to the lowest parameter that the ranges touch, and no further.

        Raises:
            SpaceError: theta does not fit the space, or a range is empty or outside theta.
        """
        self._check(request.theta)
        touched = _touched(self.space, request.ranges)
        _refuse_codes(touched)
        values = _Leaves(request.theta, self._stored, touched)
        with _without_gradients(self.model), torch.enable_grad():
            losses = self._losses(
                values, request.batch, {m: _requantised(m, partial(frozen_weight, m)) for m in self._frozen}
            )
            leaves = list(values.leaves.values())
            mean = losses.mean()
            found = torch.autograd.grad(mean, leaves, allow_unused=True) if mean.requires_grad else [None] * len(leaves)
        gradients = dict(zip(values.leaves, found, strict=True))
        pieces = [losses.detach().float()]
        for offset, length in request.ranges:
            for segment in _touched(self.space, [(offset, length)]):
                gradient = gradients[segment.offset]
                start = max(0, offset - segment.offset)
                stop = min(segment.size, offset + length - segment.offset)
                unused = request.theta.new_zeros(stop - start, dtype=torch.float32)
                pieces.append(unused if gradient is None else gradient[start:stop].float())
        return torch.cat(pieces).cpu()

    def _check(self, theta: Tensor) -> None:
        self.space.check(theta)
        device = self._slots[0].parameter.device
        if theta.device != device:
            raise SpaceError(f"theta is on {theta.device}, the model on {device}: put both on one device")
        self.model.eval()

    def _forward_mode(self, values: "_Dual", batch: Batch) -> Tensor:
        try:
            return self._losses(values, batch, {})
        except RuntimeError as error:  # also NotImplementedError
            text = str(error)
            if "forward AD" not in text and "forward mode AD" not in text and "jvp" not in text:
                raise
            raise SpaceError(
                f"an operation of this {type(self.model).__name__} has no forward-mode derivative, which the estimator "
                f"forward-gradient needs: choose another estimator ({text.splitlines()[0][:200]})"
            ) from error

    def _losses(self, values: Values, batch: Batch, frozen: Mapping[nn.Module, Forward]) -> Tensor:
        """[B] on the model's device, with their derivatives."""
        batch = batch.to(self._slots[0].parameter.device)
        forwards = {module: _forward_of(module, slots, values) for module, slots in self._readers.items()}
        with replaced({**frozen, **forwards}), placed(self._slots, self._nowhere):
            losses = losses_from_scores(repeated_scores(self.model, batch, 1)[0], batch.labels)
        packed = any(hasattr(slot.owner, "dequantised") for slot in self._slots)
        if packed or not bool(torch.isnan(losses.detach()).any()):
            return losses
        # Either the loss is not finite, or a module reads the parameter of another, which shows as NaN.
        with replaced(frozen), placed(self._slots, everywhere(self._slots, values)):
            return losses_from_scores(repeated_scores(self.model, batch, 1)[0], batch.labels)


@dataclass(frozen=True)
class _Dual:
    """theta as dual numbers whose tangent is a direction (`layers.Values`); one point, so no rows to part."""

    theta: Tensor
    stored: Tensor | None
    directions: Directions
    seed: int
    points: int = 1
    rows: int = 0

    def dense(self, point: int, offset: int, size: int) -> Tensor:
        return self._dual(self.theta[offset : offset + size].float(), offset)

    def sparse(self, point: int, slot: Slot) -> Tensor:
        assert self.stored is not None
        place = slice(slot.segment.offset, slot.segment.offset + slot.segment.size)
        return self._dual(self.theta[place].float() - self.stored[place], place.start)

    def only(self, point: int) -> Any:
        return nullcontext()

    def _dual(self, values: Tensor, offset: int) -> Tensor:
        z = self.directions.axpy(torch.zeros_like(values), self.seed, 1.0, offset=offset)
        dual: Tensor = forward_ad.make_dual(values, z)  # type: ignore[no-untyped-call]
        return dual


class _Leaves:
    """theta with a leaf of the graph for each segment whose gradient is wanted (`layers.Values`)."""

    points, rows = 1, 0

    def __init__(self, theta: Tensor, stored: Tensor | None, segments: Sequence[Segment]) -> None:
        self.theta, self.stored = theta, stored
        self.leaves = {
            s.offset: theta[s.offset : s.offset + s.size].detach().float().requires_grad_() for s in segments
        }

    def dense(self, point: int, offset: int, size: int) -> Tensor:
        leaf = self.leaves.get(offset)
        return self.theta[offset : offset + size].float() if leaf is None else leaf

    def sparse(self, point: int, slot: Slot) -> Tensor:
        assert self.stored is not None
        offset, size = slot.segment.offset, slot.segment.size
        return self.dense(point, offset, size) - self.stored[offset : offset + size]

    def only(self, point: int) -> Any:
        return nullcontext()


def _touched(space: TrainableSpace, ranges: Sequence[tuple[int, int]]) -> list[Segment]:
    """The segments that share entries with a range, in the order of theta."""
    for offset, length in ranges:
        if offset < 0 or length < 1 or offset + length > space.size:
            raise SpaceError(
                f"a gradient is asked for at ({offset}, {length}), offset and length; wanted a range of at least one "
                f"entry within the {space.size} of theta"
            )
    return [s for s in space.segments if any(s.offset < a + n and a < s.offset + s.size for a, n in ranges)]


def _refuse_codes(segments: Sequence[Segment]) -> None:
    for segment in segments:
        if segment.holds == "codes":
            raise SpaceError(
                f"{segment.name} is trained in its codes, which are whole numbers and have no derivative: choose "
                "another estimator, or another space.kind"
            )


def _forward_of(module: nn.Module, slots: Sequence[Slot], values: Values) -> Forward:
    """The module's own forward at theta; of a quantised layer the product that its trained weight or scales make."""
    own_weight = next((slot for slot in slots if slot.owner is module and slot.name == "weight"), None)
    if not hasattr(module, "dequantised") or own_weight is None:
        return Split(module, slots, values, module.forward)
    layer: Any = module
    segment = own_weight.segment

    def held() -> Tensor:
        return values.dense(0, segment.offset, segment.size)

    if segment.holds == "codes":
        return _requantised(module, lambda: layer.at_codes(held().view(segment.shape)))
    if segment.holds == "scales":
        return lambda x: _product(x, layer.at_scales(layer.units(), held()), own(module, "bias"))
    return Split(module, slots, values, lambda x: _product(x, own(module, "weight"), own(module, "bias")))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of a quantised layer in the weight's dtype, the result in x's."""
    return functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)


class _Requantised(torch.autograd.Function):
    """x W^T + b for a W without derivative that the graph does not keep: it is dequantised once more going back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, dequantised: Callable[[], Tensor]) -> Tensor:
        ctx.dequantised, ctx.dtype = dequantised, x.dtype
        return _product(x, dequantised(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.dequantised()
        return (grad.to(weight.dtype) @ weight).to(ctx.dtype), None, None


def _requantised(module: nn.Module, dequantised: Callable[[], Tensor]) -> Forward:
    return lambda input: _Requantised.apply(input, own(module, "bias"), dequantised)  # type: ignore[no-untyped-call]


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Within it no parameter of the model asks for a gradient."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
