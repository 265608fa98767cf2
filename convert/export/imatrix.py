"""The importance matrix: how strongly each input column of each weight is used on the user's own rows.

    importance[tensor][column] = mean over tokens of (activation of the column)^2

The quantiser loses less of columns that carry more. llama.cpp gathers the matrix from a text file with a
program of its own; here it comes from the merged model in float32, over rows rendered as in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from convert.export import calibration
from convert.export.source import Source
from convert.model.layerwise import load
from edge.artefact.gguf_header import read_header
from edge.errors import InputError


def gather(origin: Source, file: Path, target: Path) -> dict[str, Any]:
    """Write the matrix of the merged model `origin` to `target`; what the manifest is to say of it.

    file: an unquantised GGUF of the model, whose tensors are taken. The matrix is a safetensors file with
    (columns,) float32 by GGUF tensor name, as llamacpp_tools.quantize reads it.
    Raises InputError where no data set is known, for an architecture whose tensor names are not known, or for
    activations with NaN or infinity.
    """
    header = read_header(file)
    rows, source = calibration.rows(origin.path, origin.record)
    tensor_name = calibration.tensor_names(header)
    sums: dict[str, torch.Tensor] = {}

    def observe(name: str, values: torch.Tensor) -> None:
        tensor = tensor_name(name)
        if tensor is None or values.shape[1] != header.tensors[tensor].shape[0]:
            return
        total = values.double().square().sum(0)
        sums[tensor] = sums[tensor] + total if tensor in sums else total

    model = load(origin.path)
    try:
        with model.observed(observe):
            for _ in model.logits(rows, [1] * len(rows)):
                pass
    finally:
        model.close()
    count = sum(len(row) - 1 for row in rows)
    values = {name: (total / count).float().numpy() for name, total in sums.items()}
    bad = [name for name, value in values.items() if not np.isfinite(value).all()]
    if bad:
        raise InputError(
            f"{origin.path}: the input of {bad[0]} contains NaN or infinity", "merge again: edge merge"
        )
    if not values:
        raise InputError(
            f"{origin.path} has no layer that {file.name} has a tensor for", "leave --imatrix out"
        )
    save_file(values, target)
    return {"tokens": count, "from": source}
