"""Sparse spaces: the entries that a mask names, and the masks that need nothing but the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedzo.errors import SpaceError
from fedzo.spaces.mask import Mask, MaskEntry
from fedzo.spaces.selection import CHUNK, Indices, Selection, draw
from fedzo.spaces.space import Part, TrainableSpace, build, matching

DRAWN = ("random", "magnitude")


def draw_mask(
    model: nn.Module,
    density: float,
    method: str,
    fingerprint: str,
    *,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    per_tensor: bool = False,
) -> Mask:
    """A share ``density`` of all entries of the matching parameters that have two or more dimensions.

    ``magnitude`` takes the largest absolute values over all those parameters together, or in each of them
    (``per_tensor``), ties by (name, index); ``random`` draws without replacement, as a pure function of the seed and
    the sizes.

    Raises:
        SpaceError: density is not in (0, 1], the method is another, or a pattern matches nothing.
    """
    if method not in DRAWN:
        raise SpaceError(
            f"unknown mask method {method!r} for a mask from weights alone; known: {', '.join(DRAWN)} "
            "(sensitive and forward need calibration data)"
        )
    parameters = candidates(model, include, exclude)
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    settings: dict[str, Any] = {"density": density, "include": list(include), "exclude": list(exclude)}
    settings["per_tensor"] = per_tensor
    if method == "random":
        return gather(
            parameters, draw(sizes, density, seed, per_tensor), fingerprint, method, {**settings, "seed": seed}
        )
    selection = Selection(sizes, density, per_tensor)
    for name, parameter in parameters.items():
        flat = parameter.detach().reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            selection.add(name, flat[start : start + CHUNK].float().abs(), start)
    return gather(parameters, selection.chosen(), fingerprint, method, settings)


def sparse(model: nn.Module, mask: Mask, dense: Sequence[str] = ()) -> TrainableSpace:
    """The mask's entries, and as a whole the parameters named in ``dense`` (a new head, say).

    Raises:
        SpaceError: the model lacks a parameter or has it in another shape, or the mask covers one of ``dense``.
    """
    present = dict(model.named_parameters())
    masked = {entry.name for entry in mask.entries}
    for name in dense:
        if name not in present or name in masked:
            state = "this model does not have" if name not in present else "the mask covers in part"
            raise SpaceError(f"dense names parameter {name}, which {state}")
    parts: list[Part] = [(name, tuple(present[name].shape), None, None) for name in dense]
    parts += [(e.name, e.shape, e.indices, e.values) for e in mask.entries if e.indices.numel()]
    space = build("sparse", parts)
    space.parameters(model)
    return space


def candidates(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters a mask can be over, by name: those that match and have two or more dimensions.

    Raises:
        SpaceError: there is none.
    """
    chosen = matching(model, include, exclude)
    present = dict(model.named_parameters())
    matrices = {name: present[name] for name in sorted(chosen) if len(chosen[name]) >= 2 and present[name].numel()}
    if not matrices:
        raise SpaceError(f"no matrix matches include={list(include)} exclude={list(exclude)}: a mask needs one")
    return matrices


def gather(
    parameters: Mapping[str, Tensor],
    chosen: Mapping[str, Indices],
    fingerprint: str,
    method: str,
    settings: Mapping[str, Any],
) -> Mask:
    """The mask of the chosen entries with their present values."""

    def entry(name: str) -> MaskEntry:
        flat, indices = parameters[name].detach().reshape(-1), torch.from_numpy(chosen[name])
        return MaskEntry(name, tuple(parameters[name].shape), indices, flat[indices.to(flat.device)].float().cpu())

    return Mask(fingerprint, method, settings, tuple(entry(name) for name in sorted(chosen)))
