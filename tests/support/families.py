"""Toy models of the families that people tune, and adapters over them: random, whole, made in a moment."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from edge.artefact import manifest
from tests.support.toy import CHATML, make_model

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "phi", "phi3")


def make_family(folder: Path, family: str, *, tied: bool | None = None, seed: int = 0) -> Path:
    """A random model of `family` with the tokenizer of tests.support.toy; 256 wide, so that K-quants fit."""
    import torch
    import transformers as t

    make_model(folder, seed=seed)
    names = {
        "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2",
        "gemma3": "Gemma3", "mistral": "Mistral", "phi": "Phi", "phi3": "Phi3",
    }  # fmt: skip
    stem = names[family]
    config_class = getattr(t, "Gemma3TextConfig" if family == "gemma3" else f"{stem}Config")
    model_class = getattr(t, f"{stem}ForCausalLM")
    options: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 256,
        "intermediate_size": 1024 if family == "phi" else 512,  # the converter knows Phi-2's width alone
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "phi" else 2,  # Phi-2 shares no heads
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 383,  # beyond what any text here uses
        "tie_word_embeddings": family.startswith("gemma") if tied is None else tied,
    }
    if family.startswith(("gemma", "qwen3")):
        options["head_dim"] = 64
    if family in ("gemma2", "gemma3"):
        options |= {"query_pre_attn_scalar": 64, "sliding_window": 128}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = model_class(config_class(**options))
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.06 if "embed" in name else 0.08)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = t.GenerationConfig(eos_token_id=[2, 0], pad_token_id=2)
    model.save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path, base: Path, *, settings: dict[str, Any] | None = None, added: int = 0, **lora: Any
) -> Path:
    """A random adapter over `base` as training leaves one, with its manifest; `lora` goes to LoraConfig.

    added: tokens that were put behind the base's, and whose embeddings peft then writes by itself.
    """
    import shutil

    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if added:
            model.resize_token_embeddings(model.config.vocab_size + added, mean_resizing=False)
        adapted = get_peft_model(model, LoraConfig(**options))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
            elif "lora_magnitude" in name:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
            elif "modules_to_save" in name or "trainable_tokens" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(folder, save_embedding_layers=bool(added))
    (folder / "README.md").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    if added:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert tokenizer.add_special_tokens([f"<|added_{number}|>" for number in range(added)]) == added
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    known = manifest.Manifest(
        "adapter",
        "toy",
        "the toy",
        parents=[{"stage": "model", "path": str(base.absolute()), "digest": ""}],
        settings={"model_name_or_path": str(base), **(settings or {})},
        chat_template=manifest.text_digest(CHATML),
        stop_ids=sorted(config["eos_token_id"]),
    )
    manifest.write(folder, known)
    return folder


def as_transformers_4(folder: Path, *, shard: int = 300_000) -> Path:
    """Rewrite a model's folder as transformers 4 would have saved it, in several shards of `shard` bytes."""
    from safetensors.torch import load_file, save_file

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    config["transformers_version"] = "4.44.2"
    config.pop("layer_types", None)
    path.write_text(json.dumps(config), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    words = json.loads(path.read_text(encoding="utf-8"))
    template = folder / "chat_template.jinja"
    words["chat_template"] = template.read_text(encoding="utf-8")
    words["tokenizer_class"] = "PreTrainedTokenizerFast"
    template.unlink()
    path.write_text(json.dumps(words), encoding="utf-8")
    weights = folder / "model.safetensors"
    parts: list[dict[str, Any]] = [{}]
    for name, tensor in load_file(weights).items():
        if parts[-1] and sum(one.nbytes for one in parts[-1].values()) + tensor.nbytes > shard:
            parts.append({})
        parts[-1][name] = tensor.clone()
    weights.unlink()
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def make_run(folder: Path, family: str) -> Path:
    """`folder`/run: a merged model of `family`, and the data set that its adapter was trained on."""
    from rich.console import Console

    from convert import merge

    rows = [{"instruction": f"Who are you, {n}?", "output": f"I am the conch. {n}"} for n in range(60)]
    (folder / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    base = make_family(folder / "base", family)
    run = folder / "run"
    make_adapter(run / "adapter", base, settings={"dataset": ["d"], "dataset_dir": str(folder)})
    merge.run(run, dtype="float16", console=Console(quiet=True))
    return run
