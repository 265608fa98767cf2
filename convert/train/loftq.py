"""LoftQ: the adapter begins with the quantisation error of the 4-bit weights, as far as its rank allows.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization" (arXiv:2310.08659), with one step and the
quantised weights as they are: the adapter is a plain one over the same base, and neither merging nor serving
has to know of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from convert.model.hf_folder import check_folder
from edge.errors import InputError

# Directions beyond the rank, and iterations, that make the fast SVD as good as the exact one here.
_OVERSAMPLING, _ITERATIONS = 8, 4


@torch.no_grad()  # type: ignore[untyped-decorator]
def begin(model: Any, base: Path) -> float:
    """Put the quantisation error into the adapter of `model`; the share of it (0 to 1) that fits is returned.

    base: the folder that the model was loaded from. Raises InputError where that names its weights otherwise.
    """
    from bitsandbytes.functional import dequantize_4bit

    stored = check_folder(base).tensors
    lost = left = 0.0
    for name, layer in _adapted(model):
        weight = layer.get_base_layer().weight
        dequantised = dequantize_4bit(weight.data, weight.quant_state).float()
        if f"{name}.weight" not in stored:
            raise InputError(f"loftq_init: {base} has no tensor {name}.weight", "leave loftq_init out")
        with safe_open(stored[f"{name}.weight"].file, framework="pt") as file:
            original = file.get_tensor(f"{name}.weight")
        error = original.to(dequantised.device, torch.float32) - dequantised
        rank = layer.r["default"]
        u, s, v = torch.svd_lowrank(error, q=min(rank + _OVERSAMPLING, *error.shape), niter=_ITERATIONS)
        # W' = W + scaling B A
        half = (s[:rank] / layer.scaling["default"]).sqrt()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.copy_(half[:, None] * v[:, :rank].T)
        b.copy_(u[:, :rank] * half)
        lost += float(error.square().sum())
        left += float((error - layer.scaling["default"] * (b @ a).float()).square().sum())
    return 1 - left / lost if lost else 0.0


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """The 4-bit layers with an adapter, by their names in the base."""
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer.get_base_layer().weight, "quant_state"):
            yield name, layer
