"""The importance matrix: how strongly each input column of each weight is used on the user's own rows.

    importance[tensor][column] = mean over tokens of (activation of the column)^2

The quantiser rounds so that columns which carry more lose less. llama.cpp gathers it from a text file with a
program of its own; here it comes from the merged model in float32, over rows rendered as in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from convert.export import calibration
from convert.model.layerwise import load
from edge.artefact import manifest
from edge.artefact.gguf_header import GGUFHeader
from edge.errors import InputError


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
    ids, source = calibration.rows(folder, known)
    names = calibration.tensor_names(header)
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
