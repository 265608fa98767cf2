"""A LoRA adapter as GGUF, which llama.cpp puts on top of a base GGUF without a merge.

    RUN/adapter -> RUN/lora/<name>-lora.gguf

llama.cpp scales an adapter by alpha / r alone. A rank-stabilised one, or one whose layers have ranks of
their own, would come out too weak or too strong: so every layer's scale is multiplied into B, and no alpha is
given.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from convert.export.llamacpp_tools import run_converter
from convert.model.hf_folder import check_folder
from convert.model.lora_adapter import find_base, known_adapter, load_format, read_adapter
from edge.artefact import find, manifest
from edge.errors import InputError


def run(run_folder: Path, *, overwrite: bool = False) -> Path:
    """Export run_folder/adapter to run_folder/lora; the path of the GGUF file.

    Raises InputError for an adapter that is more than low-rank updates of linear layers.
    """
    folder = run_folder if (run_folder / "adapter_config.json").is_file() else run_folder / "adapter"
    if run_folder.is_dir() and not folder.is_dir():
        raise InputError(f"{run_folder} has no adapter", "make it: edge train CONFIG.yaml")
    known = known_adapter(folder)
    found = read_adapter(folder)
    odd = next(
        (name for name, one in found.updates.items() if one.magnitude is not None or one.embedding), ""
    )
    if found.whole or odd:
        what = odd or min(found.whole)
        raise InputError(
            f"{folder} changes {what} in a way that llama.cpp cannot put on at run time",
            "merge it: edge merge, then edge export gguf",
        )
    base = check_folder(find_base(known, folder))
    target = run_folder.absolute() / "lora"
    name = "".join(letter if letter not in '\\/:*?"<>|' else "-" for letter in known.name) or "adapter"
    with manifest.publish(target, overwrite=overwrite) as partial:
        scaled = partial / "scaled"
        scaled.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for layer, one in found.updates.items():
            stem = f"base_model.model.{layer.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = one.a.float().contiguous()
            tensors[f"{stem}.lora_B.weight"] = (one.scaling * one.b.float()).contiguous()
        save_file(tensors, scaled / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {**found.config, "lora_alpha": 0}
        (scaled / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        final = partial / f"{name}-lora.gguf"
        # Llama's queries and keys are reordered in a GGUF; the converter does the same to their updates.
        options = ["--base", str(base.path.resolve()), "--outtype", "f16"]
        run_converter("convert_lora_to_gguf.py", scaled, final, options)
        shutil.rmtree(scaled)
        find.check_lora(final)
        form = load_format(folder, base.path)
        made = known.child(
            "lora",
            folder,
            settings={"file": final.name, "layers": len(found.updates)},
            packages=("edge", "llama-cpp-python"),
        )
        made.chat_template = manifest.text_digest(form.source)
        manifest.write(partial, made)
    return target / final.name
