"""LLaMA-Factory's YAML for export and inference in place of a run: `edge export CONFIG.yaml` and others.

`export` and `merge` write what `export_dir` names: the base with its adapters added, a tokenizer, and a
Modelfile for Ollama. `chat` and `serve` make what is missing beside the adapter: `merged/`, then `gguf/`.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from convert import merge
from convert.config import TrainConfig, load_train_config
from edge.artefact import find, manifest
from edge.console import plain_console
from edge.errors import InputError, UsageError
from edge.progress import add_progress_option, result

if TYPE_CHECKING:
    from rich.console import Console

_TALKS = {"chat": "edge.chat_cli", "serve": "edge.server.cli"}


def main(argv: list[str]) -> int:
    """`argv`: a verb, CONFIG.yaml, key=value, and for chat and serve their own options."""
    verb, rest = argv[0], argv[1:]
    parser = argparse.ArgumentParser(prog=f"edge {verb}", description=f"{verb} as LLaMA-Factory's YAML says.")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="keys as in LLaMA-Factory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    if verb in _TALKS:
        run: Callable[[list[str]], int] = importlib.import_module(_TALKS[verb]).main
        if not {"-h", "--help"}.isdisjoint(rest):
            return run(["--help"])
        words = [word for word in rest if not word.startswith("-") and (find_yaml([word]) or "=" in word)]
        options = parser.parse_args(words)
        config = _config(options)
        more = [word for word in rest if word not in words]
        asked = _sampling(config) if verb == "chat" else []
        return run([str(served(config, plain_console())), *asked, *more])
    parser.add_argument("--overwrite", action="store_true", help="replace what export_dir holds")
    add_progress_option(parser)
    options = parser.parse_intermixed_args(rest)
    target = export(_config(options), plain_console(), overwrite=options.overwrite)
    result(path=str(target))
    return 0


def find_yaml(words: list[str]) -> str | None:
    """The first of `words` that is the path of a YAML file."""
    return next((word for word in words if word.endswith((".yaml", ".yml"))), None)


def _config(options: argparse.Namespace) -> TrainConfig:
    return load_train_config(options.config, options.overrides, needs=("model_name_or_path",))


def _sampling(config: TrainConfig) -> list[str]:
    """The options of `edge chat` that say how the configuration samples."""
    temperature = config.temperature if config.do_sample else 0.0
    asked = ["--temperature", str(temperature), "--top-p", str(config.top_p), "--top-k", str(config.top_k)]
    asked += ["--repetition-penalty", str(config.repetition_penalty)]
    asked += ["--max-tokens", str(config.max_new_tokens)]
    return asked + (["--system", config.default_system] if config.default_system else [])


def export(config: TrainConfig, console: Console, *, overwrite: bool = False) -> Path:
    """Write `export_dir`: the model with its adapters added, one after the other; the folder is returned.

    Raises UsageError without export_dir, InputError for a model or adapter that cannot be used, ExistsError
    without `overwrite`.
    """
    if not config.export_dir:
        raise UsageError("export_dir is missing", "export_dir: the folder for the merged model")
    target, base = Path(config.export_dir), _model(config)
    _notes(config, base, console)
    dtype = "float16" if config.infer_dtype == "auto" else config.infer_dtype
    *first, last = config.adapter_name_or_path or ("",)  # no adapter: the model alone
    with tempfile.TemporaryDirectory(dir=_parent(target), prefix=".edge-export-") as between:
        for number, adapter in enumerate(first):
            step = Path(between) / str(number)
            base = merge.run(Path(adapter), base=base, target=step, dtype=dtype, console=console)
        merge.run(
            Path(last) if last else None,
            base=base,
            target=target,
            dtype=dtype,
            shard=config.export_size * 10**9,
            overwrite=overwrite,
            console=console,
        )
    _write_modelfile(target, console)
    return target


def _parent(target: Path) -> Path:
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    return target.absolute().parent


def served(config: TrainConfig, console: Console) -> Path:
    """The run or folder whose GGUF or ONNX file is what `config` describes, made where it is missing.

    Raises UsageError for several adapters, InputError for a model or adapter that cannot be used.
    """
    adapters = config.adapter_name_or_path or ()
    if len(adapters) > 1:
        raise UsageError(
            f"adapter_name_or_path names {len(adapters)} adapters",
            "merge them first: edge export CONFIG.yaml",
        )
    base = _model(config)
    run = Path(adapters[0]) if adapters else base
    run = run.parent if run.name in ("adapter", "merged") and (run / manifest.FILE).is_file() else run
    _notes(config, base, console)
    if adapters and not (run / "merged" / manifest.FILE).is_file():
        merge.run(run, base=base, console=console)
    try:
        find.candidates(run)
    except InputError:
        from convert.export import gguf

        gguf.run(run, console=console)
    return run


def _model(config: TrainConfig) -> Path:
    """The folder of the model that `config` names, fetched where it is on the hub."""
    from convert.model import hub

    return hub.resolve(config.model_name_or_path, config.model_revision, config.cache_dir)


def _notes(config: TrainConfig, base: Path, console: Console) -> None:
    """Say the configuration's warnings, and where `template` is not what the model was tuned with."""
    from convert.data import prepare

    # A model of plain text has no template; nothing is trained here.
    asked = replace(config, stage="pt")
    chat, own = prepare.chat_of(asked, base), prepare.chat_of(replace(asked, template=None), base)
    notes = chat.warnings
    if chat.source != own.source:
        notes = [f"template: {config.template} is not what the model was tuned with, and is ignored"]
    for line in (*config.warnings, *notes):
        console.print(f"note: {line}", style="yellow")


def _write_modelfile(folder: Path, console: Console) -> None:
    from convert.export import modelfile

    try:
        modelfile.of_folder(folder)
    except InputError as error:
        console.print(f"note: no Modelfile: {error.message}", style="yellow")
