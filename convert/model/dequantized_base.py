"""The dequantised base: weights as QLoRA training used them, in its compute type, through NF4 or 8 bits.

Merging adds the update to these, comparing computes with these: both are about the model that was trained.
Rows are dequantised as they are asked for, a few at a time: no second copy of a matrix is ever in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from convert.model import quiet_bitsandbytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Elements that are worked on at once: float32 and its intermediates then stay in a core's cache.
CHUNK = 2**20

# (start, stop) -> rows of a tensor
Rows = Callable[[int, int], torch.Tensor]


class DequantizedBase:
    """settings: an adapter's (compute_dtype, device, quantized, quantization_bit, quant_block,
    double_quantization)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        quiet_bitsandbytes.alone()
        self.layers = frozenset(settings.get("quantized") or ())
        # An adapter made elsewhere does not say: its base is taken as it is.
        self._dtype = DTYPES.get(str(settings.get("compute_dtype")))
        self._block = int(settings.get("quant_block", 64))
        self._bits = int(settings.get("quantization_bit") or 4)
        self._double = bool(settings.get("double_quantization", True))
        self._device = "cuda" if settings.get("device") == "cuda" and torch.cuda.is_available() else "cpu"

    def holds(self, name: str) -> bool:
        """Whether the tensor `name` was held in 4 or 8 bits."""
        return name.endswith(".weight") and re.sub(r"\.\d+\.", ".*.", name[: -len(".weight")]) in self.layers

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor `name` of the base as training used it; on the CPU."""
        if self._dtype is None or not weight.is_floating_point():
            return weight
        if not self.holds(name):
            return weight.to(self._dtype)
        rows, values = self.rows(name, weight), torch.empty(weight.shape, dtype=self._dtype)
        for start, stop in spans(weight.shape):
            values[start:stop] = rows(start, stop)
        return values

    def rows(self, name: str, weight: torch.Tensor) -> Rows:
        """Gives any rows of the tensor `name` as training used them; `weight` may be mapped from its file."""
        dtype = self._dtype
        if dtype is None or not weight.is_floating_point():
            return lambda start, stop: weight[start:stop]
        if not self.holds(name):
            return lambda start, stop: weight[start:stop].to(dtype)
        if self._bits == 8:
            return lambda start, stop: _int8(weight[start:stop], dtype)
        if self._device == "cpu" and weight.dim() == 2 and weight.shape[1] % self._block == 0:
            return _nf4_rows(weight, dtype, self._block, self._double)
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        data = weight.to(self._device, dtype).contiguous()
        packed, state = quantize_4bit(
            data, blocksize=self._block, compress_statistics=self._double, quant_type="nf4"
        )
        whole = dequantize_4bit(packed, state).cpu()
        return lambda start, stop: whole[start:stop]


def _int8(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows as bitsandbytes' LLM.int8 holds them (arXiv:2208.07339): in 8 bits, with a scale for each row."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(rows.to(dtype).half().contiguous())
    return int8_vectorwise_dequant(codes, scales).to(dtype)


def spans(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of a tensor that are worked on at once."""
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _nf4_rows(weight: torch.Tensor, dtype: torch.dtype, block: int, double: bool) -> Rows:
    """What bitsandbytes' quantize_4bit and dequantize_4bit give, bit for bit, for a few rows at a time.

    Its own kernel searches the 15 bounds between codes for each value, which takes ten times as long as
    counting those below it does for a million values at once.
    """
    from bitsandbytes.functional import (
        QuantState,
        dequantize_4bit,
        dequantize_blockwise,
        get_4bit_type,
        quantize_blockwise,
    )

    code = get_4bit_type("nf4", device="cpu")
    bounds = ((code[:-1] + code[1:]) / 2).tolist()
    parts = [weight[a:b].to(dtype).reshape(-1, block).abs().amax(-1).float() for a, b in spans(weight.shape)]
    largest = torch.cat(parts)
    scale = largest
    if double:
        # The scales of blocks are held in 8 bits themselves, over the whole matrix.
        offset = largest.mean()
        scale = dequantize_blockwise(*quantize_blockwise(largest - offset, blocksize=256)) + offset
    blocks = weight.shape[1] // block

    def rows(start: int, stop: int) -> torch.Tensor:
        part = slice(start * blocks, stop * blocks)
        values = weight[start:stop].to(dtype).float().reshape(-1, block)
        values = (values * (1.0 / largest[part].clamp(min=1e-38))[:, None]).clamp_(-1, 1).reshape(-1)
        codes = torch.zeros(values.shape, dtype=torch.uint8)
        above = torch.empty(values.shape, dtype=torch.bool)
        for bound in bounds:
            codes += torch.gt(values, bound, out=above).view(torch.uint8)
        packed = ((codes[::2] << 4) | codes[1::2])[:, None]
        shape = torch.Size((stop - start, weight.shape[1]))
        state = QuantState(scale[part].contiguous(), shape, dtype=dtype, blocksize=block, quant_type="nf4")
        return dequantize_4bit(packed, state)

    return rows
