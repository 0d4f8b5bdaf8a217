"""What is trainable and in which order: names, shapes and places in the flat vector theta."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from fedzo.errors import SpaceError
from fedzo.runtime import release_memory

# Entries of replaced parameters after which their memory goes back to the system.
_RELEASE = 2**22

Part = tuple[str, tuple[int, ...], Tensor | None, Tensor | None]
Held = Literal["values", "scales", "codes"]


@dataclass(frozen=True)
class Segment:
    """One parameter's part of theta.

    Attributes:
        name: the parameter's name in ``model.named_parameters()``; a tied parameter has one segment.
        shape: the parameter's shape; of scales (number of scales,).
        offset: index in theta of the segment's first entry.
        size: number of entries of theta that belong to it.
        indices: [size] int64, sorted flat indices of the trainable entries; None when all are.
        values: [size] float32 on CPU, the initial values of a masked segment; None: those that the model holds.
        holds: what theta holds of the parameter: its values or, of a quantised one, its scales or its codes.
        steps: [rows] float32 on CPU, what one code is worth in each row; None unless theta holds codes.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    indices: Tensor | None = field(default=None, compare=False)
    values: Tensor | None = field(default=None, compare=False)
    holds: Held = "values"
    steps: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TrainableSpace:
    """An ordered set of trainable entries of a model; theta is their flat vector of ``size`` entries.

    theta is float32; a full space's may be bfloat16.

    ``hash`` is a SHA-256 over names, shapes and indices: equal spaces have equal hashes however they were built.
    """

    kind: str
    segments: tuple[Segment, ...]
    size: int
    hash: str

    def theta0(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """The initial values, of a mask where it has some, else the model's: new, [size], on the model's device."""
        parameters = self.parameters(model)

        def initial(segment: Segment) -> Tensor:
            parameter = parameters[segment.name]
            values = _gather(parameter, segment) if segment.values is None else segment.values.to(parameter.device)
            return values.to(dtype)

        return torch.cat([initial(segment) for segment in self.segments])

    def read(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """The model's present values: new, [size], on the model's device.

        Raises:
            SpaceError: a parameter is quantised.
        """
        parameters = self.parameters(model)
        return torch.cat([_gather(parameters[segment.name], segment).to(dtype) for segment in self.segments])

    def write(self, model: nn.Module, theta: Tensor) -> None:
        """Write theta into the model's parameters for good.

        Raises:
            SpaceError: a parameter is quantised; no parameter has changed then.
        """
        self.check(theta)
        parameters = self.parameters(model)
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise SpaceError(
                    f"parameter {name} is quantised ({parameter.dtype}), and theta is never merged into quantised "
                    'weights: load the model with quantisation = "none" to write theta into it'
                )
        with torch.no_grad():
            for segment in self.segments:
                parameter = parameters[segment.name]
                values = theta[segment.offset : segment.offset + segment.size].to(parameter.device, parameter.dtype)
                if segment.indices is None:
                    parameter.copy_(values.view(segment.shape))
                else:
                    flat = parameter.detach().reshape(-1)
                    parameter.copy_(flat.index_copy(0, segment.indices.to(flat.device), values).view(segment.shape))

    def bind(self, model: nn.Module, theta: Tensor) -> None:
        """Make the model's dense parameters of theta's dtype and device views of theta, which saves one copy in memory.

        Afterwards the parameters follow theta; sparse segments keep a storage of their own.
        """
        self.check(theta)
        parameters = self.parameters(model)
        for segment in self.segments:
            parameter = parameters[segment.name]
            if segment.indices is None and parameter.dtype == theta.dtype and parameter.device == theta.device:
                parameter.data = _view(theta, segment)

    def adopt(self, model: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        """Make theta the model's own weights: theta0 in dtype, of which the parameters become views, one after another.

        At no time is there a second copy of more than one parameter. The parameters take dtype and device (None: as
        they are) over; other parameters stay as and where they are.

        Raises:
            SpaceError: a segment is sparse.
        """
        parameters = self.parameters(model)
        device = next(iter(parameters.values())).device if device is None else torch.device(device)
        for segment in self.segments:
            if segment.indices is not None:
                raise SpaceError(f"parameter {segment.name} is trained in part and cannot become a view of theta")
        theta = torch.empty(self.size, dtype=dtype, device=device)
        freed = 0
        for segment in self.segments:
            view = _view(theta, segment)
            view.copy_(parameters[segment.name].detach())
            parameters[segment.name].data = view
            freed += segment.size
            if freed >= _RELEASE:
                release_memory()
                freed = 0
        release_memory()
        return theta

    def bound(self, model: nn.Module) -> Tensor | None:
        """theta when the parameters are views of it, one behind the other, as `bind` and `adopt` leave them."""
        parameters = self.parameters(model)
        first = parameters[self.segments[0].name]
        size = first.element_size()
        for segment in self.segments:
            found = parameters[segment.name]
            place = first.data_ptr() + segment.offset * size
            if segment.indices is not None or found.data_ptr() != place or found.dtype != first.dtype:
                return None
        storage = first.untyped_storage()
        if storage.data_ptr() != first.data_ptr() or storage.nbytes() != self.size * size:
            return None
        return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, 0, (self.size,), (1,))

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters by segment name.

        Raises:
            SpaceError: a parameter is missing or has another shape: the space belongs to another model.
        """
        present = dict(model.named_parameters())
        for segment in self.segments:
            found = present.get(segment.name)
            shape = None if found is None else _shape_of(found, segment.holds)
            if shape != segment.shape:
                what = "parameter" if segment.holds == "values" else f"{segment.holds} of parameter"
                state = "is missing" if shape is None else f"has shape {shape}"
                raise SpaceError(
                    f"the space needs {what} {segment.name} of shape {segment.shape}, which {state} in this model: "
                    "build the space on the model it is used with"
                )
        return {segment.name: present[segment.name] for segment in self.segments}

    def check(self, theta: Tensor) -> None:
        """Raise SpaceError unless theta is a contiguous vector of this space's size, float32 or (if full) bfloat16."""
        dtypes = (torch.bfloat16, torch.float32) if self.kind == "full" else (torch.float32,)
        if theta.shape != (self.size,) or theta.dtype not in dtypes or not theta.is_contiguous():
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise SpaceError(
                f"theta has shape {tuple(theta.shape)} and dtype {theta.dtype}; "
                f"this space wants a contiguous {wanted} vector of {self.size} entries"
            )


def full(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> TrainableSpace:
    """All parameters whose name matches a pattern of ``include`` and none of ``exclude`` (fnmatch).

    A tied parameter counts once; each of its names can match.

    Raises:
        SpaceError: no parameter matches, or a parameter is not of a floating type.
    """
    return build("full", [(name, shape, None, None) for name, shape in matching(model, include, exclude).items()])


def adapter(model: nn.Module) -> TrainableSpace:
    """What PEFT left trainable: every parameter with ``requires_grad``.

    Raises:
        SpaceError: nothing or everything is trainable, so that no adapter is there.
    """
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if len(trainable) in (0, len(dict(model.named_parameters()))):
        raise SpaceError("the model has no adapter: add one first (lora, ia3, prefix or prompt)")
    return build("adapter", [(name, shape, None, None) for name, shape in trainable.items()])


def build(kind: str, parts: Iterable[Part]) -> TrainableSpace:
    """The space of (name, shape, sorted flat indices or None, their initial values or None), in the order of names."""
    segments: list[Segment] = []
    digest = hashlib.sha256()
    offset = 0
    for name, shape, indices, values in sorted(parts, key=lambda part: part[0]):
        size = math.prod(shape) if indices is None else indices.numel()
        segments.append(Segment(name, shape, offset, size, indices, values))
        digest.update(f"{name}\n{','.join(map(str, shape))}\n{'dense' if indices is None else size}\n".encode())
        if indices is not None:
            digest.update(indices.cpu().numpy().astype("<i8").tobytes())
        offset += size
    return TrainableSpace(kind, tuple(segments), offset, digest.hexdigest())


def chosen(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that the patterns select, by name; SpaceError when there is none."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)

    def wanted(names: list[str]) -> bool:
        def hit(patterns: Sequence[str]) -> bool:
            return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

        return hit(include) and not hit(exclude)

    found = {name: p for name, p in model.named_parameters() if wanted(aliases[id(p)])}
    if not found:
        example = next((name for name, _ in model.named_parameters()), "none")
        raise SpaceError(
            f"no parameter matches include={list(include)} exclude={list(exclude)}; a name in this model: {example}"
        )
    return found


def matching(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters that the patterns select; SpaceError when there is none or one is quantised."""
    found = chosen(model, include, exclude)
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise SpaceError(
                f"parameter {name} is quantised ({parameter.dtype}) and cannot be trained as a whole: exclude it, use "
                "a sparse mask or an adapter, or set model.quantisation to none"
            )
    return {name: tuple(p.shape) for name, p in found.items()}


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter; of a 4-bit one that of the weight which it packs."""
    packed = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if packed is None else packed.shape)


def scales_of(parameter: Tensor) -> Tensor | None:
    """A quantised parameter's scales, float32 [blocks] of nf4 and fp4, [rows] of int8; None: it has none in float32."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return None if packed.nested else packed.absmax
    scales: Tensor | None = getattr(parameter, "SCB", None)
    return scales


def _shape_of(parameter: Tensor, holds: Held) -> tuple[int, ...] | None:
    """The shape of what a segment holds of a parameter; None: the parameter has no scales or codes."""
    if holds == "scales":
        scales = scales_of(parameter)
        return None if scales is None else tuple(scales.shape)
    return shape_of(parameter) if holds == "values" or parameter.dtype == torch.int8 else None


def _view(theta: Tensor, segment: Segment) -> Tensor:
    return theta[segment.offset : segment.offset + segment.size].view(segment.shape)


def _gather(parameter: Tensor, segment: Segment) -> Tensor:
    if segment.holds == "scales":
        scales = scales_of(parameter)
        assert scales is not None  # `parameters` has checked it
        return scales
    if segment.holds == "codes":
        return parameter.detach().reshape(-1)
    if not parameter.is_floating_point():
        raise SpaceError(
            f"parameter {segment.name} is quantised ({parameter.dtype}) and does not hold its values any more: "
            'take them from a mask, or load the model with quantisation = "none"'
        )
    flat = parameter.detach().reshape(-1)
    return flat if segment.indices is None else flat[segment.indices.to(flat.device)]
