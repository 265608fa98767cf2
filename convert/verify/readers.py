"""What `edge verify` reads: one interface over an adapter with its base, a transformers folder, a GGUF file.
An ONNX file's reader is in verify_onnx.

A further format needs a subclass of Reader that fills the fields and gives `logits(ids) -> [n, vocab]`, and a
line in `open_reader`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.model import chat_format
from edge.artefact import find, manifest
from edge.artefact.gguf_shards import read_whole
from edge.chat_template import ChatTemplate
from edge.errors import EdgeError, InputError, RequestError
from edge.machine import build_llamacpp, hardware

Logits = NDArray[np.float32]


class Reader(ABC):
    """One stage of a model, as it would be asked. Tokenizing must work before any weights are loaded.

    path: what was given. stage: as in edge.json. kind: type of its weights. template: the chat template's
    text. stop_ids: tokens at which an answer ends; more_ends: others at which its runtime would stop as well.
    vocab: rows of the output layer. known: its manifest, if it has one. slowness: which of two readers is to
    write texts.
    """

    path: Path
    stage: str
    kind: str
    template: str
    stop_ids: frozenset[int]
    more_ends: frozenset[int] = frozenset()
    vocab: int
    known: manifest.Manifest | None = None
    slowness: int = 2

    def __init__(self, source: str, bos: str, eos: str, thinking: str | None) -> None:
        self.template = source
        self.thinking = thinking
        self._chat = ChatTemplate(source, bos=bos, eos=eos)

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The text that serving makes of `messages`; the template's words in angle brackets if it refuses."""
        try:
            return self._chat.render(messages, thinking=self.thinking)
        except RequestError as error:
            return f"<{error.message}>"

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text: special tokens that stand in it are recognised, none are added."""

    @abstractmethod
    def decode(self, rows: list[list[int]]) -> list[str]:
        """The text of each row of ids, without control tokens."""

    @abstractmethod
    def logits(self, ids: list[int]) -> Logits:
        """Logits after each of `ids`: float32 (len(ids), vocab)."""

    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        """Logits after the `last` tokens of each row in turn, float32 (last, vocab).

        To be overridden where many rows at once, or fewer logits, are cheaper.
        """
        return (self.logits(ids)[-count:] for ids, count in zip(rows, last, strict=True))

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        """At most `count` most probable next tokens, a stop token included; None where it is too slow."""
        made: list[int] = []
        while len(made) < count and not (made and made[-1] in self.stop_ids):
            made.append(int(self.logits(ids + made)[-1].argmax()))
        return made

    @abstractmethod
    def close(self) -> None:
        """Let go of the weights."""


class TorchReader(Reader):
    """A transformers folder; or an adapter, computed over the weights that its training saw."""

    def __init__(self, path: Path) -> None:
        adapter = (path / "adapter_config.json").is_file()
        self.path = path
        self.known = manifest.read(path) if (path / manifest.FILE).is_file() else None
        if adapter:
            from convert.model.lora_adapter import find_base, known_adapter, words

            self.known = known_adapter(path)
            self._base = find_base(self.known, path)
            form = words(path, self._base)
        else:
            form = chat_format.load(path)
        super().__init__(form.source, form.bos, form.eos, self.known.thinking if self.known else None)
        self._form = form
        self.stage = self.known.stage if self.known else "model"
        # As serving has it: what the stage says of itself, else what its files say.
        self.stop_ids = frozenset(self.known.stop_ids if self.known else ()) or frozenset(form.stop_ids)
        self._model: Any = None
        if adapter:
            assert self.known is not None
            self._adapter: Path | None = path
            self.kind = "NF4 + LoRA" if self.known.settings.get("quantized") else "base + LoRA"
        else:
            self._base, self._adapter, self.slowness = path, None, 1
            config = _json(path / "config.json")
            self.kind = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        config = _json(self._base / "config.json")
        self.vocab = int((config.get("text_config") or config).get("vocab_size", 0))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._form.encode(texts)

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [self._form.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]

    def logits(self, ids: list[int]) -> Logits:
        return next(self.all_logits([ids], [len(ids)]))

    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        return (found.numpy() for found in self.model().logits(rows, last))

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        from convert.model.layerwise import is_large

        # Each token would read all of its weights.
        if is_large(self._base):
            return None
        found: list[int] = self.model().greedy(ids, count, self.stop_ids)
        return found

    def model(self) -> Any:
        """The loaded model (convert.model.reference.TorchModel)."""
        if self._model is None:
            from convert.model.layerwise import load

            self._model = load(self._base, self._adapter)
        return self._model

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None


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


def open_reader(given: Path, *, lora: Path | None = None) -> Reader:
    """The reader for an adapter's or a transformers folder, a folder with a GGUF or an ONNX file, a run, or
    such a file.

    Raises InputError where there is nothing of the kind.
    """
    if not given.exists():
        raise InputError(f"no such file or folder: {given}", "give a stage's folder, a run or a file")
    if (given / "adapter_config.json").is_file() or (given / "config.json").is_file():
        return TorchReader(given)
    found = find.resolve(given)
    if found.kind == "onnx":
        from convert.verify.onnx_reader import OnnxReader

        if lora is not None:
            raise InputError(
                f"{found.path} is no GGUF: an adapter goes on top of one", "edge export gguf RUN"
            )
        return OnnxReader(found.path)
    return GgufReader(found.path, lora=lora)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "get the model again") from error
    return data if isinstance(data, dict) else {}
