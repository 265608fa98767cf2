"""The reader for whatever path a user gives."""

from __future__ import annotations

from pathlib import Path

from convert.verify.gguf_reader import GgufReader
from convert.verify.onnx_reader import OnnxReader
from convert.verify.reader import Reader
from convert.verify.torch_reader import TorchReader
from edge.artefact import find
from edge.errors import InputError


def open_reader(given: Path, *, lora: Path | None = None) -> Reader:
    """The reader for an adapter's or a transformers folder, a folder with a GGUF or an ONNX file, a run, or
    such a file.

    Raises InputError where there is nothing of the kind.
    """
    if not given.exists():
        raise InputError(f"no such file or folder: {given}", "give a stage's folder, a run or a file")
    if (given / "adapter_config.json").is_file() or (given / "config.json").is_file():
        return TorchReader(given)
    path = find.resolve(given).path
    if path.suffix == ".onnx":
        if lora is not None:
            raise InputError(f"{path} is no GGUF: an adapter goes on top of one", "edge export gguf RUN")
        return OnnxReader(path)
    return GgufReader(path, lora=lora)
