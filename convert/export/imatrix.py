"""The importance matrix: how strongly each input column of each weight is used on the user's own rows.

    importance[tensor][column] = mean over tokens of (activation of the column)^2

The quantiser rounds so that columns which carry more lose less. llama.cpp gathers it from a text file with a
program of its own; here it comes from the merged model in float32, over rows rendered as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from convert.data import dataset, encode
from convert.model import chat_format
from convert.model.layerwise import load
from convert.verify import probes
from edge.artefact import manifest
from edge.artefact.gguf_header import GGUFHeader
from edge.errors import EdgeError, InputError

# More tokens change the matrix little: past these the time is better spent otherwise.
TOKENS = 8192
LONGEST_ROW = 512


@dataclass(frozen=True)
class Matrix:
    """values: (columns,) float32 by GGUF tensor name. source: what it was gathered from, in words."""

    values: dict[str, NDArray[np.float32]]
    tokens: int
    source: str

    def save(self, path: Path) -> None:
        # Numbered: a name with a slash or a dot is none that an archive keeps safely.
        arrays = {f"t{number}": value for number, value in enumerate(self.values.values())}
        np.savez(path, names=np.array(list(self.values)), **arrays)


def gather(folder: Path, known: manifest.Manifest | None, header: GGUFHeader) -> Matrix:
    """The matrix of the merged model in `folder`, for the tensors of its GGUF file with `header`.

    Raises InputError where no data set is known, or an architecture that the names are not known of.
    """
    ids, source = rows(folder, known)
    names = tensor_names(header)
    sums: dict[str, torch.Tensor] = {}

    def observe(name: str, values: torch.Tensor) -> None:
        tensor = names(name)
        if tensor is None or values.shape[1] != header.tensors[tensor].shape[0]:
            return
        total = values.double().square().sum(0)
        sums[tensor] = sums[tensor] + total if tensor in sums else total

    model = load(folder)
    try:
        with model.observed(observe):
            for _ in model.logits(ids, [1] * len(ids)):
                pass
    finally:
        model.close()
    count = sum(len(row) - 1 for row in ids)
    values = {name: (total / count).float().numpy() for name, total in sums.items()}
    bad = [name for name, value in values.items() if not np.isfinite(value).all()]
    if bad or not values:
        raise InputError(
            f"{folder}: no importance could be gathered for {', '.join(bad[:3]) or 'any tensor'}"
        )
    return Matrix(values, count, source)


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
