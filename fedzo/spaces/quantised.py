"""Spaces over what a quantised base is stored as: its scales (QZO) or its codes (QuZO).

A quantised weight is scale times unit: nf4 and fp4 have a scale for each block of 64 weights, int8 one for each row,
whose codes in [-127, 127] count in steps of scale / 127. theta0 is what quantising gave, so all parties need the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedzo.errors import SpaceError
from fedzo.spaces.space import Held, Part, Segment, TrainableSpace, build, chosen, scales_of, shape_of

LARGEST = 127  # code of an int8 weight


def scales(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), dense: Sequence[str] = ()
) -> TrainableSpace:
    """The float32 scales of the quantised weights that the patterns select, and the whole parameters in ``dense``.

    QZO, arXiv 2505.13430: the codes stay, theta + a z is a forward with other scales.

    Raises:
        SpaceError: no weight that matches is quantised, or its scales are quantised too.
    """
    return _over(model, "scales", include, exclude, dense)


def codes(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), dense: Sequence[str] = ()
) -> TrainableSpace:
    """The codes of the int8 weights that the patterns select, as float32, and the whole parameters in ``dense``.

    QuZO, arXiv 2502.12346: the scales stay; theta and its perturbations are whole numbers in [-127, 127].

    Raises:
        SpaceError: no weight that matches is quantised, or one is not to int8.
    """
    return _over(model, "codes", include, exclude, dense)


def steps_of(parameter: Tensor) -> Tensor:
    """[rows] float32: what one code of an int8 parameter is worth in each row."""
    found = scales_of(parameter)
    assert found is not None
    return found / 127.0


def _over(
    model: nn.Module, kind: Held, include: Sequence[str], exclude: Sequence[str], dense: Sequence[str]
) -> TrainableSpace:
    present = dict(model.named_parameters())
    held = {name: p for name, p in chosen(model, include, exclude).items() if not p.is_floating_point()}
    if not held:
        raise SpaceError(
            f'space.kind = "{kind}" trains quantised weights, but none that matches include={list(include)} '
            f"exclude={list(exclude)} is quantised: set model.quantisation to {_WANTED[kind]}, or choose another space"
        )
    shapes = {name: _shape(name, parameter, kind) for name, parameter in held.items()}
    parts: list[Part] = [(name, shape, None, None) for name, shape in shapes.items()]
    parts += [(name, tuple(present[name].shape), None, None) for name in dense]
    base = build(kind, parts)
    digest = hashlib.sha256(base.hash.encode())

    def segment(of: Segment) -> Segment:
        if of.name not in held:
            return of
        parameter = held[of.name]
        steps = steps_of(parameter).cpu() if kind == "codes" else None
        digest.update(f"\n{of.name} {kind} {quantisation_of(parameter)}".encode())
        if steps is not None:
            digest.update(steps.numpy().astype("<f4").tobytes())
        return replace(of, holds=kind, steps=steps)

    segments = tuple(segment(of) for of in base.segments)
    return replace(base, segments=segments, hash=digest.hexdigest())


_WANTED = {"scales": "nf4, fp4 or int8", "codes": "int8"}


def quantisation_of(parameter: Tensor) -> str:
    """ "nf4", "fp4" or "int8"."""
    packed = getattr(parameter, "quant_state", None)
    return "int8" if packed is None else str(packed.quant_type)


def _shape(name: str, parameter: Tensor, kind: Held) -> tuple[int, ...]:
    if kind == "codes":
        if parameter.dtype != torch.int8:
            raise SpaceError(
                f"parameter {name} is quantised to {quantisation_of(parameter)}, whose codes are no numbers to step "
                'by: space.kind = "codes" needs model.quantisation = "int8"'
            )
        return shape_of(parameter)
    found = scales_of(parameter)
    if found is None:
        raise SpaceError(f"the scales of parameter {name} are quantised too: quantise the model with double=False")
    return tuple(found.shape)
