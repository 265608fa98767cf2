"""vLLM's configuration for the merged model of a run: `vllm serve --config deploy/vllm/config.yaml`.

The options are those of vLLM 0.25. What vLLM would take from elsewhere, or leave open, is written out: the
chat template, every stop token (as the end tokens of a generation config), the context, the type of the
weights, how reasoning is switched; and the loopback address, because vLLM listens on every one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from convert.export.source import Source, open_source
from convert.model.chat_format import write_generation_config
from convert.model.hf_folder import stage_folder
from edge.artefact.find import TEMPLATE
from edge.errors import InputError, UsageError
from edge.reasoning import THINK, THINK_END
from edge.server.tool_dialects import dialect_of

CONFIG = "config.yaml"
_HERE = Path("deploy", "vllm")
# The dialect of tool calls in the chat template -> vLLM's parser for it, and the tokens without which that
# parser fails at every request, as where a model was trained on another family's template.
_TOOL_PARSERS = {
    "hermes": ("hermes", ()),
    "deepseek": ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")),
    "llama3": ("llama3_json", ("<|python_tag|>",)),
    "mistral": ("mistral", ("[TOOL_CALLS]",)),
}
# Our server closes the reasoning that a template always opens, where the model was trained without any.
_CLOSED = (
    "{%% set prompt %%}%s{%% endset %%}{{ prompt if not prompt.rstrip().endswith('%s') "
    "else prompt.rstrip() + '\\n\\n%s\\n\\n' }}"
)
_README = """\
vLLM 0.25 serves this model with one command, in the folder above `deploy`:

    {command}

Copy `{model}` and `deploy` to the machine that serves. Then prove what answers there:

    edge verify {model} http://127.0.0.1:8000
"""


def write(run: Path, folder: Path, context: int | None) -> tuple[str, Path]:
    """As `convert.export.deploy` says.

    Raises InputError for a run without a usable merged model or without a chat template, UsageError for a
    context that the model does not have.
    """
    path = stage_folder(run, "merged")
    source = open_source(path)
    if not source.template:
        raise InputError(
            f"{path} has no chat template, so vLLM would refuse messages",
            "train with template: NAME, or take a model that has one",
        )
    model = path.absolute().relative_to(run.absolute()).as_posix()
    # ASCII alone: vLLM opens the file in the machine's own encoding.
    text = yaml.safe_dump(_options(source, model, context), sort_keys=False)
    (folder / CONFIG).write_text(text, encoding="ascii")
    template = source.template
    if source.record.thinking == "off" and THINK in template:
        template = _CLOSED % (template, THINK, THINK_END)
    (folder / TEMPLATE).write_text(template, encoding="utf-8", newline="\n")
    write_generation_config(path, folder, source.record.stop_ids)
    command = f"vllm serve --config {(_HERE / CONFIG).as_posix()}"
    (folder / "README.md").write_text(_README.format(command=command, model=model), encoding="utf-8")
    return command, path


def _options(source: Source, model: str, context: int | None) -> dict[str, Any]:
    """vLLM's long options, in the order in which they are read by people."""
    text = source.config.get("text_config") or source.config
    longest = text.get("max_position_embeddings")
    if context is not None and longest is not None and context > longest:
        raise UsageError(f"--ctx {context}: the model has {longest} positions", "leave --ctx out")
    dtype = source.config.get("dtype") or source.config.get("torch_dtype")
    options: dict[str, Any] = {
        "model": model,
        "served-model-name": source.record.name,
        "host": "127.0.0.1",
        "port": 8000,
        # Most of vLLM's kernels have no 32 bits: it chooses the 16 bits itself.
        "dtype": dtype if dtype in ("bfloat16", "float16") else "auto",
        "max-model-len": context or longest,
        "chat-template": (_HERE / TEMPLATE).as_posix(),
        "generation-config": _HERE.as_posix(),
    }
    thinking = source.record.thinking
    if thinking in ("on", "off") and "enable_thinking" in source.template:
        options["default-chat-template-kwargs"] = json.dumps({"enable_thinking": thinking == "on"})
    if thinking in ("on", "mixed") and THINK in source.template:
        # Qwen's reads text; with the other one vLLM does not start where these are no tokens.
        by_text = "enable_thinking" in source.template or not _has(source, (THINK, THINK_END))
        options["reasoning-parser"] = "qwen3" if by_text else "deepseek_r1"
    dialect = dialect_of(source.template)
    if dialect is not None and dialect.name in _TOOL_PARSERS:
        parser, marks = _TOOL_PARSERS[dialect.name]
        if _has(source, marks):
            options |= {"enable-auto-tool-choice": True, "tool-call-parser": parser}
    return {name: value for name, value in options.items() if value is not None}


def _has(source: Source, marks: tuple[str, ...]) -> bool:
    """Whether each of `marks` is a token of the model."""
    # Imported late, as an export's other libraries.
    from tokenizers import Tokenizer

    # from_file takes no path in another encoding than UTF-8.
    tokenizer = Tokenizer.from_str((source.path / "tokenizer.json").read_text(encoding="utf-8"))
    return None not in map(tokenizer.token_to_id, marks)
