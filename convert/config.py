"""Training configuration: a LLaMA-Factory style YAML, typed and checked before anything heavy is imported.

Names and defaults are LLaMA-Factory's and, for the trainer's keys, transformers'. A key we know but cannot
honour is an error that says so; one that cannot change the result is accepted, with a warning where a user
could expect it to do something.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from convert.config_keys import ACCEPTED, FIELDS, REQUIRED, TrainConfig
from edge.errors import InputError, UsageError

__all__ = ["FIELDS", "TrainConfig", "as_yaml", "load_train_config", "parse"]

# Rates beyond these teach nothing, or break the model; for each kind of training (lowest, highest).
_RATES = {"lora": (1e-6, 5e-3), "full": (1e-7, 5e-4), "dpo": (1e-8, 1e-4)}


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
        kind = FIELDS[key].metadata["kind"] if key in FIELDS else ""
        value = ("null", "none", "~", *(("true", "false") if kind == "resume" else ()))
        plain = kind in ("text", "names", "resume") and text not in value
        given[key] = text if plain else _scalar(key, text)
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
        allowed, note = ACCEPTED[key]
        if isinstance(allowed, tuple) and value not in allowed:
            raise UsageError(
                f"{key}: {value!r} is known from LLaMA-Factory, but not supported yet",
                f"leave it out, or give {' or '.join(repr(one) for one in allowed)}",
            )
        if note and value not in (None, False):
            warnings.append(f"{key} {note}")
    for key in REQUIRED:
        if not values.get(key):
            raise UsageError(f"{key} is missing", f"{key}: {FIELDS[key].metadata['help']}")
    config = TrainConfig(**values)
    _check_together(config)
    return dataclasses.replace(config, warnings=(*warnings, *_doubts(config)))


def as_yaml(config: TrainConfig) -> str:
    """Every key with its value, defaults included, as YAML that `load_train_config` reads back."""
    values: dict[str, Any] = {}
    for name in FIELDS:
        value = getattr(config, name)
        values[name] = ",".join(str(one) for one in value) if isinstance(value, tuple) else value
    if values["resume_from_checkpoint"] == "auto":
        values["resume_from_checkpoint"] = True
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=1000)


def _check_together(config: TrainConfig) -> None:
    """Raise UsageError for values that exclude each other."""
    if config.bf16 and config.fp16:
        raise UsageError("bf16 and fp16 are both true", "keep one")
    if config.max_steps == 0:
        raise UsageError("max_steps: 0 would train nothing", "give a count, or -1 to go by epochs")
    if config.val_size >= 1 and config.val_size != int(config.val_size):
        raise UsageError(
            f"val_size: {config.val_size} is neither a fraction nor a count", "below 1, or a whole number"
        )
    if config.val_size and config.eval_dataset:
        raise UsageError("val_size and eval_dataset both say what to evaluate on", "keep one")
    watched = bool(config.val_size or config.eval_dataset)
    asks = [key for key in ("early_stopping_steps", "load_best_model_at_end") if getattr(config, key)]
    if asks and (not watched or config.eval_strategy == "no"):
        raise UsageError(
            f"{asks[0]} needs evaluations during training",
            "give val_size or eval_dataset, and eval_strategy: steps (or epoch)",
        )
    if config.eval_strategy != "no" and not watched:
        raise UsageError(
            f"eval_strategy: {config.eval_strategy} has nothing to evaluate on",
            "give val_size or eval_dataset",
        )
    if config.finetuning_type == "full" and config.quantization_bit:
        raise UsageError(
            "finetuning_type: full cannot train 4-bit weights",
            "leave quantization_bit out, or train with lora",
        )
    if config.finetuning_type == "full":
        keys = ("use_dora", "pissa_init", "loftq_init", "use_rslora", "adapter_name_or_path")
        lora = [key for key in keys if getattr(config, key)]
        if lora:
            raise UsageError(f"{lora[0]} belongs to finetuning_type: lora", "leave it out")
    if config.pissa_init and config.quantization_bit:
        raise UsageError(
            "pissa_init changes the base's weights, which 4 bits would round off again",
            "leave quantization_bit out (16-bit LoRA), or pissa_init",
        )
    if config.loftq_init and config.quantization_bit != 4:
        raise UsageError("loftq_init starts from what 4 bits lost", "add quantization_bit: 4")
    if config.loftq_init and config.use_dora:
        raise UsageError("loftq_init and use_dora cannot go together", "keep one of them")
    for key in ("pissa_init", "loftq_init"):
        if getattr(config, key) and config.adapter_name_or_path:
            raise UsageError(
                f"{key} starts a new adapter, adapter_name_or_path goes on from one", "keep one of them"
            )
    if config.stage == "dpo" and (config.packs or config.train_on_prompt):
        key = "packing" if config.packs else "train_on_prompt"
        raise UsageError(f"{key} has no meaning in stage: dpo", "leave it out")
    if config.stage == "dpo" and config.pref_loss in ("orpo", "simpo") and config.dpo_label_smoothing:
        raise UsageError(
            f"dpo_label_smoothing has no meaning with pref_loss: {config.pref_loss}", "leave it out"
        )
    mixed = config.mix_strategy != "concat"
    if config.interleave_probs and (not mixed or len(config.interleave_probs) != len(config.dataset)):
        raise UsageError(
            "interleave_probs needs mix_strategy: interleave_under (or _over), and a share for each of the "
            f" {len(config.dataset)} data sets"
        )
    if (
        mixed
        and config.interleave_probs
        and not math.isclose(sum(config.interleave_probs), 1.0, abs_tol=1e-3)
    ):
        raise UsageError(f"interleave_probs add up to {sum(config.interleave_probs):g}, not to 1")
    if config.warmup_steps and 0 < config.max_steps <= config.warmup_steps:
        raise UsageError(
            f"warmup_steps: {config.warmup_steps} takes all {config.max_steps} steps",
            "lower it: the rate never arrives",
        )


def _doubts(config: TrainConfig) -> list[str]:
    """Warnings on values that are allowed and hardly meant."""
    kind = "dpo" if config.stage == "dpo" else config.finetuning_type
    low, high = _RATES[kind]
    said = []
    if not low <= config.learning_rate <= high:
        effect = "teaches next to nothing" if config.learning_rate < low else "usually destroys the model"
        said.append(
            f"learning_rate {config.learning_rate:g} {effect} with {kind}: {low:g} to {high:g} is usual"
        )
    if config.finetuning_type == "lora" and config.alpha > 8 * config.lora_rank and not config.use_rslora:
        said.append(f"lora_alpha {config.alpha} is more than eight times lora_rank {config.lora_rank}")
    if config.warmup_ratio > 0.5 and not config.warmup_steps:
        said.append(f"warmup_ratio {config.warmup_ratio:g}: most of the steps only warm up")
    if config.num_train_epochs > 30 and config.max_steps < 0:
        said.append(f"num_train_epochs {config.num_train_epochs:g}: rows are learnt by heart long before")
    return said


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
    if key in FIELDS or key in ACCEPTED:
        return
    near = difflib.get_close_matches(key, [*FIELDS, *ACCEPTED], n=1, cutoff=0.6)
    raise UsageError(
        f"unknown key '{key}'", f"did you mean '{near[0]}'?" if near else "keys: " + ", ".join(FIELDS)
    )


def _typed(key: str, value: Any) -> Any:
    """`value` as the field's kind, within its limits; UsageError names the field otherwise."""
    one = FIELDS[key]
    kind, meta = one.metadata["kind"], one.metadata
    if kind == "resume" and isinstance(value, bool):
        return "auto" if value else None
    if key == "report_to" and value == []:
        return ("none",)
    if value is False and "no" in meta.get("choices", ()):
        return "no"  # what YAML 1.1 makes of a bare `no`
    if value is None or (isinstance(value, str) and value.lower() == "none" and one.default is None):
        # null stands for the default, but for enable_thinking it is a mode of its own.
        return None if kind == "bool?" or one.default is MISSING else one.default
    converted = _convert(kind, value)
    if converted is None:
        wanted = {
            "int": "a whole number", "float": "a number", "text": "text", "names": "names",
            "floats": "numbers", "resume": "true, false or a path",
        }  # fmt: skip
        raise UsageError(
            f"{key}: {value!r} is not {wanted.get(kind, 'true or false')}", f"{key}: {meta['help']}"
        )
    for name in converted if "of" in meta else ():
        if name not in meta["of"]:
            raise UsageError(f"{key}: {name!r} is not supported", f"one of {', '.join(meta['of'])}")
    if isinstance(converted, tuple):
        return converted
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
    if kind == "floats":
        parts = value.split(",") if isinstance(value, str) else value
        numbers = [_convert("float", part) for part in parts] if isinstance(parts, list) else [None]
        return None if any(not number or number < 0 for number in numbers) else tuple(numbers)
    if kind == "names":
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return None
        return tuple(name.strip() for name in names if name.strip()) or None
    if kind in ("text", "resume"):
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
