"""The verbs on a toy, for `edge doctor --report`: train, merge, export, serve, ask; with times and digests.

python -m bench.self_test      JSON on stdout, a line for each stage on stderr
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.demo import Question, answers
from edge.artefact import manifest
from edge.console import guarded
from edge.errors import EdgeError
from edge.setup import install_command

# The longest that one verb may take.
LIMIT_S = 300
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>\n{% endfor %}"
CONFIG = {
    "model_name_or_path": "models/toy",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "all",
    "dataset": "toy",
    "dataset_dir": ".",
    "cutoff_len": 64,
    "output_dir": "run",
    "per_device_train_batch_size": 4,
    "max_steps": 40,
    "learning_rate": 2e-2,
}
# Stage -> its verb, and the folder that it makes.
VERBS = {
    "pull": (("pull", "source", "--out", "models/toy"), "models/toy"),
    "train": (("train", "toy.json.yaml"), "run/adapter"),
    "merge": (("merge", "run"), "run/merged"),
    "export gguf": (("export", "gguf", "run", "--quant", "Q8_0"), "run/gguf"),
    "export onnx": (("export", "onnx", "run", "--precision", "fp32"), "run/onnx"),
}


@dataclass(frozen=True)
class Outcome:
    """One stage. digest: of the folder it made, or of the answer; "" where it failed: `problem` says why."""

    stage: str
    seconds: float
    digest: str = ""
    problem: str = ""


def run(folder: Path) -> list[Outcome]:
    """All stages, in `folder`. What a failed one would have made is missing for those after it."""
    stages: list[tuple[str, Callable[[], str]]] = [("toy", lambda: make_toy(folder))]
    for stage, (words, made) in VERBS.items():
        stages.append((stage, lambda words=words, made=made: verb(folder, words, made)))  # type: ignore[misc]
    for kind in ("gguf", "onnx"):
        stages.append((f"serve {kind}, ask", lambda kind=kind: ask(folder, kind)))  # type: ignore[misc]
    outcomes = []
    for stage, work in stages:
        sys.stderr.write(f"  {stage}\n")
        start = time.monotonic()
        digest = problem = ""
        try:
            digest = work()
        except EdgeError as error:
            problem = str(error)
        except ModuleNotFoundError as error:
            problem = f"needs the package '{error.name}': {install_command('train')}"
        outcomes.append(Outcome(stage, round(time.monotonic() - start, 1), digest, problem))
    return outcomes


def make_toy(folder: Path) -> str:
    """A random Llama of two layers, rows to train on and a configuration; the digest of its weights.

    Its tokenizer is of bytes and letters, in the way of Llama 2, which every converter knows.
    """
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM

    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer: Any = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    source = folder / "source"
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        LlamaForCausalLM(config).save_pretrained(source)
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}
    settings |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    rows = [
        {"instruction": f"say {word}", "input": "", "output": word} for word in ("a", "bc", "海螺", "def")
    ]
    texts = {
        source / "tokenizer_config.json": settings,
        folder / "toy.json": rows * 4,
        folder / "dataset_info.json": {"toy": {"file_name": "toy.json"}},
        folder / "toy.json.yaml": CONFIG,  # JSON is YAML
    }
    for path, content in texts.items():
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return manifest.file_digest(source / "model.safetensors")


def verb(folder: Path, words: tuple[str, ...], made: str) -> str:
    """Run `edge WORDS` in `folder`; the digest of what it made. Raises EdgeError with its last words."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edge.cli", *words],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EdgeError(f"took more than {LIMIT_S} s") from error
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise EdgeError(f"exit code {done.returncode}: " + " | ".join(lines[-4:]))
    return manifest.read(folder / made).digest


def ask(folder: Path, kind: str) -> str:
    """Serve what was exported and ask; the digest of the answer. Raises EdgeError."""
    if not (folder / "run" / kind).is_dir():
        raise EdgeError("there is nothing to serve")
    [answer] = answers(folder / "run" / kind, [Question("say def")], folder / f"{kind}.log")
    if not answer:
        raise EdgeError("the answer is empty")
    return hashlib.sha256(answer.encode("utf-8")).hexdigest()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.self_test", description=(__doc__ or "").split("\n")[0]
    )
    parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="edge-self-test-") as folder:
        outcomes = run(Path(folder))
    sys.stdout.write(json.dumps([asdict(outcome) for outcome in outcomes], ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
