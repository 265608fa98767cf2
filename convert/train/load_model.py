"""The model that is trained: where it computes, its weights in 4 or 16 bits, and the adapter over it."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convert.config import TrainConfig, absolute
from convert.model import quiet_bitsandbytes
from convert.model.hf_folder import loadable
from convert.train import malloc_trim
from edge.errors import UnavailableError, UsageError
from edge.setup import pip_command

# (number, part) of a parameter in a decoder layer.
_IN_LAYER = re.compile(r".*?\.layers\.(\d+)\.(\w+)\.")
# Weights that share a scale in bitsandbytes' NF4.
NF4_BLOCK = 64


@dataclass
class Place:
    """Where and how to compute. four_bit: over NF4 weights; eight_bit: over LLM.int8 ones.

    notes: what differs from what was asked for, and why.
    """

    device: str
    dtype: torch.dtype
    four_bit: bool
    notes: list[str] = field(default_factory=list)
    eight_bit: bool = False


def choose_place(config: TrainConfig) -> Place:
    """CUDA, then MPS, then the CPU; in the type that is asked for where the device has it."""
    place = _device(config)
    bits = config.quantization_bit
    if place.device == "mps" and bits:
        why = tried(place.device, place.dtype, bits)
        found = f"failed ({why}): LoRA over 16-bit weights" if why else "computed what it should"
        place.notes.append(f"a layer of bitsandbytes in {bits} bits was tried on MPS and {found}")
        bits = None if why else bits
    return dataclasses.replace(place, four_bit=bits == 4, eight_bit=bits == 8)


def _device(config: TrainConfig) -> Place:
    asked = "bf16" if config.bf16 else "fp16" if config.fp16 else None
    if torch.cuda.is_available() and not config.use_cpu:
        _grow_in_place()
        if asked == "fp16" or not torch.cuda.is_bf16_supported(including_emulation=False):
            notes = ["this GPU has no bfloat16: computing in float16"] if asked == "bf16" else []
            return Place("cuda", torch.float16, False, notes)
        return Place("cuda", torch.bfloat16, False)
    if torch.backends.mps.is_available() and not config.use_cpu:
        return Place("mps", torch.float16 if asked == "fp16" else torch.bfloat16, False)
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    dtype = torch.bfloat16 if fast else torch.float32
    place = Place("cpu", dtype, False)
    if asked == "fp16" or (asked == "bf16" and not fast):
        place.notes.append(f"{asked} is slow on this CPU: computing in {dtype_name(dtype)}")
    return place


def tried(device: str, dtype: torch.dtype, bits: int) -> str:
    """Why a small layer of bitsandbytes in 4 or 8 bits cannot be trained over on `device`; "" where it can.

    Its output and its input's gradient are compared with those of the weight itself.
    """
    quiet_bitsandbytes.alone()
    weight = torch.linspace(-1, 1, 64 * 128).sin().view(64, 128)
    x = torch.linspace(-2, 2, 4 * 128).cos().view(4, 128)
    try:
        from bitsandbytes import nn

        layer: Any
        if bits == 4:
            layer = nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
        else:
            layer = nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict({"weight": weight})
        layer = layer.to(device)
        keep_unpacked(layer)
        inputs = x.to(device, dtype).requires_grad_()
        out = layer(inputs)
        out.float().square().sum().backward()
        want = x @ weight.T
        for name, value, right in (
            ("output", out.detach(), want),
            ("gradient", inputs.grad, 2 * want @ weight),
        ):
            with torch.no_grad():
                wrong = float(torch.linalg.norm(value.float().cpu() - right) / torch.linalg.norm(right))
            if not wrong < 0.2:
                return f"its {name} is wrong by {wrong:.0%}"
    except Exception as error:  # whatever a backend raises that lacks an operation
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


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
    # Modules that are trained beside an adapter are float32, over layers that are not.
    plain = config.finetuning_type == "lora" and not (config.grows or config.additional_target)
    if place.dtype == torch.float32 or (plain and place.device != "cuda"):
        return None
    return place.dtype


def load_model(
    folder: Path, place: Place, *, double_quant: bool = True, attention: str = "sdpa", sharded: bool = False
) -> Any:
    """The base model in `folder` on its device; with `four_bit` in NF4 (with `eight_bit` in 8 bits) but for
    embeddings and output head.

    sharded: as `convert.train.fsdp` takes it: in the system's memory, 4 bits packed as numbers of the other
    weights' type, for FSDP flattens a layer into one tensor of one type.
    """
    quiet_bitsandbytes.alone()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    how: dict[str, Any] = {"dtype": place.dtype, "attn_implementation": attention}
    if place.eight_bit:
        how["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif place.four_bit:
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
            f"{key} needs the package 'liger-kernel'", pip_command("install", "liger-kernel")
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
    """Names of the linear layers in 4 or 8 bits, with `*` for the number of a decoder layer."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    names = {name for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))}
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})


def grow(model: Any, tokens: int, seed: int) -> None:
    """Give the tables of tokens a row for each of `tokens`, in multiples of 64 rows where they lack any.

    New rows begin, as LLaMA-Factory's, as the mean of the others with noise of 1/sqrt(width).
    """
    before = model.get_input_embeddings().weight.shape[0]
    if tokens <= before:
        return
    model.resize_token_embeddings(tokens, pad_to_multiple_of=64, mean_resizing=False)
    torch.manual_seed(seed)
    weights = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    for weight in dict.fromkeys(weights):
        data = weight.data
        data[before:] = data[:before].float().mean(0).to(data.dtype)
        data[before:] += torch.empty_like(data[before:]).normal_(std=data.shape[1] ** -0.5)


def _tables(model: Any) -> list[str]:
    """The names of the modules that hold a row for each token."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is one for one in wanted)]


def _trained_whole(model: Any, config: TrainConfig) -> list[str]:
    """The modules that are trained beside the adapter. Raises UsageError for a name that is none of them."""
    names = _tables(model) if config.grows else []
    if model.config.tie_word_embeddings:
        names = names[:1]  # peft ties the other one to it
    for target in config.additional_target or ():
        found = [(name, one) for name, one in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not found or any(not one.weight.is_floating_point() for _, one in found if hasattr(one, "weight")):
            why = "is held in few bits" if found else "is no module of this model"
            raise UsageError(f"additional_target: {target} {why}", "e.g. embed_tokens, lm_head, norm")
        names += [name for name, _ in found if name not in names]
    return names


def add_adapter(model: Any, config: TrainConfig) -> Any:
    """`model` with a fresh LoRA adapter in float32. Raises UsageError for a lora_target it does not have."""
    from peft import LoraConfig, get_peft_model

    targets = list(config.lora_target)
    whole = _trained_whole(model, config)
    pissa = "pissa" if config.pissa_iter < 0 else f"pissa_niter_{config.pissa_iter}"
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if "all" in targets else targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=pissa if config.pissa_init else True,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(model.config.tie_word_embeddings and set(whole) & set(_tables(model))),
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
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16 if config.pure_bf16 else torch.float32)
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
    """`model` (in float32) with every weight to be trained, or with some layers (finetuning_type: freeze).

    Raises UsageError for names of parts that it does not have.
    """
    torch.manual_seed(config.seed)
    chosen = (lambda name: True) if config.finetuning_type == "full" else _chosen(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and chosen(name))
    if not config.disable_gradient_checkpointing:
        _checkpoint(model)
    return model


def _chosen(model: Any, config: TrainConfig) -> Callable[[str], bool]:
    """Whether a parameter, by its name, is one of those that freeze tuning trains."""
    count, wanted = int(model.config.get_text_config().num_hidden_layers), config.freeze_trainable_layers
    if not 0 < abs(wanted) <= count:
        raise UsageError(f"freeze_trainable_layers: {wanted}: the model has {count} layers", f"1 to {count}")
    layers = range(count - wanted, count) if wanted > 0 else range(-wanted)
    names = [name for name, _ in model.named_parameters()]
    inside = {match[2] for name in names if (match := _IN_LAYER.match(name))}
    outside = {part for name in names if not _IN_LAYER.match(name) for part in name.split(".")[:-1]}
    modules, extra = set(config.freeze_trainable_modules), set(config.freeze_extra_modules or ())
    for key, asked, known in (
        ("freeze_trainable_modules", modules - {"all"}, inside),
        ("freeze_extra_modules", extra, outside),
    ):
        if asked - known:
            hint = f"it has {', '.join(sorted(known))}"
            raise UsageError(f"{key}: the model has no {', '.join(sorted(asked - known))}", hint)

    def chosen(name: str) -> bool:
        if match := _IN_LAYER.match(name):
            return int(match[1]) in layers and ("all" in modules or match[2] in modules)
        return bool(extra & set(name.split(".")))

    return chosen
