"""What to measure against: llama.cpp's own server, built from the same sources with the same flags, and what
comes as Python packages, in environments of their own: two servers, and OpenVINO GenAI.

`python -m bench.servers.reference_servers` builds and installs them (minutes) and prints their paths.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.measure.load import Dialect, Part
from bench.measure.workloads import Job
from bench.servers.target import Target, last_lines
from edge.artefact.gguf_shards import read_whole
from edge.console import guarded
from edge.errors import EdgeError
from edge.machine import build_llamacpp, hardware
from edge.machine.llamacpp_source import sdist
from edge.setup import pip_command

# What the two Python servers need; nothing of it is used by the project itself.
_PACKAGES = (
    "xllamacpp==2026.10.11549",
    "fastapi==0.165.0",
    "uvicorn==0.54.0",
    "pydantic-settings==2.16.3",
    "sse-starlette==3.7.0",
    "starlette-context==0.3.6",
    "PyYAML==6.0.4",
)
_OPENVINO = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
_ON = ("LLAMA_BUILD_COMMON", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER", "BUILD_SHARED_LIBS")


def llama_server_binary(*, cuda: bool = False) -> Path:
    """llama-server, built once with the flags of our own build. Raises EdgeError with the log's end.

    It is llama.cpp as it comes, without the matrix products and the attention of edge/csrc, but with the
    header without which it crashes on a CPU with AMX.
    """
    plan = build_llamacpp.plan(cuda=cuda)
    folder = hardware.cache_dir() / "reference-servers" / plan.stock_key
    binary = folder / "bin" / ("llama-server.exe" if sys.platform == "win32" else "llama-server")
    if binary.is_file():
        return binary
    defines = {**plan.defines, **dict.fromkeys(_ON, "ON"), "CMAKE_BUILD_TYPE": "Release"}
    if plan.cxx_flags == "include-header":
        defines["CMAKE_CXX_FLAGS"] = f'-include "{build_llamacpp.HEADER}"'
    source = sdist() / "vendor" / "llama.cpp"
    configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(folder)]
    _run([*configure, *(f"-D{name}={value}" for name, value in sorted(defines.items()))])
    _run(["cmake", "--build", str(folder), "--target", "llama-server"])
    return binary


def servers_python() -> Path:
    """The interpreter of an environment with xllamacpp and llama_cpp.server, the latter on our own build."""
    plan = build_llamacpp.plan()
    return _environment(
        [plan.key, *_PACKAGES],
        lambda: [*_PACKAGES, str(build_llamacpp.wheel(plan, Console(stderr=True)))],
    )


def openvino_python() -> Path:
    """The interpreter of an environment with OpenVINO GenAI."""
    return _environment(_OPENVINO, lambda: _OPENVINO)


def _environment(facts: Sequence[str], packages: Callable[[], Sequence[str]]) -> Path:
    """The interpreter of an environment that has `packages`, made once for the same facts."""
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    folder = hardware.cache_dir() / "reference-servers" / f"python-{key}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "complete").is_file():
        venv.create(folder, with_pip=True, clear=True)
        _run([str(python), "-m", "pip", "install", "--quiet", *packages()])
        (folder / "complete").touch()
    return python


def _run(command: list[str]) -> None:
    scripts = str(Path(sys.executable).parent)
    path = scripts + os.pathsep + os.environ.get("PATH", "")
    program = shutil.which(command[0], path=path)
    if program is None:
        raise EdgeError(f"{command[0]} is not installed", pip_command("install", "cmake", "ninja"))
    done = subprocess.run(
        [program, *command[1:]], capture_output=True, check=False, env={**os.environ, "PATH": path}
    )
    if done.returncode != 0:
        said = last_lines(done.stdout + done.stderr, 15)
        raise EdgeError(f"{command[0]} failed", "\n  ".join(said))


class LlamaServer(Dialect):
    """llama-server's native /completion, streamed, greedy, with prefix reuse as the job has it."""

    def ask(self, job: Job) -> tuple[str, str, Any]:
        body = {"prompt": job.prompt, "n_predict": job.tokens, "temperature": 0.0}
        given = {"cache_prompt": job.reuse, "ignore_eos": True, "stream": True}
        return "POST", "/completion", body | given

    def read(self, answer: dict[str, Any]) -> Part:
        if not answer.get("stop"):
            return Part(text=answer.get("content", ""), tokens=len(answer.get("tokens", [])) or 1)
        kind = answer.get("stop_type", "limit")
        return Part(
            text=answer.get("content", ""),
            prompt_tokens=answer.get("tokens_evaluated"),
            completion_tokens=answer.get("tokens_predicted"),
            finish="length" if kind == "limit" else kind,
        )


def llama_server(
    path: Path,
    *,
    slots: int,
    context: int,
    threads: int,
    flash_attention: bool,
    gpu_layers: int | None = None,
    unified: bool = False,
) -> Target:
    """llama.cpp's server over the same file, with as many slots of `context` tokens.

    gpu_layers: on a GPU; None for a build without one. unified: one KV cache of all slots' cells.
    """
    gpu = () if gpu_layers is None else ("--fit", "off", "--gpu-layers", str(gpu_layers))
    command = [
        str(llama_server_binary(cuda=gpu_layers is not None)),
        *("--model", str(path), "--host", "127.0.0.1", "--port", "{port}"),
        *("--parallel", str(slots), "--ctx-size", str(slots * context)),
        *("--threads", str(threads), "--threads-batch", str(threads)),
        *("--flash-attn", "on" if flash_attention else "off"),
        *("--no-webui", "--cache-ram", "0", "--log-disable"),
        *(["--kv-unified"] if unified else []),
        *gpu,
    ]
    return Target("llama-server", command, LlamaServer(), "/health", "/props")


def xllamacpp(path: Path, *, slots: int, context: int, threads: int) -> Target:
    """xllamacpp's server from its wheel, as it sets itself but for slots, context and threads."""
    script = Path(__file__).with_name("xllamacpp_child.py")
    numbers = ["{port}", str(slots), str(context), str(threads)]
    command = [str(servers_python()), str(script), str(path), *numbers]
    return Target("xllamacpp", command, LlamaServer(), "/health", "/props")


def openvino_command(path: Path, threads: int) -> list[str]:
    """What runs OpenVINO GenAI over the same file; see openvino_child.py."""
    script = Path(__file__).with_name("openvino_child.py")
    return [str(openvino_python()), str(script), str(path), str(threads)]


class LlamaCppServer(Dialect):
    """llama_cpp.server's /v1/completions, greedy, whole answers: it counts tokens in those alone.

    It counts the tokens of the answer's text, encoded again, which may be more or fewer than were made. ends:
    ids that end an answer; it cannot ignore them, so they are forbidden by a bias.
    """

    def __init__(self, ends: frozenset[int]) -> None:
        self._never = {str(token): -100.0 for token in sorted(ends)}

    def ask(self, job: Job) -> tuple[str, str, Any]:
        body = {"prompt": job.prompt, "max_tokens": job.tokens, "temperature": 0.0}
        return "POST", "/v1/completions", body | {"logit_bias": self._never}

    def read(self, answer: dict[str, Any]) -> Part:
        choice, usage = answer["choices"][0], answer["usage"]
        return Part(
            text=choice["text"],
            tokens=None,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            finish=choice["finish_reason"],
            at_limit=choice["finish_reason"] == "length",
        )


def llama_cpp_server(path: Path, *, context: int, threads: int) -> Target:
    """`python -m llama_cpp.server`, which answers one request after the other."""
    command = [
        *(str(servers_python()), "-m", "llama_cpp.server", "--model", str(path)),
        *("--host", "127.0.0.1", "--port", "{port}", "--n_ctx", str(context)),
        *("--n_threads", str(threads), "--n_threads_batch", str(threads)),
        # Its default ends a running answer when the next request comes.
        *("--interrupt_requests", "false", "--verbose", "false"),
    ]
    metadata = read_whole(path).metadata
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    dialect = LlamaCppServer(frozenset(token for token in ends if isinstance(token, int)))
    return Target("llama_cpp.server", command, dialect, "/v1/models", "/v1/models", health="/v1/models")


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench.servers.reference_servers", description=__doc__).parse_args(
        argv
    )
    sys.stdout.write(f"{llama_server_binary()}\n{servers_python()}\n{openvino_python()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
