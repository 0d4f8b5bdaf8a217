"""Quantised linear layers. Importing this module imports bitsandbytes; :mod:`fedzo.quantisation` does so when asked.

bitsandbytes' own forwards do not suit zeroth-order queries. On a CPU with avx512_bf16 the 4-bit one repacks the stored
weight in place and computes in bfloat16, whatever the compute dtype; the 8-bit one rounds the activations to int8. Both
drown eps. Here a forward dequantises the weight and calls `F.linear`, always: the same bits every time, and the stored
bytes never change.
"""

import math
from typing import TypeVar

import bitsandbytes
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 64  # weights that share a scale
_STATISTICS_BLOCK = 256  # scales that share a second scale
_ZERO = {"nf4": 0x77, "fp4": 0x00}  # the byte of two zeros

_Layer = TypeVar("_Layer", bound=nn.Module)


class Linear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """nf4 or fp4 in blocks of 64 (Dettmers et al. 2023): 0.516 bytes a weight with double quantisation, else 0.5625."""

    bits = 4

    @classmethod
    def of(cls, linear: nn.Linear, weight: Tensor, kind: str, dtype: torch.dtype, double: bool) -> "Linear4bit":
        """The layer that stands for ``linear`` with ``weight``, float32 [out, in], on the weight's device."""
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None,
            compute_dtype=dtype, quant_type=kind, device="meta",
        )  # fmt: skip
        packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
        # A block of zeros has no scale to divide by; on CUDA its codes would be those of -1.
        packed.view(-1, BLOCK // 2)[state.absmax == 0] = _ZERO[kind]
        if double:
            # As in quantize_4bit, but its mean depends on the number of threads in the last bits.
            state.offset = torch.tensor(math.fsum(state.absmax.tolist()) / state.absmax.numel(), device=weight.device)
            state.absmax, state.state2 = bnb.quantize_blockwise(
                state.absmax - state.offset, blocksize=_STATISTICS_BLOCK
            )
            state.nested = True
        state.dtype = dtype  # of what dequantising gives
        layer.weight = bitsandbytes.nn.Params4bit(
            packed, quant_state=state, blocksize=BLOCK, quant_type=kind, bnb_quantized=True
        )
        layer.quant_state = state
        layer.support_avx512bf16_for_cpu = False
        return _finished(layer, linear, dtype)

    def dequantised(self) -> Tensor:
        """The weight, [out, in] in the compute dtype: a new tensor."""
        state = self.weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return self._blocks(scales, state.dtype).view(state.shape)

    def units(self) -> Tensor:
        """[blocks, 64] float32: the weight where every block has the scale 1."""
        return self._blocks(torch.ones(self.weight.numel() * 2 // BLOCK, device=self.weight.device), torch.float32)

    def at_scales(self, units: Tensor, scales: Tensor) -> Tensor:
        """The weight with other scales, float32 [blocks]: [out, in] in the compute dtype."""
        state = self.weight.quant_state
        return torch.mul(units, scales.unsqueeze(1)).view(state.shape).to(state.dtype)

    def _blocks(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """[blocks, 64]; bitsandbytes' CPU kernel is wrong where a block goes over the end of a row."""
        state = self.weight.quant_state
        blocks = bnb.QuantState(scales, (scales.numel(), BLOCK), state.code, BLOCK, state.quant_type, dtype)
        weight: Tensor = bnb.dequantize_4bit(self.weight.data, blocks)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.dequantised(), self.bias)


class Linear8bit(bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]
    """int8 weights with one float32 scale a row, in the format of LLM.int8() (Dettmers et al. 2022).

    Rounded from float32, not from float16 as bitsandbytes does, so that no weight overflows. Activations stay as they
    are.
    """

    scale: Tensor  # [out] float32, the largest magnitude of each row
    bits = 8

    @classmethod
    def of(cls, linear: nn.Linear, weight: Tensor, kind: str, dtype: torch.dtype, double: bool) -> "Linear8bit":
        """The layer that stands for ``linear`` with ``weight``, float32 [out, in], on the weight's device."""
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, device="meta"
        )
        scale = weight.abs().amax(1)
        codes = torch.round(weight * (127.0 / scale.clamp(min=1e-30)).unsqueeze(1)).to(torch.int8)
        layer.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, SCB=scale)
        layer.register_buffer("scale", scale, persistent=False)  # the state dict has it as bitsandbytes' SCB
        layer.compute_dtype = dtype
        return _finished(layer, linear, dtype)

    def dequantised(self) -> Tensor:
        """The weight, [out, in] in the compute dtype: a new tensor."""
        return self.at_codes(self.weight.data)

    def units(self) -> Tensor:
        """The codes, int8 [out, in]; they count in steps of 1 / 127 of their row's scale."""
        codes: Tensor = self.weight.data
        return codes

    def at_scales(self, units: Tensor, scales: Tensor) -> Tensor:
        """The weight with other scales, float32 [out]: [out, in] in the compute dtype."""
        return torch.mul(units, (scales / 127.0).unsqueeze(1)).to(self.compute_dtype)

    def at_codes(self, codes: Tensor) -> Tensor:
        """The weight with other codes, int8 or float32 [out, in]: [out, in] in the compute dtype."""
        return self.at_scales(codes, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.dequantised(), self.bias)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.weight.SCB = self.scale  # torch moves a parameter's data, not what hangs on it
        return self


def _finished(layer: _Layer, linear: nn.Linear, dtype: torch.dtype) -> _Layer:
    if linear.bias is not None:
        bias = linear.bias.detach().to(layer.weight.device, dtype)  # type: ignore[arg-type]
        layer.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return layer.train(linear.training)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the weight's dtype, which the result keeps: PEFT's IA3 hands over float32 and takes its dtype from here."""
    return functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
