"""Directions: the vector z of a 64-bit seed, and sums of such vectors, bit for bit the same on every device.

Element i of a direction depends on the seed, the family and i alone (Philox4x32-10, see ``philox``):

- ``rademacher``: z_i = +1 if the bit is set, else -1; block i // 128, word (i % 128) // 32, bit i % 32.
- ``gaussian``: z_i = table[16 bits] (see ``normal``); block i // 8, word (i % 8) // 2, low half for even i.

Tensors are 1-D, contiguous and float32 (of ``replay_rounded`` bfloat16); ``offset`` is the index of their first element
in the direction, so that a part of a vector can be treated alone. A step theta + c z is rounded to float32 after the
product and again after the sum; c itself is rounded to float32 first. CPU tensors go through ``numba_cpu``, CUDA
tensors through ``triton_cuda``, others, and those whose compiler is missing, through ``reference``: the same bits.

All functions raise ConfigError for an unknown family or a seed outside [0, 2**64), DivergedError for a coefficient that
is not finite in float32, and ValueError for tensors, arrays or offsets of the wrong kind.
"""

import math
import warnings
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions import reference
from fedzo.directions.philox import check_seed
from fedzo.errors import ConfigError, DivergedError

__all__ = ["FAMILIES", "axpy", "fill", "replay", "replay_rounded", "round_stochastically"]

FAMILIES: tuple[str, ...] = ("rademacher", "gaussian")
MAX_OFFSET = 2**62


def fill(out: Tensor, seed: int, family: str, *, offset: int = 0) -> Tensor:
    """Write z[offset : offset + len(out)] into ``out`` [n] and return it."""
    _check_family(family)
    _check_vector("out", out, offset)
    _implementation(out).fill(out, check_seed(seed), family, offset=offset)
    return out


def axpy(
    theta: Tensor, seed: int, coefficient: float, family: str, *, offset: int = 0, out: Tensor | None = None
) -> Tensor:
    """Write fl32(theta + fl32(c z[offset : offset + n])) into ``out`` and return it.

    Args:
        theta: [n]; changed in place if out is None.
        coefficient: c; negate it to subtract.
        out: [n], on theta's device; theta itself, or memory that does not overlap theta's.
    """
    _check_family(family)
    _check_vector("theta", theta, offset)
    c = finite_coefficient(coefficient)
    if out is not None:
        _check_vector("out", out, offset)
        _check_pair(theta, out)
        if out.data_ptr() == theta.data_ptr():
            _implementation(theta).axpy(theta, check_seed(seed), c, family, offset=offset)
            return out
    _implementation(theta).axpy(theta, check_seed(seed), c, family, offset=offset, out=out)
    return theta if out is None else out


def replay(
    theta: Tensor,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    family: str,
    *,
    offset: int = 0,
) -> Tensor:
    """Apply records to theta [n] in place, in their order and in one pass over memory; return theta.

    The result is that of ``axpy(theta, seeds[r], coefficients[r], family)`` for r = 0 ... R - 1, bit for bit.

    Args:
        seeds: [R] uint64.
        coefficients: [R] float32.
    """
    _check_family(family)
    _check_vector("theta", theta, offset)
    _check_records(seeds, coefficients, 1)
    records = np.ascontiguousarray(seeds), np.ascontiguousarray(coefficients)
    _implementation(theta).replay(theta, *records, family, offset=offset)
    return theta


def replay_rounded(
    theta: Tensor,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    family: str,
    rounding: npt.NDArray[np.uint64],
    *,
    offset: int = 0,
) -> Tensor:
    """Apply steps of records to a bfloat16 theta [n] in place, in one pass over memory; return theta.

    A step adds its R records to theta's values in float32, as ``replay`` does, and rounds the sums to bfloat16
    stochastically (Gupta et al., arXiv 1502.02551): away from zero with the probability that the part cut off has of
    the gap, so that the mean over streams is the sum itself. Element i takes 16 bits of the Philox stream
    ``rounding[s]``, those by which a Gaussian direction looks up its element i; they are added to the bits of the
    float32 value, whose low half is then cut. A NaN becomes the bfloat16 NaN 0x7FC0, an infinity stays, the largest
    finite values may become one.

    Args:
        theta: [n] bfloat16, contiguous.
        seeds: [S, R] uint64.
        coefficients: [S, R] float32.
        rounding: [S] uint64, the seed of each step's stream of random bits.
    """
    _check_family(family)
    _check_vector("theta", theta, offset, torch.bfloat16)
    _check_records(seeds, coefficients, 2)
    if rounding.dtype != np.uint64 or rounding.shape != seeds.shape[:1]:
        raise ValueError(
            f"rounding is {rounding.dtype} of shape {rounding.shape}, but must be uint64 of shape {seeds.shape[:1]}"
        )
    steps = np.ascontiguousarray(seeds), np.ascontiguousarray(coefficients)
    _implementation(theta).replay_rounded(theta, *steps, family, np.ascontiguousarray(rounding), offset=offset)
    return theta


def round_stochastically(values: Tensor, seed: int, *, offset: int = 0) -> Tensor:
    """Round finite values [n] below 2**24 to whole numbers in place; return them.

    Away from zero with the probability that the part behind the point is, to 2**-32, so that the mean over seeds is the
    value itself, and minus x becomes minus what x becomes. Element i takes word offset + i of the Philox stream.
    """
    _check_vector("values", values, offset)
    _implementation(values).round_stochastically(values, check_seed(seed), offset=offset)
    return values


def _check_records(seeds: npt.NDArray[np.uint64], coefficients: npt.NDArray[np.float32], ndim: int) -> None:
    if seeds.dtype != np.uint64 or coefficients.dtype != np.float32:
        raise ValueError(
            f"seeds and coefficients are {seeds.dtype} and {coefficients.dtype}, but must be uint64 and float32"
        )
    if seeds.ndim != ndim or seeds.shape != coefficients.shape:
        raise ValueError(
            f"seeds and coefficients have shapes {seeds.shape} and {coefficients.shape}, "
            f"but must be {ndim}-D of one {'length' if ndim == 1 else 'shape'}"
        )
    finite = np.isfinite(coefficients).ravel()
    if not finite.all():
        first = int(np.argmin(finite))
        raise _not_finite(f"coefficient {first} of {len(finite)}", float(coefficients.ravel()[first]))


def _implementation(tensor: Tensor) -> ModuleType:
    return _module(tensor.device)


@cache
def _module(device: torch.device) -> ModuleType:
    """What computes on a device: compiled code, imported at its first use, or else the reference."""
    compiler = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    if compiler is None:
        return reference
    if find_spec(compiler) is None:
        return _without(compiler, device, "is not installed")
    module = import_module(f"fedzo.directions.{compiler}_{device.type}")
    try:
        module.fill(torch.empty(1, device=device), 0, "rademacher")
    except Exception as error:  # Triton wants a C compiler and a GPU that it knows
        return _without(compiler, device, f"does not work here ({type(error).__name__}: {str(error)[:200]})")
    return module


def _without(compiler: str, device: torch.device, why: str) -> ModuleType:
    warnings.warn(f"{compiler} {why}: directions on {device} are computed by plain torch, much slower", stacklevel=2)
    return reference


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        near = get_close_matches(str(family), FAMILIES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"direction family is {family!r}, but must be one of {', '.join(FAMILIES)}{hint}")


def _check_vector(name: str, tensor: Tensor, offset: int, dtype: torch.dtype = torch.float32) -> None:
    if tensor.dtype != dtype or tensor.ndim != 1 or not tensor.is_contiguous():
        found = f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        raise ValueError(f"{name} is {found}, but must be {dtype}, 1-D and contiguous")
    if not 0 <= offset <= MAX_OFFSET:
        raise ValueError(f"offset is {offset}, but must be at least 0 and at most 2**62")


def _check_pair(theta: Tensor, out: Tensor) -> None:
    if out.shape != theta.shape or out.device != theta.device:
        raise ValueError(
            f"out has {len(out)} elements on {out.device}, but must have theta's {len(theta)} on {theta.device}"
        )
    distance = abs(out.data_ptr() - theta.data_ptr())
    if 0 < distance < theta.numel() * theta.element_size():
        raise ValueError("out overlaps theta in part, but must be theta itself or memory of its own")


def finite_coefficient(value: float) -> float:
    """The float32 nearest to ``value``; DivergedError when that is not finite."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not math.isfinite(rounded):
        raise _not_finite("coefficient of a direction", value)
    return rounded


def _not_finite(name: str, value: float) -> DivergedError:
    return DivergedError(f"{name} is {value}, but must be finite in float32: lower the learning rate, or clip scalars")
