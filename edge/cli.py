"""The command `edge`. Each verb is a `main(argv) -> int` in a module of its own, imported when it is called.

So `edge serve` never imports torch. An error that a user can mend ends as one message and a non-zero exit
code, without a traceback.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable

from edge import __version__
from edge.console import guarded
from edge.errors import EdgeError, UsageError
from edge.setup import install_command

VERBS: dict[str, tuple[str, str]] = {
    "pull": ("convert.pull", "get a model: the embedded default, a folder, a GGUF file or a hub id"),
    "data": ("convert.data.cli", "show a configuration's data row by row, without training"),
    "train": ("convert.train.cli", "LoRA, QLoRA, full or DPO from a LLaMA-Factory style YAML"),
    "eval": (
        "convert.train.eval_cli",
        "a run on held-out rows: loss, answers, BLEU and ROUGE, beside its base",
    ),
    "merge": ("convert.merge", "adapter -> 16-bit merged model"),
    "export": ("convert.export.cli", "merged model -> GGUF or ONNX; adapter -> GGUF"),
    "verify": (
        "convert.verify.cli",
        "compare two stages of a model, or a stage and a server: tokenizer, stop tokens, logits",
    ),
    "serve": ("edge.server.cli", "serve a run, a GGUF folder or a GGUF file over HTTP"),
    "ui": ("edge.ui.cli", "tune, compare, export and serve in the browser"),
    "webui": ("edge.ui.cli", "the same"),
    "chat": ("edge.chat_cli", "talk to a run in the terminal"),
    "predict": ("edge.predict_cli", "a model's answers to a file of questions"),
    "demo": ("bench.demo", "all stages on a small model, questions over HTTP and a measurement"),
    "bench": ("bench.cli", "measure this server against the baseline"),
    "tune": ("edge.loading.tune", "show or redo what was measured for this artefact on this machine"),
    "doctor": ("edge.machine.doctor", "what this machine has, and what to install for more"),
}

# A configuration as LLaMA-Factory has it for these verbs, in place of a run.
_YAML = re.compile(r"^(?!-)[^=]*\.ya?ml$")


def usage() -> str:
    rows = "\n".join(f"  {verb:<8} {text}" for verb, (_, text) in VERBS.items())
    return f"edge {__version__}\n\nusage: edge VERB ...   (edge VERB --help says more)\n\n{rows}\n"


def main(argv: list[str]) -> int:
    """Run one verb; returns its exit code. Raises EdgeError for what the user can mend."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version", "version"):
        sys.stdout.write(f"edge {__version__}\n")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb in ("api", "webchat"):
        raise UsageError(
            f"edge has no verb '{verb}'", "edge serve RUN serves the model and a page to chat on"
        )
    if verb not in VERBS:
        raise UsageError(f"edge has no verb '{verb}'", "verbs: " + " ".join(VERBS))
    module = VERBS[verb][0]
    if verb in ("merge", "export", "chat", "serve") and any(_YAML.search(word) for word in rest):
        module, rest = "convert.yaml_verbs", [verb, *rest]
    try:
        run: Callable[[list[str]], int] = importlib.import_module(module).main
        return run(rest)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("edge", "convert", "bench"):
            raise
        extra = "ui" if verb in ("ui", "webui") else "serve" if module.startswith("edge.") else "train"
        raise EdgeError(
            f"'edge {verb}' needs the package '{error.name}', which is not installed",
            install_command(extra),
        ) from error


def entry() -> int:
    return guarded(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
