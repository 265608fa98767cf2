"""What training begins with: an adapter to continue from, others merged into the base, scaled positions."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from convert.config import TrainConfig
from convert.model.hf_folder import check_folder, place, read_config
from convert.model.merged_folder import MergedFolder, known_model
from edge.artefact import json_file, manifest
from edge.errors import InputError, UsageError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Parts of an adapter that training here does not make; each with the value that means none.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "fan_in_fan_out": (False,),
}


def folder_of(name: str) -> Path:
    """The adapter in the folder `name`, or in the run `name`. Raises InputError where there is none."""
    # The files of a run's own folder are links to those of its adapter.
    for folder in (Path(name) / "adapter", Path(name)):
        if (folder / _CONFIG).is_file() and (folder / _WEIGHTS).is_file():
            return folder
    raise InputError(
        f"adapter_name_or_path: {name} holds no {_CONFIG} with {_WEIGHTS}",
        "give a run, or its adapter folder",
    )


def merged_first(config: TrainConfig) -> tuple[str, ...]:
    """The adapters that go into the base before training: all but the last, or all under a new one."""
    names = config.adapter_name_or_path or ()
    return names if config.create_new_adapter else names[:-1]


def scaled(base: Path, config: TrainConfig) -> dict[str, Any]:
    """The base's config.json with rope_scaling as LLaMA-Factory scales it; {} where cutoff_len fits anyway.

    The factor is the smallest whole number that makes room for cutoff_len.
    """
    about = read_config(base)
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    longest = int(rope.get("original_max_position_embeddings") or about.get("max_position_embeddings") or 0)
    if config.rope_scaling is None or not longest or config.cutoff_len <= longest:
        return {}
    factor = -(-config.cutoff_len // longest)
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": float(factor)}
    if config.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = longest
    if config.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theta = rope.get("rope_theta")
    scaling |= {} if theta is None else {"rope_theta": theta}
    key = "rope_parameters" if "rope_parameters" in about else "rope_scaling"
    return {**about, key: scaling, "max_position_embeddings": longest * factor}


def make_start(base: Path, config: TrainConfig) -> None:
    """Write output_dir/start: `base`, with the adapters of `merged_first` one after the other, as `scaled`.

    Raises InputError for an adapter that does not fit, EdgeError for values that do not fit into 16 bits.
    """
    about, changed = read_config(base), scaled(base, config)
    dtype = "float32" if about.get("dtype", "float32") == "float32" else "float16"
    with tempfile.TemporaryDirectory(dir=config.output_dir, prefix=".start-") as between:
        for number, name in enumerate(merged_first(config)):
            merged = MergedFolder(folder_of(name), base=base, dtype=dtype, into="nf4")
            base = Path(between) / str(number)
            base.mkdir()
            merged.write(base)
        with manifest.publish(start_folder(config), overwrite=True) as partial:
            for path in check_folder(base).path.iterdir():
                if path.is_file():
                    place(path, partial / path.name, link=path.suffix == ".safetensors")
            if changed:
                kept = json_file.read(partial / "config.json")
                names = ("rope_parameters", "rope_scaling", "max_position_embeddings")
                changes = {name: changed[name] for name in names if name in changed}
                json_file.write(partial / "config.json", {**kept, **changes})
            manifest.write(partial, known_model(base))


def start_folder(config: TrainConfig) -> Path:
    """Where `make_start` writes."""
    return Path(config.output_dir) / "start"


def on_start(config: TrainConfig) -> TrainConfig:
    """`config` as it is over `start_folder`: with the last adapter, or none."""
    rest = (config.adapter_name_or_path or ())[len(merged_first(config)) :] or None
    return dataclasses.replace(
        config,
        model_name_or_path=str(start_folder(config)),
        adapter_name_or_path=rest,
        create_new_adapter=False,
        rope_scaling=None,
    )


def shaped(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """`config` with rank, scale and layers of the adapter that it continues from, and notes on what changed.

    Raises InputError for an adapter that cannot be read, UsageError where training would lose a part of it.
    """
    assert config.adapter_name_or_path is not None
    folder = folder_of(config.adapter_name_or_path[-1])
    adapter = json_file.read(folder / _CONFIG, required=True, hint="train it again")
    try:
        targets = adapter["target_modules"]
        shape: dict[str, Any] = {
            "lora_rank": int(adapter["r"]),
            "lora_alpha": int(adapter["lora_alpha"]),
            "lora_target": ("all",) if targets == "all-linear" else tuple(sorted(targets)),
            "use_rslora": bool(adapter.get("use_rslora")),
            "use_dora": bool(adapter.get("use_dora")),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / _CONFIG} cannot be read: {error}", "train it again") from error
    for key, plain in _PLAIN.items():
        if key in adapter and adapter[key] not in plain:
            raise UsageError(
                f"adapter_name_or_path: {folder} has {key}: {adapter[key]}, which training does not keep",
                "merge it first (edge merge), and train on what comes out",
            )
    asked = {**{key: getattr(config, key) for key in shape}, "lora_alpha": config.alpha}
    # The adapter names its layers one by one; which they are is no choice of this run.
    other = [f"{key} {shape[key]}" for key in shape if key != "lora_target" and shape[key] != asked[key]]
    notes = [f"continuing from {folder}, whose settings hold: {', '.join(other)}"] if other else []
    return dataclasses.replace(config, **shape), notes


def load(model: Any, config: TrainConfig) -> None:
    """Put the weights of the adapter into `model`, which has its shape. InputError for another base."""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    assert config.adapter_name_or_path is not None
    folder = folder_of(config.adapter_name_or_path[-1])
    try:
        keys = set_peft_model_state_dict(model, load_file(folder / _WEIGHTS))
        wrong = [*keys.unexpected_keys, *(key for key in keys.missing_keys if "lora_" in key)]
    except (SafetensorError, RuntimeError) as error:
        wrong = str(error).splitlines()
    if wrong:
        raise InputError(
            f"adapter_name_or_path: {folder} does not fit this model: {wrong[0]}",
            "give the base model that it was trained on",
        )
