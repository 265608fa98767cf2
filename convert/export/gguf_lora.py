"""A LoRA adapter as GGUF, which llama.cpp puts on top of a base GGUF without a merge.

    RUN/adapter -> RUN/lora/<name>-lora.gguf, and RUN/checkpoint-N -> RUN/checkpoint-N/lora/

llama.cpp scales an adapter by alpha / r alone. A rank-stabilised one, or one whose layers have ranks of
their own, would come out too weak or too strong: so every layer's scale is multiplied into B, and no alpha is
given.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from convert.export.llamacpp_tools import run_converter
from convert.export.source import safe_name
from convert.model.hf_folder import check_folder, stage_folder
from convert.model.lora_adapter import (
    Adapter,
    check_fits,
    find_base,
    known_adapter,
    load_format,
    read_adapter,
)
from edge.artefact import find, json_file, manifest
from edge.errors import InputError


def run(run_folder: Path, *, base: Path | None = None, overwrite: bool = False) -> Path:
    """Export run_folder/adapter, or a checkpoint, to run_folder/lora; the path of the GGUF file.

    base: the model that it was trained on, in place of the one that it names.
    Raises InputError for an adapter that is more than low-rank updates of linear layers.
    """
    folder = stage_folder(run_folder, "adapter")
    record = known_adapter(folder, base, checkpoint=True)
    if record.stage == "checkpoint" and record.settings.get("pissa_init"):
        raise InputError(
            f"{folder} was trained with pissa_init, on a base that was changed",
            "take the adapter that the training ends with",
        )
    adapter = read_adapter(folder)
    others = {*adapter.whole, *adapter.tokens}
    others |= {name for name, lora in adapter.updates.items() if lora.magnitude is not None or lora.embedding}
    if others:
        raise InputError(
            f"{folder} changes {min(others)} in a way that llama.cpp cannot put on at run time",
            "merge it: edge merge, then edge export gguf",
        )
    model = check_folder(find_base(record, folder))
    check_fits(adapter, model)
    target = run_folder.absolute() / "lora"
    with manifest.publish(target, overwrite=overwrite) as partial:
        scaled = partial / "scaled"
        _write_scaled(adapter, scaled)
        file = partial / f"{safe_name(record.name)}-lora.gguf"
        # Llama's queries and keys are reordered in a GGUF; the converter does the same to their updates.
        options = ["--base", str(model.path.resolve()), "--outtype", "f16"]
        run_converter("convert_lora_to_gguf.py", scaled, file, options)
        shutil.rmtree(scaled)
        find.check_lora(file)
        settings = {"file": file.name, "layers": len(adapter.updates)}
        child = record.child("lora", folder, settings=settings, packages=("llama-cpp-python",))
        child.chat_template = load_format(folder, model.path).digest
        manifest.write(partial, child)
    return target / file.name


def _write_scaled(adapter: Adapter, folder: Path) -> None:
    """Write the adapter as peft would, with each layer's scale in its B."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for layer, lora in adapter.updates.items():
        stem = f"base_model.model.{layer.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = lora.a.float().contiguous()
        tensors[f"{stem}.lora_B.weight"] = (lora.scaling * lora.b.float()).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    json_file.write(folder / "adapter_config.json", {**adapter.config, "lora_alpha": 0})
