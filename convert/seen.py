"""A base's weights as QLoRA training saw them: in the type it computed in, its 4-bit layers through NF4.

Merging adds the update to these, comparing computes with these: both are about the model that was trained.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Seen:
    """settings: those of an adapter's manifest (compute_dtype, device, quantized, quant_block, ...)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        # It would advise to install a kernel that only serves inference.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        self.layers = frozenset(settings.get("quantized") or ())
        # An adapter made elsewhere does not say: its base is taken as it is.
        self._dtype = DTYPES.get(str(settings.get("compute_dtype")))
        self._how = {
            "blocksize": settings.get("quant_block", 64),
            "compress_statistics": settings.get("double_quantization", True),
        }
        self._device = "cuda" if settings.get("device") == "cuda" and torch.cuda.is_available() else "cpu"

    def holds(self, name: str) -> bool:
        """Whether the tensor `name` was held in 4 bits."""
        return name.endswith(".weight") and re.sub(r"\.\d+\.", ".*.", name[: -len(".weight")]) in self.layers

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor `name` of the base as training saw it; on the CPU."""
        if self._dtype is None or not weight.is_floating_point():
            return weight
        if not self.holds(name):
            return weight.to(self._dtype)
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        data = weight.to(self._device, self._dtype).contiguous()
        packed, state = quantize_4bit(data, quant_type="nf4", **self._how)
        return dequantize_4bit(packed, state).cpu()
