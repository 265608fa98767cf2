"""Other servers to measure against: llama.cpp's own, built from the same sources with the same flags.

python -m bench.peers          builds llama-server (minutes) and says where it lies
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.load import Job, Part
from bench.targets import Target
from edge import hardware, native
from edge.cli import guarded
from edge.errors import EdgeError
from edge.sdist import sdist

_ON = ("LLAMA_BUILD_COMMON", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER", "BUILD_SHARED_LIBS")


def llama_server_binary() -> Path:
    """llama-server, built once with the flags of our own build. Raises EdgeError with the log's end."""
    plan = native.plan()
    folder = hardware.cache_dir() / "peers" / plan.key
    binary = folder / "bin" / ("llama-server.exe" if sys.platform == "win32" else "llama-server")
    if binary.is_file():
        return binary
    defines = {**plan.defines, **dict.fromkeys(_ON, "ON"), "CMAKE_BUILD_TYPE": "Release"}
    if plan.cxx_flags == "include-header":
        defines["CMAKE_CXX_FLAGS"] = f'-include "{native.HEADER}"'
    source = sdist() / "vendor" / "llama.cpp"
    configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(folder)]
    _run([*configure, *(f"-D{name}={value}" for name, value in sorted(defines.items()))])
    _run(["cmake", "--build", str(folder), "--target", "llama-server"])
    return binary


def _run(command: list[str]) -> None:
    scripts = str(Path(sys.executable).parent)
    path = scripts + os.pathsep + os.environ.get("PATH", "")
    program = shutil.which(command[0], path=path)
    if program is None:
        raise EdgeError(f"{command[0]} is not installed", "pip install -c constraints.txt cmake ninja")
    done = subprocess.run(
        [program, *command[1:]], capture_output=True, check=False, env={**os.environ, "PATH": path}
    )
    if done.returncode != 0:
        tail = (done.stdout + done.stderr).decode("utf-8", "replace").strip().splitlines()[-15:]
        raise EdgeError(f"{command[0]} failed", "\n  ".join(tail))


class LlamaServer:
    """llama-server's native /completion, streamed, greedy, every prompt read in full."""

    def ask(self, job: Job) -> tuple[str, str, Any]:
        body = {"prompt": job.prompt, "n_predict": job.tokens, "temperature": 0.0, "cache_prompt": False}
        return "POST", "/completion", body | {"ignore_eos": True, "stream": True}

    def read(self, said: dict[str, Any]) -> Part:
        if "error" in said:
            return Part(error=str(said["error"].get("message", said["error"])))
        if not said.get("stop"):
            return Part(text=said.get("content", ""), tokens=len(said.get("tokens", [])) or 1)
        kind = said.get("stop_type", "limit")
        return Part(
            text=said.get("content", ""),
            prompt_tokens=said.get("tokens_evaluated"),
            completion_tokens=said.get("tokens_predicted"),
            finish="length" if kind == "limit" else kind,
        )


def llama_server(path: Path, *, slots: int, context: int, threads: int, flash_attention: bool) -> Target:
    """llama.cpp's server over the same file, with as many slots of `context` tokens."""
    command = [
        str(llama_server_binary()),
        *("--model", str(path), "--host", "127.0.0.1", "--port", "{port}"),
        *("--parallel", str(slots), "--ctx-size", str(slots * context)),
        *("--threads", str(threads), "--threads-batch", str(threads)),
        *("--flash-attn", "on" if flash_attention else "off"),
        *("--no-webui", "--cache-ram", "0", "--log-disable"),
    ]
    return Target("llama-server", command, LlamaServer(), "/health", "/props")


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__).parse_args(argv)
    sys.stdout.write(f"{llama_server_binary()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
