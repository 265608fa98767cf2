"""Rows of a run's data set that an export measures activations on, and what a layer is called in GGUF."""

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

# More tokens change the matrix little: past these the time is better spent otherwise.
TOKENS = 8192
LONGEST_ROW = 512


def rows(folder: Path, known: manifest.Manifest | None) -> tuple[list[list[int]], str]:
    """(token ids of rows, what they are): training rows that the comparison does not ask, if they suffice."""
    settings = probes.adapter_settings(known)
    try:
        if settings is None:
            raise InputError("no adapter with a data set is known behind the model")
        found, _ = dataset.load(
            tuple(settings.get("dataset") or ()), Path(str(settings.get("dataset_dir", "data")))
        )
    except EdgeError as error:
        raise InputError(
            f"measuring needs rows of the data set: {error.message}",
            "run it where the data set can be found, or leave --imatrix and --gptq out",
        ) from error
    asked = probes.from_data(known).probes
    left = [row for row in found if probes.Probe(row.messages[:-1], row.messages[-1]["content"]) not in asked]
    chosen = left if len(left) >= len(asked) else found
    form = chat_format.load(folder)
    thinking = settings.get("enable_thinking", True)
    samples = encode.encode(
        chosen,
        form,
        dataset.Report(),
        cutoff_len=LONGEST_ROW,
        enable_thinking=thinking if form.thinks else True,
    )
    mean = sum(len(sample.ids) for sample in samples) / max(1, len(samples))
    ids = [sample.ids for sample in probes.spread(samples, max(2, int(TOKENS / max(1.0, mean))))]
    what = "rows" if chosen is left else "rows, those of the comparison among them"
    return ids, f"{len(ids)} {what}"


def tensor_names(header: GGUFHeader) -> Callable[[str], str | None]:
    """GGUF tensor name of a linear layer by its name in transformers; None for one that the file lacks."""
    arch = next((one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    if arch is None:
        raise InputError(f"the tensor names of {header.architecture} are not known")
    known = gguf.get_tensor_name_map(arch, header.block_count)

    def of(name: str) -> str | None:
        found = known.get_name(name)
        tensor = f"{found}.weight"
        # The head decides between all tokens: llama.cpp leaves its importance out too.
        return tensor if found and found != "output" and tensor in header.tensors else None

    return of
