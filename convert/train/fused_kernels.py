"""Training passes with fewer trips through a GPU's memory: LoRA added in place, RMS norms in one kernel.

peft writes and reads a layer's output seven more times for its adapter; with long rows a step waits for that,
and not for the products.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def fuse(model: Any, *, keep: bool = False) -> None:
    """Let an adapted model train in fewer kernels. What is not known to be the same stays as it is.

    keep: weights in 4 bits are dequantised now, once, and not for each product.
    """
    for module in model.modules():
        if _is_plain(module):
            layer = module.get_base_layer()
            base = _Base(layer, _dequantised(layer) if keep else None)
            module.forward = functools.partial(_adapted, module, module.forward, base)
        elif hasattr(module, "variance_epsilon") and _is_rms_norm(module):
            module.forward = functools.partial(_normed, module)


def weights(model: Any) -> int:
    """Numbers in the weights that `fuse` keeps, where it is told to."""
    return sum(module.get_base_layer().weight.numel() for module in model.modules() if _is_plain(module))


def _is_plain(module: Any) -> bool:
    """Whether a module is a linear layer with one adapter, without dropout, that adds but its product."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or not isinstance(module.get_base_layer(), nn.Linear):
        return False
    names = list(module.lora_A)
    return (
        len(names) == 1
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and module.lora_B[names[0]].bias is None
        and names[0] not in getattr(module, "lora_variant", {})
        and not module.fan_in_fan_out
    )


@dataclass(frozen=True)
class _Base:
    """A layer under its adapter. kept: its weight, where that is dequantised once."""

    layer: Any
    kept: torch.Tensor | None

    def weight(self) -> Any:
        """(out, in): what the layer computes with."""
        return _dequantised(self.layer) if self.kept is None else self.kept


def _adapted(module: Any, forward: Any, base: _Base, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """forward: peft's own, for what the fused one does not know."""
    (name,) = module.lora_A
    unfused = module.disable_adapters or module.merged or not module.training or bool(args) or bool(kwargs)
    if unfused or x.dtype != _dtype(base.layer):
        return forward(x, *args, **kwargs)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return AdaptedLinear.apply(x, base, a, b, module.scaling[name])


def _dtype(base: Any) -> torch.dtype:
    """The type that a layer's weight has, or is dequantised to."""
    state = getattr(base.weight, "quant_state", None)
    return (base.weight if state is None else state).dtype


def _dequantised(base: Any) -> Any:
    """(out, in): a layer's weight, out of its 4 bits where it has those."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, state)


class AdaptedLinear(torch.autograd.Function):  # type: ignore[misc]
    """x W' + bias + scaling (x A') B', the last added to the first in place.

    x: (..., in); A: (rank, in) and B: (out, rank) in float32, computed with in x's type. W (and bias) are
    those of `base`, without gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: _Base, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        out = functional.linear(flat, base.weight(), base.layer.bias)
        low = flat @ a.to(x.dtype).T
        out.addmm_(low, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(flat, low, a, b)
        ctx.base, ctx.scaling = base, scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        flat, low, a, b = ctx.saved_tensors
        slope = gradients[0].reshape(-1, gradients[0].shape[-1])
        down = (slope @ b.to(slope.dtype)).mul_(ctx.scaling)
        of_b = (slope.T @ low).to(b.dtype).mul_(ctx.scaling)
        of_a = (down.T @ flat).to(a.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, of_a, of_b, None
        of_x = slope @ ctx.base.weight()
        of_x.addmm_(down, a.to(slope.dtype))
        return of_x.view(*gradients[0].shape[:-1], of_x.shape[-1]), None, of_a, of_b, None


def _normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _is_rms_norm(module: Any) -> bool:
    """Whether a norm is x over its root mean square, times a weight, tried out on a few numbers."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    x = torch.linspace(-3, 3, 4 * weight.numel(), device=weight.device).to(weight.dtype).view(4, -1)
    with torch.no_grad():
        return bool(torch.allclose(module(x), _normed(module, x), rtol=0.02, atol=0.02))
