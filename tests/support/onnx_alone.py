"""An exported folder served by `edge[serve,onnx]` alone: `python -m tests.support.onnx_alone RUN`.

Makes an environment, installs this tree into it with those two extras, copies RUN's onnx folder alone beside
it, serves that and asks. Fails where torch, transformers or llama.cpp came along, or an answer is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge.console import guarded
from edge.errors import EdgeError, InputError
from edge.setup import PINS

ROOT = Path(__file__).parents[2]
# Serving must not need them.
FOREIGN = ("torch", "transformers", "peft", "llama_cpp", "onnxruntime_genai", "onnx")


def environment(folder: Path, source: Path) -> Path:
    """A new environment with `edge[serve,onnx]`; the folder of its programs. Raises EdgeError.

    source: a wheel, an sdist or a tree, in which pip builds.
    """
    venv.create(folder, with_pip=True)
    programs = programs_of(folder)
    install(programs, "-c", str(PINS), f"{source}[serve,onnx]")
    return programs


def programs_of(folder: Path) -> Path:
    return folder / ("Scripts" if sys.platform == "win32" else "bin")


def install(programs: Path, *words: str) -> None:
    """pip's install with these words. Raises EdgeError."""
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *words], programs)


def clean() -> dict[str, str]:
    """This process's environment without what leads to other modules."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PYTHONUTF8": "1"}


def run(command: list[str], folder: Path, **variables: str) -> str:
    env = clean() | variables
    done = subprocess.run(command, capture_output=True, cwd=folder, env=env, check=False)
    if done.returncode != 0:
        tail = done.stderr.decode("utf-8", "replace").strip().splitlines()[-5:]
        raise EdgeError(f"{' '.join(command[:4])} ... failed:\n" + "\n".join(tail))
    return done.stdout.decode("utf-8", "replace")


@contextlib.contextmanager
def served(programs: Path, model: Path) -> Iterator[str]:
    """The URL of `edge serve` over `model`; stopped at the end."""
    command = [str(programs / "edge"), "serve", str(model), "--port", "0", "--no-tune", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=programs.parent, env=clean())
    assert process.stdout is not None
    try:
        line = process.stdout.readline().decode("utf-8", "replace")
        url = next((word for word in line.split() if word.startswith("http://")), None)
        if url is None:
            raise EdgeError(f"edge serve said {line!r} in place of its address")
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(urllib.error.HTTPError):
                ask(f"{url}/ready")
                break
            if process.poll() is not None or time.monotonic() > until:
                raise EdgeError(f"edge serve {model} did not become ready", "its words are above")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode("utf-8")
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.onnx_alone", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run with an onnx folder")
    args = parser.parse_args(argv)
    if not (args.run / "onnx").is_dir():
        raise InputError(f"{args.run} has no onnx folder", f"make it: edge export onnx {args.run}")
    with tempfile.TemporaryDirectory(prefix="edge-clean-") as scratch:
        folder = Path(scratch)
        model = folder / "模型 copied"
        shutil.copytree(args.run / "onnx", model)
        source = folder / "source"
        tree = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "models", "runs")
        shutil.copytree(ROOT, source, ignore=tree)
        programs = environment(folder / "environment", source)
        code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
        there = run([str(programs / "python"), "-c", code, *FOREIGN], folder).strip()
        if there != "[]":
            raise EdgeError(f"{there} came along with edge[serve,onnx]")
        size = sum(file.stat().st_size for file in (folder / "environment").rglob("*") if file.is_file())
        with served(programs, model) as url:
            info = ask(f"{url}/info")
            said = ask(f"{url}/generate", {"prompt": "你是谁？", "max_tokens": 48, "temperature": 0})
            messages = [{"role": "user", "content": "Who are you?"}]
            chat = ask(f"{url}/v1/chat/completions", {"messages": messages, "max_tokens": 48})
            vector = ask(f"{url}/v1/embeddings", {"input": "a shell"})["data"][0]["embedding"]
    answers = [said["generate_text"], chat["choices"][0]["message"]["content"]]
    if info["backend"] != "onnx" or not all(answers) or len(vector) != info["embedding"]:
        raise EdgeError(f"wrong answers: {answers}, {len(vector)} numbers, backend {info['backend']}")
    facts = {
        "file": info["file"],
        "build": info["settings"]["build"],
        "environment_mib": round(size / 2**20),
        "answers": answers,
        "embedding": len(vector),
    }
    sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
