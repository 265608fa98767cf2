"""Training configuration: a LLaMA-Factory style YAML, typed and checked before anything heavy is imported.

Names and defaults are LLaMA-Factory's and, for the trainer's keys, transformers'. A key we know but cannot
honour is an error that says so; one that cannot change the result is accepted, with a warning where a user
could expect it to do something.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from edge.errors import InputError, UsageError

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit")
_ANY = object()


def _key(default: Any, kind: str, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Each field's metadata has its kind, its help text and its limits."""

    # Model
    model_name_or_path: str = _key(MISSING, "text", "a folder in transformers' format, or a hub id")
    model_revision: str = _key("main", "text", "branch, tag or commit on the hub")
    quantization_bit: int | None = _key(
        None, "int", "4: train over NF4 weights (QLoRA); none: over 16-bit weights", choices=(4,)
    )
    double_quantization: bool = _key(True, "bool", "quantise the scales of the 4-bit blocks too")
    disable_gradient_checkpointing: bool = _key(
        False, "bool", "keep activations: faster by a third, needs more memory"
    )
    # Method
    lora_rank: int = _key(8, "int", "rank of the adapter", low=1)
    lora_alpha: int | None = _key(None, "int", "scale of the adapter; none: twice the rank", low=1)
    lora_dropout: float = _key(0.0, "float", "dropout before the adapter", low=0.0, below=1.0)
    lora_target: tuple[str, ...] = _key(
        ("all",), "names", "names of the layers to adapt; all: every linear layer except the output head"
    )
    use_rslora: bool = _key(False, "bool", "scale by alpha/sqrt(rank) in place of alpha/rank")
    # Data
    dataset: tuple[str, ...] = _key(MISSING, "names", "names in dataset_info.json, separated by commas")
    dataset_dir: str = _key("data", "text", "the folder with dataset_info.json")
    template: str | None = _key(
        None, "text", "LLaMA-Factory's template name: checked only, the model's own chat template is used"
    )
    cutoff_len: int = _key(2048, "int", "longest row in tokens; longer ones are cut, and counted", low=8)
    max_samples: int | None = _key(None, "int", "at most so many rows of each data set", low=1)
    val_size: float = _key(0.0, "float", "rows held out: below 1 a fraction, from 1 a count", low=0.0)
    mask_history: bool = _key(False, "bool", "no loss on answers before the last one")
    default_system: str | None = _key(None, "text", "system message for rows that have none")
    enable_thinking: bool | None = _key(
        True, "bool?", "rows without a thought, true: learn an empty one; false: get it in the prompt; "
        "null: are left alone (only for templates that think)",
    )  # fmt: skip
    strict: bool = _key(False, "bool", "stop at bad rows in place of leaving them out")
    # Trainer
    output_dir: str = _key(MISSING, "text", "the run folder; the adapter goes to output_dir/adapter")
    per_device_train_batch_size: int = _key(8, "int", "rows in one forward pass", low=1)
    per_device_eval_batch_size: int = _key(8, "int", "rows in one forward pass of validation", low=1)
    gradient_accumulation_steps: int = _key(1, "int", "forward passes in one optimizer step", low=1)
    learning_rate: float = _key(5e-5, "float", "peak learning rate", above=0.0)
    num_train_epochs: float = _key(3.0, "float", "passes over the data", above=0.0)
    max_steps: int = _key(-1, "int", "stop after so many optimizer steps; -1: by epochs", low=-1)
    lr_scheduler_type: str = _key("linear", "text", "shape of the learning rate", choices=SCHEDULES)
    warmup_ratio: float = _key(0.0, "float", "share of the steps that warm up", low=0.0, high=1.0)
    warmup_steps: int = _key(0, "int", "steps that warm up; wins over warmup_ratio", low=0)
    max_grad_norm: float = _key(1.0, "float", "longer gradients are scaled down to this; 0: never", low=0.0)
    weight_decay: float = _key(0.0, "float", "AdamW's weight decay", low=0.0)
    optim: str = _key("adamw_torch", "text", "the optimizer; paged_adamw_8bit needs CUDA", choices=OPTIMIZERS)
    bf16: bool = _key(False, "bool", "compute in bfloat16")
    fp16: bool = _key(False, "bool", "compute in float16")
    use_cpu: bool = _key(False, "bool", "train on the CPU even where there is a GPU")
    logging_steps: int = _key(5, "int", "steps between two lines of trainer_log.jsonl", low=1)
    seed: int = _key(42, "int", "of shuffling, of the adapter's start and of dropout", low=0)
    # Not a key: what was accepted without effect.
    warnings: tuple[str, ...] = ()

    @property
    def alpha(self) -> int:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


FIELDS = {one.name: one for one in fields(TrainConfig) if one.metadata}
_REQUIRED = ("model_name_or_path", "dataset", "output_dir")

# Keys of LLaMA-Factory that we do not act on: the values that change nothing here, and what to say of them.
_NO_CODE = "is ignored: models are loaded with transformers' own classes, code from a repository is never run"
_NO_CHECKPOINTS = "is ignored: checkpoints are not written yet, only the finished adapter"
_AT_END = "is ignored: validation loss is computed once, at the end, when val_size is set"
_ACCEPTED: dict[str, tuple[tuple[Any, ...] | object, str]] = {
    "adapter_name_or_path": ((None,), ""),
    "add_tokens": ((None,), ""),
    "additional_target": ((None,), ""),
    "cache_dir": ((None,), ""),
    "compute_accuracy": ((False,), ""),
    "create_new_adapter": ((False,), ""),
    "dataloader_num_workers": (_ANY, ""),
    "ddp_timeout": (_ANY, ""),
    "disable_shuffling": ((False,), ""),
    "do_eval": (_ANY, _AT_END),
    "do_train": ((True,), ""),
    "early_stopping_steps": ((None,), ""),
    "enable_liger_kernel": ((False,), ""),
    "eval_dataset": ((None,), ""),
    "eval_steps": (_ANY, _AT_END),
    "eval_strategy": (_ANY, _AT_END),
    "finetuning_type": (("lora",), ""),
    "flash_attn": (("auto", "sdpa"), ""),
    "include_num_input_tokens_seen": (_ANY, ""),
    "interleave_probs": ((None,), ""),
    "loraplus_lr_ratio": ((None,), ""),
    "low_cpu_mem_usage": (_ANY, ""),
    "mix_strategy": (("concat",), ""),
    "neat_packing": ((False,), ""),
    "neftune_noise_alpha": ((None, 0), ""),
    "overwrite_cache": (_ANY, ""),
    "overwrite_output_dir": (_ANY, "is ignored: --overwrite replaces an earlier adapter"),
    "packing": ((False, None), ""),
    "pissa_init": ((False,), ""),
    "pissa_iter": (_ANY, ""),
    "plot_loss": (_ANY, "is ignored: the losses are in trainer_log.jsonl"),
    "pref_beta": (_ANY, ""),
    "pref_ftx": (_ANY, ""),
    "pref_loss": (_ANY, ""),
    "preprocessing_num_workers": (_ANY, ""),
    "pure_bf16": ((False,), ""),
    "quantization_method": (("bnb", "bitsandbytes"), ""),
    "quantization_type": (("nf4",), ""),
    "ray_num_workers": (_ANY, ""),
    "report_to": (("none", None, [], ["none"]), ""),
    "resize_vocab": ((False,), ""),
    "resume_from_checkpoint": ((None, False), ""),
    "rope_scaling": ((None,), ""),
    "save_only_model": (_ANY, ""),
    "save_steps": (_ANY, _NO_CHECKPOINTS),
    "save_strategy": (_ANY, _NO_CHECKPOINTS),
    "save_total_limit": (_ANY, ""),
    "simpo_gamma": (_ANY, ""),
    "dpo_label_smoothing": (_ANY, ""),
    "stage": (("sft",), ""),
    "streaming": ((False,), ""),
    "tokenized_path": ((None,), ""),
    "train_on_prompt": ((False,), ""),
    "trust_remote_code": (_ANY, _NO_CODE),
    "upcast_layernorm": ((False,), ""),
    "use_dora": ((False,), ""),
    "use_fast_tokenizer": ((True,), ""),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_train_config(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read `path` and apply `overrides` ("key=value", later ones win).

    Raises InputError where the file is missing or no YAML mapping; UsageError, which names the key, for an
    unknown key (with the nearest known name), a value of the wrong type or range, a missing key, and a
    LLaMA-Factory feature that is not supported.
    """
    given = _read(path)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        key = key.strip().removeprefix("--")
        if not separator or not key:
            raise UsageError(f"'{override}' is no key=value", "e.g. learning_rate=1e-4")
        _check_known(key)
        plain = key in FIELDS and FIELDS[key].metadata["kind"] in ("text", "names")
        given[key] = text if plain and text not in ("null", "none", "~") else _scalar(key, text)
    return parse(given)


def parse(given: dict[str, Any]) -> TrainConfig:
    """A mapping of keys to values as a TrainConfig. Raises UsageError as `load_train_config`."""
    values: dict[str, Any] = {}
    warnings = []
    for key, value in given.items():
        _check_known(key)
        if key in FIELDS:
            values[key] = _typed(key, value)
            continue
        allowed, note = _ACCEPTED[key]
        if isinstance(allowed, tuple) and value not in allowed:
            raise UsageError(
                f"{key}: {value!r} is known from LLaMA-Factory, but not supported yet",
                f"leave it out, or give {' or '.join(repr(one) for one in allowed)}",
            )
        if note and value not in (None, False):
            warnings.append(f"{key} {note}")
    for key in _REQUIRED:
        if not values.get(key):
            raise UsageError(f"{key} is missing", f"{key}: {FIELDS[key].metadata['help']}")
    config = TrainConfig(**values, warnings=tuple(warnings))
    if config.bf16 and config.fp16:
        raise UsageError("bf16 and fp16 are both true", "keep one")
    if config.max_steps == 0:
        raise UsageError("max_steps: 0 would train nothing", "give a count, or -1 to go by epochs")
    if config.val_size >= 1 and config.val_size != int(config.val_size):
        raise UsageError(
            f"val_size: {config.val_size} is neither a fraction nor a count", "below 1, or a whole number"
        )
    return config


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no such file: {path}", "give a YAML file, e.g. examples/smollm2_qlora.yaml")
    try:
        # utf-8-sig: editors on Windows begin the file with a byte-order mark.
        # A _Loader is a SafeLoader: it builds plain values only.
        data = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}", "save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no `key: value` lines", "see examples/smollm2_qlora.yaml")
    return {str(key): value for key, value in data.items()}


def _scalar(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: {text!r} cannot be read as a value") from error


def _check_known(key: str) -> None:
    if key in FIELDS or key in _ACCEPTED:
        return
    near = difflib.get_close_matches(key, [*FIELDS, *_ACCEPTED], n=1, cutoff=0.6)
    raise UsageError(
        f"unknown key '{key}'", f"did you mean '{near[0]}'?" if near else "keys: " + ", ".join(FIELDS)
    )


def _typed(key: str, value: Any) -> Any:
    """`value` as the field's kind, within its limits; UsageError names the field otherwise."""
    one = FIELDS[key]
    kind, meta = one.metadata["kind"], one.metadata
    if value is None or (isinstance(value, str) and value.lower() == "none" and one.default is None):
        # null stands for the default, but for enable_thinking it is a mode of its own.
        return None if kind == "bool?" or one.default is MISSING else one.default
    converted = _convert(kind, value)
    if converted is None:
        wanted = {"int": "a whole number", "float": "a number", "text": "text", "names": "names"}
        raise UsageError(
            f"{key}: {value!r} is not {wanted.get(kind, 'true or false')}", f"{key}: {meta['help']}"
        )
    choices = meta.get("choices")
    if choices and converted not in choices:
        raise UsageError(
            f"{key}: {value!r} is not supported", f"one of {', '.join(str(one) for one in choices)}"
        )
    low, high, above, below = (meta.get(limit) for limit in ("low", "high", "above", "below"))
    wanted_range = (
        f"at least {low}" if low is not None and converted < low
        else f"above {above}" if above is not None and not converted > above
        else f"at most {high}" if high is not None and converted > high
        else f"below {below}" if below is not None and not converted < below
        else ""
    )  # fmt: skip
    if wanted_range:
        raise UsageError(f"{key}: {value!r} must be {wanted_range}", f"{key}: {meta['help']}")
    return converted


def _convert(kind: str, value: Any) -> Any:
    """None where `value` is not of `kind`."""
    if kind in ("bool", "bool?"):
        return value if isinstance(value, bool) else None
    if kind == "names":
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return None
        return tuple(name.strip() for name in names if name.strip()) or None
    if kind == "text":
        if isinstance(value, str):
            return value.strip() or None
        # A model or data set may be called 123 or 1.5: YAML makes a number of it.
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        # YAML 1.1 reads 1e-4 as text: without a dot it is no number there.
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    if kind == "int":
        return int(number) if number == int(number) else None
    return number
