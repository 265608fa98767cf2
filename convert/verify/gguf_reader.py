"""A GGUF file as a stage that is compared, computed by llama.cpp in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.verify.reader import Logits, Reader
from edge.artefact import find, manifest
from edge.artefact.gguf_shards import read_whole
from edge.errors import EdgeError, InputError
from edge.machine import build_llamacpp, hardware


class GgufReader(Reader):
    """A GGUF file in llama.cpp, with or without a LoRA adapter (a GGUF as well); in a process of its own."""

    def __init__(self, path: Path, *, lora: Path | None = None, context: int = 1024) -> None:
        folder = path.parent
        known = manifest.read(folder) if (folder / manifest.FILE).is_file() else None
        self.known = known if known is not None and path.name in known.files else None
        header = read_whole(path)
        if header.chat_template is None:
            raise InputError(f"{path} has no chat template", "export it again from a folder that has one")
        self.path, self.stage, self.kind = path, "gguf", header.file_type or "GGUF"
        self.slowness = 0
        if lora is not None:
            find.check_lora(lora, header)
            self.kind += " + LoRA"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        extra = bool(build_llamacpp.build_info().get("use_extra_bufts", True))
        order = {
            "path": str(path.absolute()),
            "lora": str(lora.absolute()) if lora else "",
            "context": min(context, header.context_length),
            "threads": hardware.cpu_threads(),
            "extra": extra,
        }
        command = [sys.executable, "-m", "convert.verify.gguf_child"]
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            self._send(order)
            about = self._ask({"op": "about"})
        except BaseException:
            self.close()
            raise
        super().__init__(
            header.chat_template, about["bos"], about["eos"], self.known.thinking if self.known else None
        )
        self.vocab = int(about["vocab"])
        declared = (header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        own = {one for one in declared if isinstance(one, int)}
        self.stop_ids = frozenset(self.known.stop_ids if self.known else own) or frozenset(own)
        self.more_ends = frozenset(about["ends"]) - self.stop_ids

    def encode(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self._ask({"op": "encode", "texts": texts})["ids"]
        return found

    def decode(self, rows: list[list[int]]) -> list[str]:
        found: list[str] = self._ask({"op": "decode", "rows": rows})["texts"]
        return found

    def logits(self, ids: list[int]) -> Logits:
        return self._logits(ids, len(ids))

    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        return (self._logits(ids, count) for ids, count in zip(rows, last, strict=True))

    def _logits(self, ids: list[int], last: int) -> Logits:
        rows, columns = self._ask({"op": "logits", "ids": ids, "last": last})["shape"]
        assert self._process.stdout is not None
        data = self._process.stdout.read(4 * rows * columns)
        if len(data) != 4 * rows * columns:
            raise self._died()
        return np.frombuffer(data, np.float32).reshape(rows, columns)

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        ask = {"op": "greedy", "ids": ids, "count": count, "ends": sorted(self.stop_ids)}
        found: list[int] = self._ask(ask)["ids"]
        return found

    def speed(self, *, prompt: int = 256, steps: int = 24, rounds: int = 3) -> tuple[float, float]:
        """(prompt, decode) in tokens a second on this machine, one stream."""
        found = self._ask({"op": "speed", "prompt": prompt, "steps": steps, "rounds": rounds})
        return found["prompt"], found["decode"]

    def _send(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order).encode("utf-8") + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._died() from error
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"], answer["hint"])
        return answer

    _ask = _send

    def _died(self) -> EdgeError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return EdgeError(
            f"llama.cpp could not compute {self.path} (exit code {code}): {' '.join(said[-1:])[:300]}",
            "if llama-cpp-python is not installed or does not load: python -m edge.machine.build_llamacpp",
        )

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()
        self._errors.close()
