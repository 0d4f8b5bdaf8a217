"""How one module computes at several points of parameter space in one forward.

Its rows are those of the first point, then those of the second, and so on. What is frozen is computed once for all of
them, what is trainable for each point with its own values; a module sees nothing of this.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedzo.errors import SpaceError
from fedzo.evaluation.products import SparsePattern, add_sparse, linear
from fedzo.spaces import Segment

# Rows of a matrix with more entries than this are perturbed and multiplied in blocks, which bounds the scratch.
BLOCK = 2**22
# A mask with more than this part of a matrix's entries is written into a copy of the matrix instead of added sparsely.
DENSE = 0.02


class UnpairableError(Exception):
    """A layer cannot compute several points in one forward; the text says which and why."""


class Values(Protocol):
    """theta + a z at the points of the present forward."""

    @property
    def points(self) -> int: ...

    @property
    def rows(self) -> int:
        """Rows of the model's input that belong to one point."""
        ...

    def dense(self, point: int, offset: int, size: int) -> Tensor:
        """[size] float32 entries of theta + a z; not to be written to."""
        ...

    def sparse(self, point: int, slot: "Slot") -> Tensor:
        """[slot.segment.size] float32: theta + a z, less what the stored weight holds at these entries."""
        ...

    def only(self, point: int) -> Any:
        """A context in which there is this point alone."""
        ...


@dataclass(frozen=True)
class Slot:
    """One trainable parameter in the module that owns it."""

    owner: nn.Module
    name: str
    segment: Segment
    parameter: nn.Parameter
    dtype: torch.dtype  # that the layer computes in

    def put(self, value: Tensor) -> None:
        self.owner._parameters[self.name] = value  # type: ignore[assignment]

    def restore(self) -> None:
        self.owner._parameters[self.name] = self.parameter


Forward = Callable[..., Any]


def readers(model: nn.Module, slots: Sequence[Slot]) -> dict[nn.Module, list[Slot]]:
    """The modules that read trainable parameters, with those of each, in the order of the model.

    A parameter in a container (a ParameterDict, say) belongs to the module around it, which is the one that reads it.
    """
    around: dict[str, nn.Module] = {}
    by_owner: dict[nn.Module, list[Slot]] = {}
    for slot in slots:
        by_owner.setdefault(slot.owner, []).append(slot)
    found: dict[nn.Module, list[Slot]] = {}
    for name, module in model.named_modules():
        container = isinstance(module, nn.ParameterDict | nn.ParameterList | nn.ModuleDict | nn.ModuleList)
        around[name] = around[name.rpartition(".")[0]] if container and name else module
        if module in by_owner:
            found.setdefault(around[name], []).extend(by_owner[module])
    return found


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within it the modules compute by these; afterwards they are as they were."""
    held = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in held.items():
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


@contextmanager
def placed(slots: Sequence[Slot], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it these tensors, by segment name, stand in the place of parameters; afterwards all slots have theirs."""
    try:
        for slot in slots:
            if slot.segment.name in values:
                slot.put(values[slot.segment.name])
        yield
    finally:
        for slot in slots:
            slot.restore()


def nowhere(slots: Sequence[Slot]) -> dict[str, Tensor]:
    """NaN in the place of every parameter by segment name, but for quantised ones, which are no numbers."""
    return {
        slot.segment.name: torch.full((), math.nan, device=slot.parameter.device, dtype=slot.dtype).expand(
            slot.segment.shape
        )
        for slot in slots
        if not hasattr(slot.owner, "dequantised")
    }


def everywhere(slots: Sequence[Slot], values: Values) -> dict[str, Tensor]:
    """Every parameter's values at the first point, by segment name."""
    one_each = {slot.segment.name: slot for slot in slots}
    return {name: whole_parameter(slot, values, 0) for name, slot in one_each.items()}


def forward_of(module: nn.Module, slots: Sequence[Slot], values: Values) -> Forward:
    """What stands in for the module's forward; without slots the module is frozen."""
    plain = "forward" not in module.__dict__
    inner: Forward = (frozen_forward(module) if plain else None) or module.forward
    by_name = {slot.name: slot for slot in slots if slot.owner is module}
    only_weight = set(by_name) == {"weight"} and len(slots) == 1
    if any(slot.segment.holds != "values" for slot in slots):
        if plain and only_weight and hasattr(module, "dequantised"):
            return QuantisedLinear(module, by_name["weight"], values)
        raise SpaceError(
            f"{type(module).__name__} reads the quantised weight {slots[0].segment.name} in a way of its own, so that "
            "its scales and codes cannot be trained: leave it out by space.exclude"
        )
    if plain and only_weight and by_name["weight"].segment.indices is not None:
        slot = by_name["weight"]
        if _is_linear(module) or hasattr(module, "dequantised"):
            return SparseLinear(module, slot, values)
        if _is_conv1d(module):
            return SparseLinear(module, slot, values, transposed=True)
        if _is_embedding(module):
            return SparseEmbedding(module, slot, values)
    dense = all(slot.segment.indices is None for slot in slots)
    if plain and dense and slots and len(by_name) == len(slots):
        if _is_linear(module) and set(by_name) <= {"weight", "bias"}:
            return DenseLinear(module, by_name, values)
        if _is_embedding(module) and only_weight:
            return DenseEmbedding(module, by_name["weight"], values)
    return Split(module, slots, values, inner)


def frozen_forward(module: nn.Module) -> Forward | None:
    """What stands in for the forward of a module without trainable parameters; None: its own."""
    if "forward" in module.__dict__:
        return None
    if _is_conv1d(module):
        return lambda x: linear(x, own(module, "weight").t(), own(module, "bias"))
    if _is_linear(module) or hasattr(module, "dequantised"):
        return lambda input: frozen_product(input, module)
    return None


def own(module: nn.Module, name: str) -> Any:
    """The parameter that stands in the module under a name: a tensor, or None."""
    return module._parameters[name]


def frozen_weight(module: nn.Module) -> Tensor:
    """[out, in] in the layer's compute dtype."""
    dequantised = getattr(module, "dequantised", None)
    weight: Tensor = own(module, "weight") if dequantised is None else dequantised()
    return weight


def frozen_product(x: Tensor, module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """x times the module's frozen weight (or another one in its place), plus its bias, in x's dtype."""
    weight = frozen_weight(module) if weight is None else weight
    bias = own(module, "bias")
    if not hasattr(module, "dequantised"):
        return linear(x, weight, bias)
    return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and "weight" in module._parameters and "bias" in module._parameters


def _is_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None


@dataclass(frozen=True)
class Split:
    """Any module: computed for one point after the other, with its parameters at that point."""

    module: nn.Module
    slots: Sequence[Slot]
    values: Values
    inner: Forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        points = self.values.points
        if points == 1:
            return self._at(0, args, kwargs)
        heights = {len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()}
        if not heights:
            raise UnpairableError(f"{type(self.module).__name__} is given no rows")
        outputs = []
        for point in range(points):
            chosen = [self._part(value, point) for value in args]
            named = {key: self._part(value, point) for key, value in kwargs.items()}
            outputs.append(self._at(point, chosen, named))
        return self._join(outputs, self.values.rows if heights == {1} else 0)

    def _part(self, value: Any, point: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._part(item, point) for item in value)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return part(self.module, value, point, self.values.points)

    def _at(self, point: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        held = [slot.owner._parameters[slot.name] for slot in self.slots]
        keep = []
        try:
            for slot in self.slots:
                keep.append(whole_parameter(slot, self.values, point))
                slot.put(keep[-1])
            with self.values.only(point):
                output = self.inner(*args, **kwargs)
        finally:
            for slot, value in zip(self.slots, held, strict=True):
                slot.owner._parameters[slot.name] = value
        return _detached(output, {value.untyped_storage().data_ptr() for value in keep})

    def _join(self, outputs: list[Any], rows: int) -> Any:
        first = outputs[0]
        if isinstance(first, Tensor):
            return join(outputs, rows)
        if first is None:
            return None
        if type(first) in (tuple, list):
            return type(first)(self._join([output[i] for output in outputs], rows) for i in range(len(first)))
        raise UnpairableError(
            f"{type(self.module).__name__} returns {type(first).__name__}, which cannot be put together"
        )


@dataclass(frozen=True)
class DenseLinear:
    """nn.Linear whose weight, bias or both are trainable."""

    module: nn.Module
    slots: dict[str, Slot]
    values: Values

    def __call__(self, input: Tensor) -> Tensor:
        return each_point(self.module, self.values, input, self._at)

    def _at(self, point: int, x: Tensor) -> Tensor:
        bias_slot, slot = self.slots.get("bias"), self.slots.get("weight")
        bias = own(self.module, "bias") if bias_slot is None else whole_parameter(bias_slot, self.values, point)
        if slot is None:
            return linear(x, own(self.module, "weight"), bias)
        out, width = slot.segment.shape
        step = max(1, BLOCK // width)
        blocks = []
        for start in range(0, out, step):
            stop = min(out, start + step)
            block = self.values.dense(point, slot.segment.offset + start * width, (stop - start) * width)
            at = bias if bias is None or step >= out else bias[start:stop]
            blocks.append(linear(x, block.view(stop - start, width).to(slot.dtype), at))
            del block  # before the next one is made
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)


@dataclass(frozen=True)
class DenseEmbedding:
    """nn.Embedding with a trainable table, of which only the rows that are looked up are computed."""

    module: nn.Module
    slot: Slot
    values: Values

    def __call__(self, input: Tensor) -> Tensor:
        return each_point(self.module, self.values, input, self._at)

    def _at(self, point: int, ids: Tensor) -> Tensor:
        segment = self.slot.segment
        height, width = segment.shape
        rows, which = torch.unique(ids, return_inverse=True)
        # A row costs a call, some 10 us, in which about 10^4 entries could be perturbed in one go.
        if rows.numel() * (width + 10_000) > height * width:
            table = self.values.dense(point, segment.offset, segment.size).view(height, width)
            return functional.embedding(ids, table).to(self.slot.dtype)
        found = torch.empty(len(rows), width, device=ids.device)
        for place, row in enumerate(rows.tolist()):
            found[place] = self.values.dense(point, segment.offset + row * width, width)
        return functional.embedding(which, found).to(self.slot.dtype)


class SparseLinear:
    """A frozen product with few trainable entries: y = x W^T + x D^T, D the sparse difference to what W holds."""

    def __init__(self, module: nn.Module, slot: Slot, values: Values, transposed: bool = False) -> None:
        self.module, self.slot, self.values, self.transposed = module, slot, values, transposed
        indices = slot.segment.indices
        assert indices is not None
        device = slot.parameter.device
        shape = (slot.segment.shape[0], slot.segment.shape[1])
        self.thick = len(indices) > DENSE * shape[0] * shape[1]
        pattern, order = SparsePattern.of(indices, shape, transposed)
        self.order = None if order is None else order.to(device)
        self.pattern = SparsePattern(
            pattern.shape, pattern.rows.to(device), pattern.starts.to(device), pattern.columns.to(device)
        )

    def __call__(self, input: Tensor) -> Tensor:
        points = self.values.points
        if self.thick or (points > 1 and len(input) == 1):
            return each_point(self.module, self.values, input, self._written if self.thick else self._beside)
        y = self._frozen(input)
        for k in range(points):
            self._add(k, part(self.module, y, k, points), part(self.module, input, k, points))
        return y

    def _add(self, point: int, y: Tensor, x: Tensor) -> None:
        values = self.values.sparse(point, self.slot)
        values = values if self.order is None else values[self.order]
        add_sparse(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.pattern, values)

    def _beside(self, point: int, x: Tensor) -> Tensor:
        y = self._frozen(x)
        self._add(point, y, x)
        return y

    def _frozen(self, x: Tensor) -> Tensor:
        if self.transposed:
            return linear(x, self.slot.parameter.t(), own(self.module, "bias"))
        return frozen_product(x, self.module, None if hasattr(self.module, "dequantised") else self.slot.parameter)

    def _written(self, point: int, x: Tensor) -> Tensor:
        whole = whole_parameter(self.slot, self.values, point)
        return frozen_product(x, self.module, whole.t() if self.transposed else whole)


@dataclass(frozen=True)
class QuantisedLinear:
    """A quantised linear layer whose scales (QZO) or codes (QuZO) are trainable: dequantised anew at each point."""

    module: nn.Module
    slot: Slot
    values: Values

    def __call__(self, input: Tensor) -> Tensor:
        layer: Any = self.module
        segment = self.slot.segment
        units = layer.units() if segment.holds == "scales" else None

        def at(point: int, x: Tensor) -> Tensor:
            held = self.values.dense(point, segment.offset, segment.size)
            weight = layer.at_codes(held.view(segment.shape)) if units is None else layer.at_scales(units, held)
            return frozen_product(x, self.module, weight)

        return each_point(self.module, self.values, input, at)


class SparseEmbedding:
    """nn.Embedding with few trainable entries: the rows that are looked up are copied and their entries written."""

    def __init__(self, module: nn.Module, slot: Slot, values: Values) -> None:
        self.module, self.slot, self.values = module, slot, values
        indices = slot.segment.indices
        assert indices is not None
        width = slot.segment.shape[1]
        device = slot.parameter.device
        self.rows, self.columns = (indices // width).to(device), (indices % width).to(device)

    def __call__(self, input: Tensor) -> Tensor:
        return each_point(self.module, self.values, input, self._at)

    def _at(self, point: int, ids: Tensor) -> Tensor:
        rows, which = torch.unique(ids, return_inverse=True)
        table = self.slot.parameter.detach()[rows]
        place = torch.full((self.slot.segment.shape[0],), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        hit = torch.nonzero(place[self.rows] >= 0)[:, 0]
        difference = self.values.sparse(point, self.slot)[hit].to(table.dtype)
        table.index_put_((place[self.rows[hit]], self.columns[hit]), difference, accumulate=True)
        return functional.embedding(which, table)


def each_point(module: nn.Module, values: Values, input: Tensor, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The outputs of ``compute(point, its rows of the input)``, one point's below the other's."""
    points = values.points
    outputs = [compute(point, part(module, input, point, points)) for point in range(points)]
    return join(outputs, values.rows if len(input) == 1 else 0)


def part(module: nn.Module, value: Tensor, point: int, points: int) -> Tensor:
    """A point's rows of a tensor; one that has a single row serves all points."""
    height = value.shape[0]
    if points == 1 or height == 1:
        return value
    if height % points:
        raise UnpairableError(
            f"{type(module).__name__} is given {height} rows for {points} points, so rows were regrouped before it"
        )
    size = height // points
    return value[point * size : (point + 1) * size]


def join(outputs: list[Tensor], rows: int) -> Tensor:
    """The points' outputs one below the other; with `rows`, what was computed on one shared row as often as that."""
    if len(outputs) == 1:
        return outputs[0]
    if rows:
        outputs = [output.expand(rows, *output.shape[1:]) for output in outputs]
    return torch.cat(outputs)


def whole_parameter(slot: Slot, values: Values, point: int) -> Tensor:
    """A parameter's values at a point, in its own shape."""
    segment = slot.segment
    if segment.indices is None:
        found = values.dense(point, segment.offset, segment.size)
        return found.view(segment.shape).to(slot.dtype)
    stored = frozen_weight(slot.owner) if hasattr(slot.owner, "dequantised") else slot.parameter.detach().clone()
    indices = segment.indices.to(stored.device)
    stored.view(-1).index_add_(0, indices, values.sparse(point, slot).to(stored.dtype))
    return stored


def _detached(output: Any, storages: set[int]) -> Any:
    """The output with every tensor that lives in one of the storages copied out of it."""
    if isinstance(output, Tensor):
        return output.clone() if output.untyped_storage().data_ptr() in storages else output
    if isinstance(output, tuple | list):
        fresh = [_detached(item, storages) for item in output]
        if all(new is old for new, old in zip(fresh, output, strict=True)):
            return output
        return type(output)(*fresh) if hasattr(output, "_fields") else type(output)(fresh)
    if isinstance(output, dict):
        for key, item in output.items():
            output[key] = _detached(item, storages)
    return output
