"""The model that is trained: where it computes, its weights in 4 or 16 bits, and the adapter over it."""

from __future__ import annotations

import os
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convert.config import TrainConfig, absolute
from convert.model.dequantized_base import no_advice
from convert.model.hf_folder import loadable
from convert.train import malloc_trim
from edge.errors import UnavailableError, UsageError

# Weights that share a scale in bitsandbytes' NF4.
NF4_BLOCK = 64


@dataclass
class Place:
    """Where and how to compute. notes: what differs from what was asked for, and why."""

    device: str
    dtype: torch.dtype
    four_bit: bool
    notes: list[str] = field(default_factory=list)


def choose_place(config: TrainConfig) -> Place:
    """CUDA, then MPS, then the CPU; in the type that is asked for where the device has it."""
    four_bit = config.quantization_bit == 4
    asked = "bf16" if config.bf16 else "fp16" if config.fp16 else None
    if torch.cuda.is_available() and not config.use_cpu:
        _grow_in_place()
        if asked == "fp16" or not torch.cuda.is_bf16_supported(including_emulation=False):
            notes = ["this GPU has no bfloat16: computing in float16"] if asked == "bf16" else []
            return Place("cuda", torch.float16, four_bit, notes)
        return Place("cuda", torch.bfloat16, four_bit)
    if torch.backends.mps.is_available() and not config.use_cpu:
        notes = ["bitsandbytes has no 4 bits on MPS: LoRA over 16-bit weights"] if four_bit else []
        return Place("mps", torch.float16 if asked == "fp16" else torch.bfloat16, False, notes)
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    dtype = torch.bfloat16 if fast else torch.float32
    place = Place("cpu", dtype, four_bit)
    if asked == "fp16" or (asked == "bf16" and not fast):
        place.notes.append(f"{asked} is slow on this CPU: computing in {dtype_name(dtype)}")
    return place


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _grow_in_place() -> None:
    """Let the CUDA allocator's segments grow; before its first allocation, and not on Windows, which cannot.

    Else a captured pass finds no room between segments of other sizes: 7B would need 8 GB in place of 6.5.
    """
    configured = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if sys.platform != "win32" and not configured:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def autocast(config: TrainConfig, place: Place) -> torch.dtype | None:
    """The type to compute in under autocast, None without: for fully trained weights, which are float32.

    On a GPU for adapters too: else their inputs would be kept for the backward pass in float32.
    """
    if place.dtype == torch.float32 or (config.finetuning_type == "lora" and place.device != "cuda"):
        return None
    return place.dtype


def load_model(
    folder: Path, place: Place, *, double_quant: bool = True, attention: str = "sdpa", sharded: bool = False
) -> Any:
    """The base model in `folder` on its device; with `four_bit` in NF4 but for embeddings and output head.

    sharded: as `convert.train.fsdp` takes it: in the system's memory, 4 bits packed as numbers of the other
    weights' type, for FSDP flattens a layer into one tensor of one type.
    """
    no_advice()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    how: dict[str, Any] = {"dtype": place.dtype, "attn_implementation": attention}
    if place.four_bit:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=place.dtype,
            bnb_4bit_quant_storage=place.dtype if sharded else torch.uint8,
        )
    if place.device != "cpu" or torch.cuda.is_available():
        # Without it 4-bit weights go to the GPU although the CPU is wanted.
        how["device_map"] = {"": "cpu" if sharded else place.device}
    with loadable(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **how)
    keep_unpacked(model)
    malloc_trim.trim()
    return model


def use_liger(model: Any, place: Place) -> None:
    """Give `model`, adapted or not, liger-kernel's norms, rotary embeddings and gates, but not its loss.

    Raises UnavailableError without CUDA, without the package, and for a kind of model that it does not know.
    """
    key = "enable_liger_kernel: true"
    if place.device != "cuda":
        raise UnavailableError(f"{key} needs CUDA, training runs on {place.device}", "leave it out")
    try:
        from liger_kernel.transformers import monkey_patch as liger
    except ImportError as error:
        raise UnavailableError(
            f"{key} needs the package 'liger-kernel'", "pip install liger-kernel"
        ) from error
    kind = model.config.model_type
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UnavailableError(f"{key}: the installed liger-kernel does not know {kind}", "leave it out")
    whole = getattr(model, "get_base_model", lambda: model)()
    liger._apply_liger_kernel_to_instance(whole, cross_entropy=False, fused_linear_cross_entropy=False)


def keeps_embeddings_off(model: Any, place: Place) -> bool:
    """Whether an adapted model's embeddings go to the system's memory: with 4-bit weights on a GPU, if they
    are neither trained nor the head's weight too.

    Those of a 7B model are a gigabyte, of which a batch reads a few rows.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained = hasattr(embeddings, "base_layer") or embeddings.weight.requires_grad
    tied = embeddings.weight is head.weight
    moved = embeddings.weight.device.type == "cpu"
    return place.device == "cuda" and place.four_bit and not (trained or tied or moved)


def keep_embeddings_off(model: Any) -> None:
    """Move the embeddings to the system's memory; their output is on the GPU as before."""
    embeddings = model.get_input_embeddings()
    weight, device, real = embeddings.weight, embeddings.weight.device, embeddings.forward
    # In place: FSDP refers to the parameter too, and would keep it on the GPU.
    weight.data = weight.data.cpu()
    # No longer a parameter of the model: transformers takes the first one's device for that of all.
    del embeddings._parameters["weight"]
    embeddings.to("cpu")
    object.__setattr__(embeddings, "weight", weight)

    embeddings.forward = lambda ids: real(ids.cpu()).pin_memory().to(device, non_blocking=True)


def keep_unpacked(model: Any) -> None:
    """Leave 4-bit weights in the layout that gradients need.

    On CPUs with AVX512-BF16 bitsandbytes repacks them at the first forward pass in eval mode, and its
    backward pass then reads them in the wrong order.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_layers(model: Any) -> list[str]:
    """Names of the 4-bit linear layers, with `*` for the number of a decoder layer."""
    from bitsandbytes.nn import Linear4bit

    names = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})


def add_adapter(model: Any, config: TrainConfig) -> Any:
    """`model` with a fresh LoRA adapter in float32. Raises UsageError for a lora_target it does not have."""
    from peft import LoraConfig, get_peft_model

    targets = list(config.lora_target)
    pissa = "pissa" if config.pissa_iter < 0 else f"pissa_niter_{config.pissa_iter}"
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if "all" in targets else targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=pissa if config.pissa_init else True,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    try:
        with warnings.catch_warnings():
            # peft calls transformers by a deprecated name.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise UsageError(f"lora_target: {', '.join(targets)}: {str(error).splitlines()[0]}") from error
    adapted.peft_config["default"].base_model_name_or_path = absolute(config.model_name_or_path)
    if not config.disable_gradient_checkpointing:
        # Without dropout the recomputation needs no random state, and can be captured as a CUDA graph.
        _checkpoint(adapted.get_base_model(), preserve_rng_state=drops(adapted))
    return adapted


def _checkpoint(model: Any, **how: Any) -> None:
    model.activation_checkpointing_enable(
        {"use_reentrant": False, **how, **malloc_trim.checkpointing(model.device.type)}
    )


def drops(model: Any) -> bool:
    """Whether a training pass draws random numbers, for dropout of any kind."""
    shape = model.config.get_text_config()
    return bool(getattr(shape, "attention_dropout", 0.0)) or any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()
    )


def unfreeze(model: Any, config: TrainConfig) -> Any:
    """`model` (in float32) with every weight to be trained."""
    torch.manual_seed(config.seed)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if not config.disable_gradient_checkpointing:
        _checkpoint(model)
    return model
