"""Training configuration: a LLaMA-Factory style YAML, typed and checked before anything heavy is imported.

Names and defaults are LLaMA-Factory's and, for the trainer's keys, transformers'. A key we know but cannot
honour is an error that says so; one that cannot change the result is accepted, with a warning where a user
could expect it to do something.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, asdict, replace
from pathlib import Path
from typing import Any

import yaml

from convert.config_keys import FIELDS, KINDS, NUMBER, REQUIRED, Key, TrainConfig, plain
from convert.config_unused import UNUSED
from edge.errors import InputError, UsageError

# (what is wrong, what to do) of values that exclude each other.
Clashes = Iterator[tuple[str, str]]

__all__ = ["FIELDS", "PATHS", "TrainConfig", "absolute", "as_yaml", "load_train_config", "parse", "recorded"]

PATHS = ("model_name_or_path", "dataset_dir", "output_dir")

# Rates beyond these teach nothing, or break the model; for each kind of training (lowest, highest).
_RATES = {"lora": (1e-6, 5e-3), "full": (1e-7, 5e-4), "freeze": (1e-7, 5e-4)}
_RATES |= dict.fromkeys(("dpo", "kto"), (1e-8, 1e-4))

# What a key of other programs is here.
_MEANT = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs",
    "train_batch_size": "per_device_train_batch_size", "r": "lora_rank", "alpha": "lora_alpha",
    "target_modules": "lora_target", "max_seq_length": "cutoff_len", "max_seq_len": "cutoff_len",
    "model": "model_name_or_path", "base_model": "model_name_or_path", "data_path": "dataset_dir",
    "load_in_4bit": "quantization_bit: 4", "load_in_8bit": "quantization_bit: 8", "attn": "flash_attn",
    "attn_implementation": "flash_attn", "system": "default_system", "max_steps_per_epoch": "max_steps",
}  # fmt: skip

_ESCAPES = "a backslash in double quotes begins an escape: write the path without quotes"
_QUOTES = re.compile("[‘’“”].*[‘’“”]$")


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


def load_train_config(
    path: Path | None, overrides: list[str] | None = None, needs: tuple[str, ...] = REQUIRED
) -> TrainConfig:
    """Read `path` and apply `overrides` ("key=value", later ones win); None: these alone.

    needs: the keys that must be given.
    Raises InputError where the file is missing or no YAML mapping; UsageError, which names the file and the
    key, for an unknown key (with the nearest known name), a value of the wrong type or range, a missing key,
    and a LLaMA-Factory feature that is not supported.
    """
    given = _read(path) if path else {}
    overridden = set()
    for override in overrides or []:
        key, separator, text = override.partition("=")
        key = key.strip().removeprefix("--")
        if not separator or not key:
            raise UsageError(f"'{override}' is no key=value", "e.g. learning_rate=1e-4")
        _check_known(key)
        kind = FIELDS[key].kind if key in FIELDS else ""
        values = ("null", "none", "~", *(("true", "false") if kind == "resume" else ()))
        as_text = kind in ("text", "names", "resume") and text not in values
        given[key] = text if as_text else _scalar(key, text)
        overridden.add(key)
    try:
        return parse(given, needs)
    except UsageError as error:
        # What was given beside the file is not in it.
        if path is None or overridden & {*re.findall(r"\w+", error.message)}:
            raise
        raise UsageError(f"{path}: {error.message}", error.hint) from error


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The keys of `config` as a run records them: paths absolute, for stages run in other working folders."""
    keys = {name: value for name, value in asdict(config).items() if name in FIELDS}
    # ONLINE names the hub, whatever lies in the working folder.
    paths: dict[str, Any] = {name: absolute(keys[name]) for name in PATHS if keys[name] != "ONLINE"}
    if keys["adapter_name_or_path"]:
        paths["adapter_name_or_path"] = tuple(absolute(path) for path in keys["adapter_name_or_path"])
    return keys | paths


def absolute(path: str | None) -> str | None:
    """`path` from the root where it exists; what does not, such as a hub id, stays as it is."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def parse(given: dict[str, Any], needs: tuple[str, ...] = REQUIRED) -> TrainConfig:
    """A mapping of keys to values as a TrainConfig. Raises UsageError as `load_train_config`."""
    values: dict[str, Any] = {"packing": True} if given.get("stage") == "pt" else {}
    warnings = []
    if given.get("stage") in ("rm", "ppo"):
        raise UsageError(
            f"stage: {given['stage']}: reward models and PPO are not trained here",
            "stage: dpo learns from pairs of answers, stage: kto from answers marked good or bad",
        )
    for key, value in given.items():
        _check_known(key)
        if key in FIELDS:
            values[key] = _typed(key, value)
            continue
        unused = UNUSED[key]
        if unused.values is not None and not unused.takes(value):
            allowed = " or ".join(yaml.safe_dump(item).split("\n")[0] for item in unused.values)
            raise UsageError(
                f"{key}: {value!r} is known from LLaMA-Factory, but not supported yet: {unused.reason}",
                f"leave it out, or give {allowed}" if allowed else "leave it out",
            )
        if unused.warn and value not in (None, False):
            warnings.append(f"{key} is ignored: {unused.reason}")
    for key in REQUIRED:
        only_answers = key == "dataset" and values.get("do_predict") and not values.get("do_train")
        if key in needs and not values.get(key) and not only_answers:
            raise UsageError(f"{key} is missing", f"{key}: {FIELDS[key].help}")
        values.setdefault(key, () if FIELDS[key].kind == "names" else "")
    for key in PATHS:
        if any(ord(character) < 32 for character in values.get(key) or ""):
            raise UsageError(f"{key}: {values[key]!r} holds a control character", _ESCAPES)
        if isinstance(values.get(key), str) and "\\" in values[key] and os.name != "nt":
            values[key], note = _from_windows(key, values[key])
            warnings.append(note)
    config = TrainConfig(**values)
    _check_together(config)
    return replace(config, warnings=(*warnings, *_doubts(config)))


def _from_windows(key: str, path: str) -> tuple[str, str]:
    """A relative path of Windows as one of this system, and a note; UsageError for one with a drive."""
    if re.match(r"[A-Za-z]:|\\\\", path):
        raise UsageError(f"{key}: {path} is a path of Windows", f"give the path on this machine: {key}=PATH")
    here = path.replace("\\", "/")
    return here, f"{key}: {path} is a path of Windows, taken as {here}"


def as_yaml(config: TrainConfig) -> str:
    """Every key with its value, defaults included, as YAML that `load_train_config` reads back."""
    values = {name: plain(getattr(config, name)) for name in FIELDS}
    if values["resume_from_checkpoint"] == "auto":
        values["resume_from_checkpoint"] = True
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=1000)


def _check_together(config: TrainConfig) -> None:
    """Raise UsageError for values that exclude each other."""
    for rules in (_clashes, _evaluation_clashes, _method_clashes, _stage_clashes, _mixing_clashes):
        for message, hint in rules(config):
            raise UsageError(message, hint)


def _clashes(config: TrainConfig) -> Clashes:
    if config.pure_bf16 and (config.fp16 or config.finetuning_type == "freeze"):
        yield "pure_bf16 needs bf16, and finetuning_type: lora or full", "leave it out"
    if config.additional_target and config.finetuning_type != "lora":
        yield "additional_target belongs to finetuning_type: lora", "leave it out"
    if config.compute_accuracy and config.stage not in ("sft", "pt"):
        yield f"compute_accuracy: stage: {config.stage} needs no tokens to be right", "leave it out"
    if config.bf16 and config.fp16:
        yield "bf16 and fp16 are both true", "keep one"
    if config.max_steps == 0:
        yield "max_steps: 0 would train nothing", "give a count, or -1 to go by epochs"
    if config.warmup_steps and 0 < config.max_steps <= config.warmup_steps:
        yield (
            f"warmup_steps: {config.warmup_steps} takes all {config.max_steps} steps",
            "lower it: the peak learning rate is never reached",
        )


def _evaluation_clashes(config: TrainConfig) -> Clashes:
    if config.val_size >= 1 and config.val_size != int(config.val_size):
        yield f"val_size: {config.val_size} is neither a fraction nor a count", "below 1, or a whole number"
    if config.val_size and config.eval_dataset:
        yield "val_size and eval_dataset both say what to evaluate on", "keep one"
    evaluates = bool(config.val_size or config.eval_dataset)
    for key in ("early_stopping_steps", "load_best_model_at_end"):
        if getattr(config, key) and (not evaluates or config.eval_strategy == "no"):
            hint = "give val_size or eval_dataset, and eval_strategy: steps (or epoch)"
            yield f"{key} needs evaluations during training", hint
    if config.do_predict and config.tokenized_path:
        yield "do_predict needs rows as texts, tokenized_path has them encoded", "leave tokenized_path out"
    if config.do_predict and (not evaluates or config.stage != "sft"):
        what = "answers rows of stage: sft" if evaluates else "has nothing to answer"
        yield f"do_predict {what}", "give eval_dataset or val_size, and stage: sft"
    if not config.trains and not config.do_predict:
        yield "do_train: false leaves nothing to do", "leave it out, or add do_predict: true"
    if config.eval_strategy != "no" and not evaluates:
        yield (
            f"eval_strategy: {config.eval_strategy} has nothing to evaluate on",
            "give val_size or eval_dataset",
        )


def _method_clashes(config: TrainConfig) -> Clashes:
    if config.whole:
        if config.quantization_bit:
            hint = "leave quantization_bit out, or train with lora"
            bits = config.quantization_bit
            yield f"finetuning_type: {config.finetuning_type} cannot train {bits}-bit weights", hint
        of_lora = ("use_dora", "pissa_init", "loftq_init", "use_rslora", "loraplus_lr_ratio")
        for key in (*of_lora, "adapter_name_or_path"):
            if getattr(config, key):
                yield f"{key} belongs to finetuning_type: lora", "leave it out"
    if config.grows and (config.adapter_name_or_path or config.fsdp or config.finetuning_type == "freeze"):
        yield (
            "resize_vocab (or add_tokens) trains the tables of tokens in a new adapter, or with all weights",
            "leave out adapter_name_or_path, fsdp and finetuning_type: freeze",
        )
    if config.pissa_init and config.quantization_bit:
        yield (
            "pissa_init changes the base's weights, which fewer bits would round off again",
            "leave quantization_bit out (16-bit LoRA), or pissa_init",
        )
    if config.loftq_init and config.quantization_bit != 4:
        yield "loftq_init starts from the error of 4-bit weights", "add quantization_bit: 4"
    if config.use_dora and config.quantization_bit == 8:
        yield "use_dora cannot be computed over 8-bit weights", "quantization_bit: 4, or leave use_dora out"
    if config.loftq_init and config.use_dora:
        yield "loftq_init and use_dora cannot go together", "keep one of them"
    for key in ("pissa_init", "loftq_init"):
        if getattr(config, key) and config.adapter_name_or_path and not config.create_new_adapter:
            yield (
                f"{key} starts a new adapter, adapter_name_or_path continues from one",
                "keep one of them",
            )


def _stage_clashes(config: TrainConfig) -> Clashes:
    if config.stage == "pt":
        for key in ("train_on_prompt", "mask_history"):
            if getattr(config, key):
                yield f"{key} has no meaning in stage: pt", "leave it out: all tokens are learnt"
    if config.stage == "kto" and config.pref_loss != "sigmoid":
        yield f"pref_loss: {config.pref_loss} has no meaning in stage: kto", "leave it out"
    if config.stage in ("dpo", "kto"):
        if config.packs or config.train_on_prompt:
            key = "packing" if config.packs else "train_on_prompt"
            yield f"{key} has no meaning in stage: {config.stage}", "leave it out"
        if config.pref_loss in ("orpo", "simpo") and config.dpo_label_smoothing:
            yield f"dpo_label_smoothing has no meaning with pref_loss: {config.pref_loss}", "leave it out"


def _mixing_clashes(config: TrainConfig) -> Clashes:
    if not config.interleave_probs:
        return
    if config.mix_strategy == "concat" or len(config.interleave_probs) != len(config.dataset):
        yield (
            "interleave_probs needs mix_strategy: interleave_under (or _over), and a share for each of the "
            f"{len(config.dataset)} data sets",
            "",
        )
    if not math.isclose(sum(config.interleave_probs), 1.0, abs_tol=1e-3):
        yield f"interleave_probs add up to {sum(config.interleave_probs):g}, not to 1", ""


def _doubts(config: TrainConfig) -> list[str]:
    """Warnings on values that are allowed and hardly meant."""
    kind = config.stage if config.stage in ("dpo", "kto") else config.finetuning_type
    low, high = _RATES[kind]
    doubts = []
    if not low <= config.learning_rate <= high:
        effect = "teaches next to nothing" if config.learning_rate < low else "usually destroys the model"
        doubts.append(
            f"learning_rate {config.learning_rate:g} {effect} with {kind}: {low:g} to {high:g} is usual"
        )
    if config.finetuning_type == "lora" and config.alpha > 8 * config.lora_rank and not config.use_rslora:
        doubts.append(f"lora_alpha {config.alpha} is more than eight times lora_rank {config.lora_rank}")
    if config.warmup_ratio > 0.5 and not config.warmup_steps:
        doubts.append(f"warmup_ratio {config.warmup_ratio:g}: most of the steps only warm up")
    if config.flash_attn in ("fa2", "fa3"):
        doubts.append(f"flash_attn: {config.flash_attn} is torch's own fused attention (sdpa) here")
    if config.num_train_epochs > 30 and config.max_steps < 0:
        doubts.append(f"num_train_epochs {config.num_train_epochs:g}: rows are learnt by heart long before")
    return doubts


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no such file: {path}", "give a YAML file, e.g. examples/smollm2_qlora.yaml")
    try:
        # utf-8-sig: editors on Windows begin the file with a byte-order mark.
        # A _Loader is a SafeLoader: it builds plain values only.
        data = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}", "save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        what = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise InputError(f"{path} is not valid YAML: {what}", _yaml_hint(path, what)) from error
    if not isinstance(data, dict):
        hint = _yaml_hint(path, "") or "see examples/smollm2_qlora.yaml"
        raise InputError(f"{path} holds no `key: value` lines", hint)
    return {str(key): value for key, value in data.items()}


def _yaml_hint(path: Path, error: str) -> str:
    """What to write in place of what YAML could not read."""
    if "\\t" in error:
        return "begin lines with spaces, not with a tab"
    if "escape" in error:
        return _ESCAPES
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if re.match(r"\s*[\w-]+\s*(：|:[^\s:/\\])", line):
            return f"line {number} wants `key: value`, with the colon : and a space behind it"
    return ""


def _scalar(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{key}: {text[:200]!r} cannot be read as a value") from error


def _check_known(key: str) -> None:
    if key in FIELDS or key in UNUSED:
        return
    if key.startswith(("top.", "train.")):
        raise UsageError(
            f"'{key}' is a box of LlamaBoard's page, not a key of a training configuration",
            "give training_args.yaml or llamaboard.yaml, which it writes when training starts",
        )
    # A proposal that is not meant would change the training.
    near = [_MEANT[key]] if key in _MEANT else []
    near += difflib.get_close_matches(key, [*FIELDS, *UNUSED], n=1, cutoff=0.8)
    raise UsageError(
        f"unknown key '{key}'",
        f"did you mean '{near[0]}'?" if near else "leave it out; edge train --json-schema shows every key",
    )


def _typed(name: str, value: Any) -> Any:
    """`value` as the key's kind, within its limits; UsageError names the key otherwise."""
    key = FIELDS[name]
    if key.kind == "resume" and isinstance(value, bool):
        return "auto" if value else None
    if value is False and "no" in key.choices:
        return "no"  # what YAML 1.1 makes of a bare `no`
    if name == "report_to" and value == []:
        return key.default
    if key.kind == "bool?" and value is None:
        return None  # a value of its own, not the default
    optional = key.default is None and key.kind != "bool?"
    if isinstance(value, str) and _QUOTES.match(value):
        raise UsageError(f"{name}: {value} has quotes that are none in YAML", "write it without them")
    if value is None or (isinstance(value, str) and value.lower() in ("", "none") and optional):
        return None if key.default is MISSING else key.default
    typed = _convert(key.kind, value)
    if typed is None:
        raise UsageError(f"{name}: {value!r} is not {KINDS[key.kind]}", f"{name}: {key.help}")
    allowed = key.names or key.choices
    for part in typed if isinstance(typed, tuple) else (typed,):
        if allowed and part not in allowed:
            raise UsageError(
                f"{name}: {part!r} is not supported", f"one of {', '.join(str(other) for other in allowed)}"
            )
    if broken := _limit(key, typed):
        raise UsageError(f"{name}: {value!r} must be {broken}", f"{name}: {key.help}")
    return typed


def _limit(key: Key, value: Any) -> str:
    """The limit of `key` that `value` breaks, in words; "" where it keeps them all."""
    for limit, words, keeps in (
        (key.minimum, "at least", operator.ge),
        (key.exclusive_minimum, "above", operator.gt),
        (key.maximum, "at most", operator.le),
        (key.exclusive_maximum, "below", operator.lt),
    ):
        if limit is not None and not keeps(value, limit):
            return f"{words} {limit}"
    return ""


def _convert(kind: str, value: Any) -> Any:
    """None where `value` is not of `kind`."""
    if kind in ("bool", "bool?"):
        return value if isinstance(value, bool) else None
    if kind in ("names", "floats"):
        parts = re.split("[,，]", value) if isinstance(value, str) else value
        if not isinstance(parts, list):
            return None
        if kind == "floats":
            numbers = [_convert("float", part) for part in parts]
            return None if any(not number or number < 0 for number in numbers) else tuple(numbers)
        if not all(isinstance(name, str) for name in parts):
            return None
        return tuple(name.strip() for name in parts if name.strip()) or None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if kind in ("text", "resume"):
        # A model or data set may be called 123 or 1.5: YAML makes a number of it.
        return str(value).strip() or None
    if isinstance(value, str) and not re.fullmatch(f"[-+]?{NUMBER}", value.strip()):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not math.isfinite(number) or (kind == "int" and number != int(number)):
        return None
    return int(number) if kind == "int" else number
