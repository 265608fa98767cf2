"""Training's passes with fewer trips through a card's memory: LoRA added in place, norms in one kernel.

peft writes and reads a layer's output seven more times for its adapter; with long rows that, and not the
products, is what a step waits for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def fuse(model: Any) -> None:
    """Let an adapted model train in fewer kernels. What is not known to be the same stays as it is."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if (
            isinstance(module, LoraLayer)
            and isinstance(module.get_base_layer(), nn.Linear)
            and _plain(module)
        ):
            module.forward = functools.partial(_adapted, module, module.forward)
        elif hasattr(module, "variance_epsilon") and _is_rms_norm(module):
            module.forward = functools.partial(_normed, module)


def _plain(module: Any) -> bool:
    """Whether the layer has one adapter, without dropout, and adds nothing but its product."""
    names = list(module.lora_A)
    return (
        len(names) == 1
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and module.lora_B[names[0]].bias is None
        and names[0] not in getattr(module, "lora_variant", {})
        and not module.fan_in_fan_out
    )


def _adapted(module: Any, real: Any, x: torch.Tensor, *more: Any, **given: Any) -> torch.Tensor:
    (name,) = module.lora_A
    base = module.get_base_layer()
    usual = module.disable_adapters or module.merged or not module.training or bool(more) or bool(given)
    if usual or x.dtype != base_dtype(base):
        found: torch.Tensor = real(x, *more, **given)
        return found
    one, two = module.lora_A[name].weight, module.lora_B[name].weight
    found = AdaptedLinear.apply(x, base, base.bias, one, two, module.scaling[name])
    return found


def base_dtype(base: Any) -> torch.dtype:
    """The type that a layer's weight has, or is unpacked to."""
    state = getattr(base.weight, "quant_state", None)
    found: torch.dtype = base.weight.dtype if state is None else state.dtype
    return found


def unpacked(base: Any) -> torch.Tensor:
    """(out, in): the weight that a layer computes with."""
    if hasattr(base, "unpacked"):  # stands for a layer when memory is counted
        made: torch.Tensor = base.unpacked()
    elif getattr(base.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        made = dequantize_4bit(base.weight.data, base.weight.quant_state)
    else:
        made = base.weight.data
    return made


class AdaptedLinear(torch.autograd.Function):
    """x W' + bias + scaling (x A') B', the last added to the first where it lies.

    x: (..., in); A: (rank, in) and B: (out, rank) in float32, computed with in x's type. W is unpacked for
    each product and has no gradient, nor has the bias.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: Any, bias: Any, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        made = functional.linear(flat, unpacked(base), bias)
        low = flat @ a.to(x.dtype).T
        made.addmm_(low, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(flat, low, a, b)
        ctx.base, ctx.scaling = base, scaling
        return made.view(*x.shape[:-1], made.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        flat, low, a, b = ctx.saved_tensors
        slope = gradients[0].reshape(-1, gradients[0].shape[-1])
        down = (slope @ b.to(slope.dtype)).mul_(ctx.scaling)
        of_b = (slope.T @ low).to(b.dtype).mul_(ctx.scaling)
        of_a = (down.T @ flat).to(a.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None, of_a, of_b, None
        of_x = slope @ unpacked(ctx.base)
        of_x.addmm_(down, a.to(slope.dtype))
        return of_x.view(*gradients[0].shape[:-1], of_x.shape[-1]), None, None, of_a, of_b, None


def _normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _is_rms_norm(module: Any) -> bool:
    """Whether a norm is x over its root mean square, times a weight, tried out on a few numbers."""
    if not isinstance(getattr(module, "weight", None), nn.Parameter) or module.weight.is_meta:
        return False
    x = torch.linspace(-3, 3, 4 * module.weight.numel(), device=module.weight.device).to(module.weight.dtype)
    x = x.view(4, -1)
    with torch.no_grad():
        return torch.allclose(module(x), _normed(module, x), rtol=0.02, atol=0.02)
