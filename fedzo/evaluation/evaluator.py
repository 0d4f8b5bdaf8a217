"""Losses at theta + a z for one or many points at once, without writing to a stored parameter.

While a model is evaluated, the forwards of the modules that own trainable parameters are replaced by those of `layers`,
which know the points; the parameters themselves read as NaN meanwhile, so that a model that reads one behind a module's
back is noticed. Several points go through the model in one batch ("paired"): what is frozen is then computed, and
dequantised, once for all of them.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedzo.directions.base import Directions, Isotropic
from fedzo.errors import ConfigError, SpaceError
from fedzo.evaluation.batch import Batch
from fedzo.evaluation.gradients import DerivativeRequest, Differentiator, GradientRequest
from fedzo.evaluation.layers import (
    Forward,
    Slot,
    UnpairableError,
    everywhere,
    forward_of,
    frozen_forward,
    nowhere,
    placed,
    readers,
    replaced,
)
from fedzo.evaluation.scores import losses_from_scores, repeated_scores
from fedzo.spaces import TrainableSpace

T = TypeVar("T")

EVALUATIONS = ("auto", "paired", "sequential")
# Spaces of at most this many entries are perturbed at once, before the forward: one call instead of one a module.
SMALL = 4_000_000
# Tokens of a forward up to which it pays to put more queries into it: beyond, the products have enough rows.
TOGETHER = {"cpu": 512, "cuda": 4096}
# Floats that the perturbed vectors of the points of one forward may take together.
_VECTORS = 2**26
# What "auto" wants pairing to take of the time of one at a time, which holds fewer activations.
_MARGIN = 0.97


@dataclass(frozen=True)
class LossRequest:
    """Losses wanted at the points theta + a z, for each direction z and each a in ``offsets``.

    The answer is float32 [len(seeds), len(offsets), B] on the CPU; with ``origin`` it is flat in its points,
    [1 + len(seeds) len(offsets), B], the losses at theta in front.

    Attributes:
        theta: [space.size] float32 (or bfloat16, for a full space), on the model's device.
        batch: what to evaluate.
        offsets: the a of each point; 0.0 is theta itself.
        seeds: 64-bit seeds of the directions.
        directions: seed -> z.
        together: put all points into one forward, whatever its size (where the model can be paired at all).
        origin: theta itself too, once for all directions.
    """

    theta: Tensor
    batch: Batch
    offsets: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    directions: Directions = field(default_factory=Isotropic)
    together: bool = False
    origin: bool = False


Request = LossRequest | DerivativeRequest | GradientRequest


@dataclass(frozen=True)
class _Point:
    seed: int
    offset: float


class Evaluator:
    """Evaluates one model at any number of theta vectors of one space.

    The model is put into eval mode. Its stored parameters are never written, whatever happens.

    Attributes:
        evaluation: "paired" or "sequential" once it is decided, "auto" before the first request.

    Args:
        evaluation: "paired" puts the points of a query, and several queries of a small batch, into one forward;
            "sequential" evaluates one point at a time; "auto" takes what a measurement on the first batch finds faster,
            or "paired" where the first request wants its points together and the model can be paired.
            Both give the same losses, bit for bit, where a row's result does not depend on the batch's size; pairing
            checks itself on the first batch against one point at a time.
        compute_dtype: in which the layers of a bfloat16 theta compute; other layers compute in their weights' dtype.

    Raises:
        SpaceError: the space does not belong to the model, or a trainable parameter is quantised.
        ConfigError: the evaluation is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        space: TrainableSpace,
        evaluation: str = "auto",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        if evaluation not in EVALUATIONS:
            raise ConfigError(f"evaluation is {evaluation!r}, but must be one of {', '.join(EVALUATIONS)}")
        self.model = model.eval()
        self.space = space
        self.evaluation = evaluation
        self._checked = evaluation == "sequential"
        parameters = space.parameters(model)
        self.device = next(iter(parameters.values())).device
        self._state = _State(space, parameters)
        self._slots = _slots(model, space, parameters, compute_dtype)
        self._forwards = _forwards(model, self._slots, self._state)
        self._nowhere = nowhere(self._slots)
        self._resident = False  # a parameter is read from outside its module: all are put in place for the forward
        self._proven: set[frozenset[str]] = set()  # kinds of input on which no such reading was seen

    def answer(self, request: Request) -> Tensor:
        """What is asked for, float32 on CPU, in the shape that the kind of request states.

        Raises:
            SpaceError: theta does not fit the space, or the model cannot do what is asked of it.
        """
        if isinstance(request, LossRequest):
            return self.losses(request)
        if isinstance(request, DerivativeRequest):
            return self._differentiator.derivatives(request)
        return self._differentiator.gradient(request)

    def run(self, asking: Generator[Request, Tensor, T]) -> T:
        """Answers a generator's requests, until it returns; an error of an answer is for the generator to decide on."""
        try:
            request = next(asking)
            while True:
                try:
                    answer = self.answer(request)
                except Exception as error:
                    request = asking.throw(error)
                else:
                    request = asking.send(answer)
        except StopIteration as stop:
            found: T = stop.value
            return found

    @cached_property
    def _differentiator(self) -> Differentiator:
        return Differentiator(self.model, self.space, self._slots, self._state.stored)

    def losses(self, request: LossRequest) -> Tensor:
        """The loss of every example at every point, in the shape that `LossRequest` states.

        Raises:
            SpaceError: theta does not fit the space, or, for "paired", a layer cannot be paired.
        """
        batch = request.batch.to(self.device)
        points = [_Point(0, 0.0)] if request.origin else []
        points += [_Point(seed, a) for seed in request.seeds for a in request.offsets]
        if not self._checked:
            self._choose(request, points[: max(2, len(request.offsets))], batch)
        step = self._together(len(request.offsets), batch)
        if request.together and self.evaluation != "sequential" and not self._resident:
            step = len(points)
        scores = [
            self._scores(request.theta, request.directions, points[i : i + step], batch)
            for i in range(0, len(points), step)
        ]
        losses = torch.stack([losses_from_scores(s, batch.labels) for s in torch.cat(scores)])
        return (losses if request.origin else losses.view(len(request.seeds), len(request.offsets), -1)).cpu()

    def scores(self, theta: Tensor, batch: Batch) -> Tensor:
        """[B, C] float32 on CPU: the candidate scores at theta."""
        return self._scores(theta, Isotropic(), [_Point(0, 0.0)], batch.to(self.device))[0].cpu()

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[nn.Module]:
        """Within it the model computes at theta, in forwards of any kind (to generate text, say).

        Whether a parameter is read behind its module's back is known from the scores of a batch: take some first.

        Raises:
            SpaceError: theta does not fit the space or the device.
        """
        self._check(theta)
        point = [_Point(0, 0.0)]
        with torch.no_grad(), self._state.at(theta, Isotropic(), point):
            inside = placed(self._slots, everywhere(self._slots, self._state)) if self._resident else self._hooked()
            with inside:
                yield self.model

    def _together(self, offsets: int, batch: Batch) -> int:
        """Points of one forward: one, or those of as many queries as `TOGETHER` and memory allow, two at least."""
        if self.evaluation == "sequential" or self._resident:
            return 1
        some = batch.inputs.get("input_ids", batch.labels)
        queries = TOGETHER.get(self.device.type, TOGETHER["cuda"]) // max(1, offsets * some.numel())
        if self._state.at_once:
            queries = min(queries, _VECTORS // (offsets * self.space.size))
        return max(2, offsets * max(1, queries))

    def _choose(self, request: LossRequest, points: list[_Point], batch: Batch) -> None:
        """Decides between paired and sequential on the first batch, and checks that pairing is right there."""
        theta, directions = request.theta, request.directions

        def one_by_one() -> Tensor:
            return torch.cat([self._scores(theta, directions, [point], batch) for point in points])

        def paired() -> Tensor:
            return self._scores(theta, directions, points, batch)

        if len(points) < 2:
            return
        single = one_by_one()
        reason = "a parameter is read from outside the module that owns it" if self._resident else ""
        if not reason:
            try:
                reason = self._difference(paired(), single, theta, directions, points, batch)
            except (UnpairableError, RuntimeError) as error:  # RuntimeError: shapes that no longer fit
                reason = str(error) if isinstance(error, UnpairableError) else f"{type(error).__name__} in a layer"
        if reason and self.evaluation == "paired":
            raise SpaceError(
                f'runtime.evaluation is "paired", but this model cannot be paired: {reason}; use "auto" or "sequential"'
            )
        self._checked = True
        if reason:
            self.evaluation = "sequential"
        elif self.evaluation == "auto":
            wanted = request.together or (_seconds(paired, self.device) < _MARGIN * _seconds(one_by_one, self.device))
            self.evaluation = "paired" if wanted else "sequential"

    def _difference(
        self,
        paired: Tensor,
        single: Tensor,
        theta: Tensor,
        directions: Directions,
        points: Sequence[_Point],
        batch: Batch,
    ) -> str:
        """Why paired scores are not those of one point at a time, or "".

        Where a backend's results depend on the number of rows, one point is compared within a batch of the same shape,
        all of whose copies are at that point; the two may then differ by no more than the backend does itself.
        """
        if torch.equal(paired, single):
            return ""
        count = len(points)
        alike = torch.stack([self._scores(theta, directions, [p] * count, batch)[k] for k, p in enumerate(points)])
        if torch.equal(paired, alike):
            return ""
        finite = torch.isfinite(single)
        noise = float((alike - single)[finite].abs().max()) if bool(finite.any()) else 0.0
        found = float((paired - alike)[finite].abs().max()) if bool(finite.any()) else 0.0
        same = torch.equal(torch.isfinite(paired), finite)
        return "" if same and found <= 2 * noise else f"scores differ by {found:.2g} from those of one point at a time"

    @torch.no_grad()
    def _scores(self, theta: Tensor, directions: Directions, points: Sequence[_Point], batch: Batch) -> Tensor:
        """[points, B, C] float32 on the model's device."""
        self._check(theta)
        if self._resident:
            return torch.cat([self._materialised(theta, directions, point, batch) for point in points])
        with self._hooked(), self._state.at(theta, directions, points):
            scores = repeated_scores(self.model, batch, len(points))
        kind = frozenset(batch.inputs)
        if kind in self._proven or not bool(torch.isnan(scores).any()):
            self._proven.add(kind)
            return scores
        if any(hasattr(slot.owner, "dequantised") for slot in self._slots):
            return scores
        # Either the loss is not finite, or a module reads the parameter of another, which shows as NaN.
        again = torch.cat([self._materialised(theta, directions, point, batch) for point in points])
        self._resident = not bool(torch.isnan(again).any())
        return again

    def _check(self, theta: Tensor) -> None:
        self.space.check(theta)
        if theta.device != self.device:
            raise SpaceError(f"theta is on {theta.device}, the model on {self.device}: put both on one device")
        if self.model.training:
            self.model.eval()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Within it the replaced forwards are in place; afterwards the modules are as they were."""
        state = self._state

        def count(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            if tensors and not state.inside:
                state.rows = tensors[0].shape[0] // state.points

        handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            with replaced(self._forwards), placed(self._slots, self._nowhere):
                yield
        finally:
            handle.remove()

    def _materialised(self, theta: Tensor, directions: Directions, point: _Point, batch: Batch) -> Tensor:
        """[1, B, C]: all trainable parameters hold their perturbed values for the whole forward."""
        with self._state.at(theta, directions, [point]), placed(self._slots, everywhere(self._slots, self._state)):
            return repeated_scores(self.model, batch, 1)


class _State:
    """theta + a z at the points of the present forward (`layers.Values`)."""

    def __init__(self, space: TrainableSpace, parameters: dict[str, nn.Parameter]) -> None:
        sparse = any(segment.indices is not None for segment in space.segments)
        self.at_once = sparse or space.size <= SMALL
        self.stored = _stored(space, parameters) if sparse else None
        self.rows = 1
        self.inside = False
        self._theta = torch.empty(0)
        self._directions: Directions = Isotropic()
        self._points: Sequence[_Point] = ()
        self._vectors: list[Tensor] = []
        self._differences: list[Tensor] = []

    @property
    def points(self) -> int:
        return len(self._points)

    @contextmanager
    def at(self, theta: Tensor, directions: Directions, points: Sequence[_Point]) -> Iterator[None]:
        self._theta, self._directions, self._points = theta, directions, points
        if self.at_once:
            self._vectors = [self._perturbed(point, 0, theta.numel()) for point in points]
            if self.stored is not None:
                self._differences = [vector - self.stored for vector in self._vectors]
        try:
            yield
        finally:
            self._theta, self._points, self._vectors, self._differences = torch.empty(0), (), [], []
            self.inside = False

    def _perturbed(self, point: _Point, offset: int, size: int) -> Tensor:
        here, axpy = self._theta[offset : offset + size], self._directions.axpy
        if here.dtype != torch.float32:
            here = here.float()
            return here if point.offset == 0.0 else axpy(here, point.seed, point.offset, offset=offset)
        if point.offset == 0.0:
            return here
        return axpy(here, point.seed, point.offset, offset=offset, out=torch.empty_like(here))

    def dense(self, point: int, offset: int, size: int) -> Tensor:
        if self.at_once:
            return self._vectors[point][offset : offset + size]
        return self._perturbed(self._points[point], offset, size)

    def sparse(self, point: int, slot: Slot) -> Tensor:
        segment = slot.segment
        return self._differences[point][segment.offset : segment.offset + segment.size]

    @contextmanager
    def only(self, point: int) -> Iterator[None]:
        """Modules within a module that is computed point by point see that point alone."""
        before = self._points, self._vectors, self._differences, self.inside
        self._points = self._points[point : point + 1]
        self._vectors, self._differences = self._vectors[point : point + 1], self._differences[point : point + 1]
        self.inside = True
        try:
            yield
        finally:
            self._points, self._vectors, self._differences, self.inside = before


def _stored(space: TrainableSpace, parameters: dict[str, nn.Parameter]) -> Tensor:
    """[size] float32: what the stored weights hold at theta's entries; zero where they were taken out to quantise."""
    found = []
    for segment in space.segments:
        parameter = parameters[segment.name]
        if segment.indices is None or not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            found.append(torch.zeros(segment.size, device=parameter.device))
        else:
            found.append(parameter.detach().reshape(-1)[segment.indices.to(parameter.device)].float())
    return torch.cat(found)


def _slots(
    model: nn.Module, space: TrainableSpace, parameters: dict[str, nn.Parameter], compute_dtype: torch.dtype
) -> list[Slot]:
    """Where the trainable parameters are; a tied one has a slot in each module that owns it."""
    segments = {id(parameters[segment.name]): segment for segment in space.segments}
    slots = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in segments:
                continue
            segment = segments[id(parameter)]
            quantised = hasattr(module, "dequantised") and name == "weight"
            if quantised and segment.indices is None and segment.holds == "values":
                raise SpaceError(
                    f"parameter {segment.name} is quantised and cannot be trained as a whole: leave it out, or train a "
                    "sparse mask or an adapter"
                )
            bound = segment.indices is None and space.kind == "full" and parameter.dtype == torch.bfloat16
            dtype = compute_dtype if bound or quantised else parameter.dtype
            slots.append(Slot(module, name, segment, parameter, dtype))
    return slots


def _forwards(model: nn.Module, slots: Sequence[Slot], state: _State) -> dict[nn.Module, Forward]:
    """The modules whose forward is replaced, and by what."""
    own = readers(model, slots)
    found = {
        module: forward_of(module, own[module], state) if module in own else frozen_forward(module)
        for module in model.modules()
    }
    return {module: forward for module, forward in found.items() if forward is not None}


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
