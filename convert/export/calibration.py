"""Rows of a run's data set on which an export measures activations, and the GGUF names of layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf

from convert.data import dataset, encode
from convert.model import chat_format
from convert.verify import probes
from edge.artefact import manifest
from edge.artefact.gguf_header import GGUFHeader
from edge.errors import EdgeError, InputError

# An importance matrix changes little with more tokens than these.
TOKENS = 8192
LONGEST_ROW = 512


def rows(folder: Path, record: manifest.Manifest | None) -> tuple[list[list[int]], str]:
    """Token ids of training rows, and what they are in words, such as "36 rows".

    folder, record: the merged model and its manifest, which leads to its adapter and data set. Rows that the
    comparison asks are left out where enough others remain. Raises InputError without a data set.
    """
    settings = probes.adapter_settings(record)
    plain = settings is not None and settings.get("stage") == "pt"
    try:
        if settings is None:
            raise InputError("no adapter with a data set is known behind the model")
        names, place = tuple(settings.get("dataset") or ()), Path(settings["dataset_dir"])
        every, _ = dataset.load(names, place, plain=plain)
    except EdgeError as error:
        raise InputError(
            f"measuring needs rows of the data set: {error.message}",
            "run it where the data set can be found, or leave --imatrix and --gptq out",
        ) from error
    asked = probes.from_data(record).probes
    others = [
        row for row in every if probes.Probe(row.messages[:-1], row.messages[-1]["content"]) not in asked
    ]
    enough = len(others) >= len(asked)
    parse = bool(settings.get("parse_control_tokens", False))
    form = chat_format.load(folder, plain=plain, parse_control_tokens=parse)
    rules = encode.Rules(
        cutoff_len=LONGEST_ROW,
        enable_thinking=settings.get("enable_thinking", True) if form.thinks else True,
    )
    report = dataset.Report()
    if plain:
        texts = list(encode.texts(every, form, report, rules))
        samples = encode.pages(texts, form, report, LONGEST_ROW)
    else:
        samples = encode.encode(others if enough else every, form, report, rules)
    mean = sum(len(sample.ids) for sample in samples) / max(1, len(samples))
    chosen = probes.spread(samples, max(2, int(TOKENS / max(1.0, mean))))
    note = "" if enough else ", those of the comparison among them"
    return [list(sample.ids) for sample in chosen], f"{len(chosen)} rows{note}"


def tensor_names(header: GGUFHeader) -> Callable[[str], str | None]:
    """GGUF tensor name of a linear layer by its name in transformers; None for one that the file lacks.

    Raises InputError for an architecture that the gguf package does not know.
    """
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if header.architecture not in numbers:
        raise InputError(f"the tensor names of {header.architecture} are not known")
    names = gguf.get_tensor_name_map(numbers[header.architecture], header.block_count)

    def tensor_name(layer: str) -> str | None:
        name = names.get_name(layer)
        # The head decides between all tokens: llama.cpp leaves its importance out too.
        return f"{name}.weight" if name != "output" and f"{name}.weight" in header.tensors else None

    return tensor_name
