"""A GGUF file as a transformers folder, read and dequantised by transformers."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any


def load(file: Path, dtype: str) -> tuple[Any, Any]:
    """(tokenizer, model in `dtype`) of a GGUF file. Raises what transformers raises."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    where = {"gguf_file": file.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=getattr(torch, dtype), **where
        )
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(name, None)
    return tokenizer, model


def save(tokenizer: Any, model: Any, folder: Path, ends: int | list[int]) -> None:
    """Write both to `folder`. ends: the ids that end an answer."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
