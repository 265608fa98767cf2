"""LoftQ's start: the adapter begins with what 4 bits lost of the weights, as far as its rank can hold it.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization", with one step and the quantised weights as they
are. So the adapter is a plain one over the same base, and neither merging nor serving has to know of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from convert.model import safetensors_io
from convert.model.hf_folder import check_folder
from edge.errors import InputError

# Directions beyond the rank, and repeats, that make the fast SVD as good as the whole one here.
_MORE, _REPEATS = 8, 4


@torch.no_grad()
def begin(model: Any, base: Path) -> float:
    """Put what 4 bits lost into the adapter of `model`; the share of it (0 to 1) that the adapter holds.

    base: the folder that the model was loaded from. Raises InputError where that names its weights otherwise.
    """
    from bitsandbytes.functional import dequantize_4bit

    files = safetensors_io.files(check_folder(base).weights)
    lost = left = 0.0
    for name, layer in _adapted(model):
        weight = layer.get_base_layer().weight
        known = dequantize_4bit(weight.data, weight.quant_state).float()
        if f"{name}.weight" not in files:
            raise InputError(f"loftq_init: {base} has no tensor {name}.weight", "leave loftq_init out")
        with safe_open(files[f"{name}.weight"], framework="pt") as file:
            original = file.get_tensor(f"{name}.weight")
        missing = original.to(known.device, torch.float32) - known
        rank = layer.r["default"]
        some = min(rank + _MORE, *missing.shape)
        u, s, v = torch.svd_lowrank(missing, q=some, niter=_REPEATS)
        # W' = W + scaling B A
        half = (s[:rank] / layer.scaling["default"]).sqrt()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.copy_(half[:, None] * v[:, :rank].T)
        b.copy_(u[:, :rank] * half)
        lost += float(missing.square().sum())
        left += float((missing - layer.scaling["default"] * (b @ a).float()).square().sum())
    return 1 - left / lost if lost else 0.0


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """The 4-bit layers with an adapter, by their names in the base."""
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer.get_base_layer().weight, "quant_state"):
            yield name, layer
