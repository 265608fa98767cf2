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

from convert.verify.reader import Reader
from edge.artefact import find
from edge.artefact.gguf_header import GGUFArray
from edge.artefact.gguf_shards import read_whole
from edge.backends.base import Logits
from edge.errors import EdgeError, InputError
from edge.machine import build_llamacpp, hardware
from edge.prompt import AddedTokens

# llama_token_type (llama.h): tokens that a text is searched for before anything else.
_CONTROL, _USER_DEFINED = 3, 4


class GgufReader(Reader):
    """A GGUF file in llama.cpp, with or without a LoRA adapter (a GGUF as well); in a process of its own."""

    slowness = 0

    def __init__(self, path: Path, *, lora: Path | None = None, context: int = 1024) -> None:
        self._header = header = read_whole(path)
        if lora is not None:
            find.check_lora(lora, header)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = self._start()
        order = {
            "path": str(path.absolute()),
            "lora": str(lora.absolute()) if lora else "",
            "context": min(context, header.context_length),
            "threads": hardware.cpu_threads(),
            "extra": bool(build_llamacpp.build_info().get("use_extra_bufts", True)),
        }
        self.path = path
        try:
            self._ask(order)
            about = self._ask({"op": "about"})
        except BaseException:
            self.close()
            raise
        declared = (header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        super().__init__(
            path,
            find.published(path),
            stage="gguf",
            kind=(header.file_type or "GGUF") + (" + LoRA" if lora else ""),
            template=header.chat_template or "",
            bos=about["bos"],
            eos=about["eos"],
            tokens=AddedTokens.of(self._added()),
            ends=[token for token in declared if isinstance(token, int)],
            vocab=int(about["vocab"]),
        )
        self.more_ends = frozenset(about["ends"]) - self.stop_ids

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-m", "convert.verify.gguf_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        return list(self._ask({"op": "encode", "texts": texts})["ids"])

    def decode(self, rows: list[list[int]]) -> list[str]:
        return list(self._ask({"op": "decode", "rows": rows})["texts"])

    def special_tokens(self) -> list[str]:
        # A token of stray bytes is no text.
        return [text for text, _ in self._added() if text.encode("utf-8", "ignore").decode() == text]

    def _added(self) -> list[tuple[str, bool]]:
        """Texts of control and added tokens, by id; whether each is a control token."""
        arrays = (self._header.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
        tokens, types = (array.values() if isinstance(array, GGUFArray) else [] for array in arrays)
        both = zip(tokens, types, strict=False)
        return [(str(text), kind == _CONTROL) for text, kind in both if kind in (_CONTROL, _USER_DEFINED)]

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
        request = {"op": "greedy", "ids": ids, "count": count, "ends": sorted(self.stop_ids)}
        return list(self._ask(request)["ids"])

    def speed(self, *, prompt: int = 256, steps: int = 24, rounds: int = 3) -> tuple[float, float]:
        """(prompt, decode) in tokens a second on this machine, one stream."""
        speeds = self._ask({"op": "speed", "prompt": prompt, "steps": steps, "rounds": rounds})
        return speeds["prompt"], speeds["decode"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode("utf-8") + b"\n")
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

    def _died(self) -> EdgeError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return EdgeError(
            f"llama.cpp could not compute {self.path} (exit code {code}): {' '.join(lines[-1:])[:300]}",
            "if llama-cpp-python is not installed or does not load: python -m edge.machine.build_llamacpp",
        )

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()
        self._errors.close()
