"""QLoRA: a LoRA adapter trained over a base model in 4 bits (NF4), from a LLaMA-Factory style YAML.

    edge train examples/smollm2_qlora.yaml learning_rate=2e-4

The adapter goes to OUTPUT_DIR/adapter in peft's format, with tokenizer, chat template and edge.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convert import data, encode, loop, template
from convert.folder import check_folder
from edge import manifest
from edge.config import TrainConfig, load_train_config
from edge.errors import InputError, UsageError

BLOCK = 64
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")
# Above this, eager attention's square matrices cost more than they save on a CPU.
_EAGER_LONGEST = 512


@dataclass
class Place:
    """Where and how to compute. notes: what differs from what was asked, and why."""

    device: str
    dtype: torch.dtype
    four_bit: bool
    notes: list[str] = field(default_factory=list)


def choose_place(config: TrainConfig) -> Place:
    """CUDA, then MPS, then the CPU; and the type that is asked for where the device has it."""
    four_bit = config.quantization_bit == 4
    asked = "bf16" if config.bf16 else "fp16" if config.fp16 else None
    if torch.cuda.is_available() and not config.use_cpu:
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
        place.notes.append(f"{asked} is slow on this CPU: computing in {str(dtype).removeprefix('torch.')}")
    return place


def load_model(folder: Path, place: Place, *, double_quant: bool = True, attention: str = "sdpa") -> Any:
    """The base model in `folder` on its place, in NF4 but for embeddings and output head if `four_bit`."""
    # It would advise to install a kernel that only serves inference.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
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
        )
    if place.device != "cpu":
        how["device_map"] = {"": place.device}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **how)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder} cannot be loaded: {first}", "get the model again: edge pull") from error
    keep_unpacked(model)
    return model


def keep_unpacked(model: Any) -> None:
    """Leave 4-bit weights in the layout that gradients need.

    On CPUs with AVX512-BF16 bitsandbytes repacks them at the first forward pass in eval mode, and its
    backward pass then reads them in the wrong order.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_layers(model: Any) -> list[str]:
    """Names of the 4-bit layers, with `*` for the number of a layer."""
    from bitsandbytes.nn import Linear4bit

    names = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})


def add_adapter(model: Any, config: TrainConfig) -> Any:
    """`model` with a fresh LoRA adapter in float32. Raises UsageError for a lora_target it does not have."""
    from peft import LoraConfig, get_peft_model

    targets = list(config.lora_target)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if "all" in targets else targets,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    try:
        with warnings.catch_warnings():
            # peft asks transformers by an old name.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise UsageError(f"lora_target: {', '.join(targets)}: {str(error).splitlines()[0]}") from error
    adapted.peft_config["default"].base_model_name_or_path = config.model_name_or_path
    if not config.disable_gradient_checkpointing:
        adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return adapted


def base_folder(name: str, revision: str | None) -> Path:
    """The folder of the base model, checked: `name` itself, or what the hub has under it."""
    folder = Path(name)
    if not folder.is_dir():
        from convert.pull import resolve

        folder = resolve(name, revision)
    return check_folder(folder, shown=name).path


def run(config: TrainConfig, *, overwrite: bool = False, console: Console | None = None) -> Path:
    """Train an adapter as `config` says and publish it to output_dir/adapter, whose path is returned.

    Raises EdgeError subclasses for a base model, data or values that cannot be used, ExistsError without
    `overwrite`, and EdgeError at the first loss that is no number; nothing is left of a failed run.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    target = Path(config.output_dir) / "adapter"
    manifest.check_target(target, overwrite)
    base = base_folder(config.model_name_or_path, config.model_revision)
    form = template.load(base)
    said = [*config.warnings, template.check_name(config.template, form), *form.warnings]
    rows, report = data.load(
        config.dataset, Path(config.dataset_dir), max_samples=config.max_samples, strict=config.strict
    )
    train_rows, val_rows = data.split(rows, config.val_size, config.seed)
    options = {
        "cutoff_len": config.cutoff_len,
        "enable_thinking": config.enable_thinking,
        "mask_history": config.mask_history,
        "default_system": config.default_system,
    }
    samples, held = (encode.encode(part, form, report, **options) for part in (train_rows, val_rows))
    if not samples:
        raise InputError("no row is left to train on: " + "; ".join(report.lines()), "raise cutoff_len")
    if config.default_system is not None:
        said.append("default_system is trained in: send the same system message when you ask the model")
    place = choose_place(config)
    for line in [*filter(None, said), *report.lines(), *place.notes]:
        console.print(f"note: {line}", style="yellow")
    longest = max(len(sample.ids) for sample in samples)
    kind = "NF4" if place.four_bit else "16-bit" if place.dtype != torch.float32 else "32-bit"
    console.print(
        f"{len(samples)} rows to train on, {len(held)} held out, longest {longest} tokens; "
        f"{Path(config.model_name_or_path).name} in {kind} on {place.device}, "
        f"computing in {str(place.dtype).removeprefix('torch.')}"
    )
    with loop.out_of_memory(config), manifest.publish(target, overwrite=overwrite) as partial:
        eager = place.device == "cpu" and longest <= _EAGER_LONGEST
        model = load_model(
            base,
            place,
            double_quant=config.double_quantization,
            attention="eager" if eager else "sdpa",
        )
        quantized = quantized_layers(model) if place.four_bit else []
        model = add_adapter(model, config)
        state = _train(model, samples, config, place, partial, console)
        found: dict[str, Any] = {"train_loss": state.loss}
        if held:
            found["eval_loss"] = loop.evaluate(
                model, held, size=config.per_device_eval_batch_size, device=place.device
            )
            console.print(f"validation loss {found['eval_loss']:.4f} on {len(held)} rows")
        _save(model, partial, form, state, found)
        manifest.write(
            partial,
            manifest.Manifest(
                stage="adapter",
                name=Path(config.output_dir).absolute().name,
                **_parent(base, config),
                settings={
                    **{key: value for key, value in dataclasses.asdict(config).items() if key != "warnings"},
                    "alpha": config.alpha,
                    "device": place.device,
                    "compute_dtype": str(place.dtype).removeprefix("torch."),
                    "quantized": quantized,
                    "quant_block": BLOCK,
                    "data": report.numbers(),
                    "steps": state.step,
                    "seconds": round(state.seconds, 2),
                    "tokens_per_second": round(state.tokens_per_second, 1),
                    **found,
                },
                chat_template=manifest.text_digest(form.source),
                stop_ids=form.stop_ids,
                thinking=template.thinking_mode(form, config.enable_thinking),
                versions=manifest.versions(*_PACKAGES),
            ),
        )
    console.print(
        f"{target}: {state.step} steps in {state.seconds:.0f} s, {state.tokens_per_second:.0f} tokens/s, "
        f"last loss {state.loss:.4f}"
    )
    return target


def _parent(base: Path, config: TrainConfig) -> dict[str, Any]:
    """base_model and parents of the adapter's manifest."""
    if (base / manifest.FILE).is_file():
        known = manifest.read(base)
        return {
            "base_model": known.base_model or known.name,
            "parents": [known.parent(base.absolute())],
        }
    parent = {"stage": "model", "path": str(base.absolute()), "digest": ""}
    return {"base_model": config.model_name_or_path, "parents": [parent]}


def _train(
    model: Any,
    samples: list[encode.Sample],
    config: TrainConfig,
    place: Place,
    folder: Path,
    console: Console,
) -> loop.Progress:
    """The loop with a progress bar on a terminal, lines elsewhere, and trainer_log.jsonl in `folder`."""
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    total = loop.total_steps(config, len(samples))
    with bar, (folder / "trainer_log.jsonl").open("w", encoding="utf-8") as log:
        task = bar.add_task("training", total=total, loss=float("nan"), speed=0.0)

        def report(state: loop.Progress) -> None:
            bar.update(task, completed=state.step, loss=state.loss, speed=state.tokens_per_second)
            if state.step % config.logging_steps and state.step != state.total:
                return
            line = {
                "current_steps": state.step,
                "total_steps": state.total,
                "loss": round(state.loss, 6),
                "lr": state.rate,
                "grad_norm": round(state.norm, 4),
                "epoch": round(state.epoch, 4),
                "percentage": round(100 * state.step / state.total, 2),
                "elapsed_time": round(state.seconds, 2),
                "remaining_time": round(state.remaining, 2),
                "throughput": round(state.tokens_per_second, 2),
                "total_tokens": state.tokens,
            }
            state.history.append(line)
            log.write(json.dumps(line) + "\n")
            log.flush()
            if not console.is_terminal:
                console.print(
                    f"step {state.step}/{state.total}  loss {state.loss:.4f}  "
                    f"{state.tokens_per_second:.0f} tokens/s  {state.remaining:.0f} s left"
                )

        return loop.train(model, samples, config, device=place.device, dtype=place.dtype, report=report)


def _save(
    model: Any, folder: Path, form: template.ChatFormat, state: loop.Progress, found: dict[str, Any]
) -> None:
    # Not "auto": that would ask a hub whether the base's vocabulary was changed.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    copy_tokenizer(form.folder, folder, form.source)
    if "eval_loss" in found:
        state.history.append({"current_steps": state.step, **found})
        with (folder / "trainer_log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(state.history[-1]) + "\n")
    summary = {
        "global_step": state.step,
        "max_steps": state.total,
        "epoch": state.epoch,
        "train_runtime": state.seconds,
        "total_tokens": state.tokens,
        **found,
        "log_history": state.history,
    }
    (folder / "trainer_state.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path, chat_template: str) -> None:
    """The tokenizer's files byte for byte, and the chat template as a file of its own."""
    for name in template.FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    (target / "chat_template.jinja").write_bytes(chat_template.encode("utf-8"))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge train", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="keys as in LLaMA-Factory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier adapter")
    options = parser.parse_intermixed_args(argv)
    run(load_train_config(options.config, options.overrides), overwrite=options.overwrite)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
