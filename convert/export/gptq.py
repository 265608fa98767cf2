"""GPTQ: the codes of a quantised GGUF, chosen anew so that rounding errors compensate on the user's own rows.

llama.cpp rounds each weight to the nearest value of its block. Here column after column is rounded, and what
that changes in a layer's outputs is taken out of the columns that are still to come (Frantar et al. 2022,
https://arxiv.org/abs/2210.17323). A layer reads what the quantised layers before it give, and is fitted to
what the whole model gives in its place (Li et al. 2025, https://arxiv.org/abs/2504.02692). Types, sizes and
the values that a block can hold stay as llama.cpp wrote them: what reads its files reads these, as fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from rich.console import Console

from convert.export import calibration
from convert.export.source import Source
from convert.model.layerwise import Batch, LayeredModel
from edge.artefact.gguf_header import GGUFTensor, read_header
from edge.errors import InputError
from edge.machine import hardware
from edge.progress import counted, phase

# Added to each column's mean square, which is 1 on average: a few thousand tokens say little about how a
# thousand columns correlate. With 0.1 and 1 a 135M model in Q4_0 was 1.29 and 1.06 times as far off.
DAMP = 0.3
STEP = 32  # columns whose errors are taken out of all later ones at once
SUB = 32  # values with a scale of their own

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """Where the codes of a block lie.

    block: values. size, low, high: in bytes; low and high are where its lowest four bits and the fifth begin.
    """

    block: int
    size: int
    low: int
    high: int | None = None

    @property
    def top(self) -> int:
        """The largest code."""
        return 15 if self.high is None else 31

    def put(self, codes: Bytes, data: Bytes) -> Bytes:
        """`data` (rows, bytes), with `codes` (rows, columns), 0 to top, in place of its own."""
        blocks = data.reshape(len(data), -1, self.size).copy()
        halves = codes.reshape(*blocks.shape[:2], -1, 2, SUB if self.block > SUB else SUB // 2)
        nibbles = halves[..., 0, :] & 15 | (halves[..., 1, :] & 15) << 4
        blocks[..., self.low : self.low + self.block // 2] = nibbles.reshape(*blocks.shape[:2], -1)
        if self.high is not None:
            fifth = codes.reshape(*blocks.shape[:2], -1, SUB) >> 4
            # Small blocks have them in turn, large ones a byte for each value of a sub-block.
            bits = np.packbits(fifth, axis=2 if self.block > SUB else 3, bitorder="little")
            blocks[..., self.high : self.high + self.block // 8] = bits.reshape(*blocks.shape[:2], -1)
        return blocks.reshape(data.shape)


LAYOUTS = {
    "Q4_0": Layout(32, 18, 2),
    "Q4_1": Layout(32, 20, 4),
    "Q5_0": Layout(32, 22, 6, 2),
    "Q5_1": Layout(32, 24, 8, 4),
    "Q4_K": Layout(256, 144, 16),
    "Q5_K": Layout(256, 176, 48, 16),
}


def choose_codes(origin: Source, whole: Path, file: Path, console: Console) -> dict[str, Any]:
    """Choose the codes of `file` anew, in place; what the manifest is to say of it.

    whole: the GGUF that `file` was quantised from. Raises InputError where no data set is known, for an
    architecture whose tensor names are not known, and for activations that contain NaN or infinity.
    """
    rows, source = calibration.rows(origin.path, origin.record)
    tokens = sum(map(len, rows))
    with (
        phase(console, "GPTQ"),
        contextlib.closing(LayeredModel(origin.path)) as model,
        contextlib.closing(_Tensors(whole, file)) as tensors,
        torch.inference_mode(),
    ):
        _check_memory(model, tokens)
        batches = model.enter(rows)
        exact = rounded = [batch.states for batch in batches]
        for number, layer in enumerate(counted(model.layers, "layers")):
            with model.present(layer):
                exact, rounded = _quantise(model, number, batches, exact, rounded, tensors)
    if not tensors.changed:
        raise InputError(f"{file.name} has no tensor whose codes can be chosen", "export without --gptq")
    return {"tokens": tokens, "from": source, "tensors": tensors.changed}


def _check_memory(model: LayeredModel, tokens: int) -> None:
    """Raise InputError unless the widest linear layer's inputs and their covariance fit into memory."""
    modules = (module for layer in model.layers for module in layer.modules())
    width = max((module.in_features for module in modules if isinstance(module, torch.nn.Linear)), default=0)
    need, memory = 4 * width * (3 * width + 4 * tokens), hardware.memory()
    if need > memory.available:
        raise InputError(
            f"--gptq needs {need / 2**30:.1f} GiB for {width} columns, "
            f"{memory.available / 2**30:.1f} GiB are free{memory.within}",
            "close what else uses memory, or leave it out",
        )


class _Tensors:
    """The weights of linear layers in two GGUF files: as they were, and quantised."""

    def __init__(self, whole: Path, file: Path) -> None:
        header = read_header(file)
        self._tensor_name = calibration.tensor_names(header)
        self._tensors, self._sources = header.tensors, read_header(whole).tensors
        self._data = np.memmap(file, np.uint8, "r+")
        self._source = np.memmap(whole, np.uint8, "r")
        self.changed = 0

    def close(self) -> None:
        self._data.flush()
        del self._data, self._source

    def find(self, name: str, weight: torch.Tensor) -> _Tensor | None:
        """What transformers calls `name`; None for one that the file does not hold row by row."""
        stored = self._tensor_name(name)
        if stored is None or stored not in self._sources:
            return None
        tensor, source = self._tensors[stored], self._sources[stored]
        data, rows = _rows(self._data, tensor), _rows(self._source, source)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}.get(source.type)
        if dtype is None or len(rows) != len(weight):
            return None
        # The converter changes the order of some architectures' rows: each is looked up by its bytes.
        numbers: dict[bytes, list[int]] = {}
        for number, row in enumerate(weight.to(dtype).view(torch.uint8).numpy()):
            numbers.setdefault(row.tobytes(), []).append(number)
        order = [numbers[row.tobytes()].pop() if numbers.get(row.tobytes()) else -1 for row in rows]
        return None if -1 in order else _Tensor(data, tensor.type, np.array(order))


def _rows(file: Bytes, tensor: GGUFTensor) -> Bytes:
    return file[tensor.offset : tensor.offset + tensor.bytes].reshape(tensor.shape[1], -1)


class _Tensor:
    """A quantised tensor; its rows in the order that transformers has them."""

    def __init__(self, data: Bytes, kind: str, order: NDArray[np.int64]) -> None:
        self._file, self._kind, self._order = data, kind, order
        self.layout = LAYOUTS.get(kind)
        self._data = np.empty_like(data)
        self._data[order] = data

    def values(self) -> torch.Tensor:
        """(rows, columns) float32, as llama.cpp computes with them."""
        return self._dequantised(self._data)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, lowest), each (rows, columns / SUB): a code stands for lowest + scale * code."""
        assert self.layout is not None
        shape = (len(self._data), self._data.shape[1] // self.layout.size * self.layout.block)
        low, next_ = (
            self._dequantised(self.layout.put(np.full(shape, code, np.uint8), self._data))[:, ::SUB]
            for code in (0, 1)
        )
        return next_ - low, low

    def write(self, codes: torch.Tensor) -> None:
        """Put `codes` (rows, columns), uint8, into the file."""
        assert self.layout is not None
        self._data = self.layout.put(codes.numpy(), self._data)
        self._file[:] = self._data[self._order]

    def _dequantised(self, data: Bytes) -> torch.Tensor:
        values = dequantize(data, GGMLQuantizationType[self._kind])
        return torch.from_numpy(values.astype(np.float32, copy=False))


class _Reached(Exception):
    """Ends a layer's forward pass at the linear layer whose input is wanted, which it carries."""


def _quantise(
    model: LayeredModel,
    number: int,
    batches: list[Batch],
    exact: list[torch.Tensor],
    rounded: list[torch.Tensor],
    tensors: _Tensors,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Choose the codes of layer `number`, which is present.

    exact, rounded: each batch's states before the layer, in the whole model and in the quantised one. Returns
    the same behind it.
    """
    # Linear layers called one after the other with the same input share what is computed from it.
    # leaders: the first of each layer's group; inputs: what that one reads of each batch.
    leaders: dict[str, str] = {}
    inputs: dict[str, list[torch.Tensor]] = {}
    last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def note(name: str, values: torch.Tensor) -> None:
        nonlocal last
        if name not in leaders:
            leaders[name] = leaders[last[0]] if torch.equal(values, last[1]) else name
        if leaders[name] == name:
            inputs.setdefault(name, []).append(values)
        last = name, values

    with model.observed(note):
        after = [model.through(number, *each) for each in zip(batches, exact, strict=True)]
    for leader, targets in inputs.items():
        group = {name: model.linear(name).weight for name, first in leaders.items() if first == leader}
        stored = [(weight, tensors.find(name, weight)) for name, weight in group.items()]
        pairs = [(weight, tensor) for weight, tensor in stored if tensor]
        chosen = [(weight, tensor) for weight, tensor in pairs if tensor.layout]
        if chosen:
            _write(
                chosen, torch.cat(list(_inputs(model, number, batches, rounded, leader))), torch.cat(targets)
            )
            tensors.changed += len(chosen)
        for weight, tensor in pairs:
            weight.copy_(tensor.values())
        targets.clear()
    return after, [model.through(number, *each) for each in zip(batches, rounded, strict=True)]


def _inputs(
    model: LayeredModel, number: int, batches: list[Batch], states: list[torch.Tensor], name: str
) -> Iterator[torch.Tensor]:
    """What the linear layer `name` reads of each batch, as far as layer `number` is quantised by now."""

    def stop(observed: str, values: torch.Tensor) -> None:
        if observed == name:
            raise _Reached(values)

    for each in zip(batches, states, strict=True):
        try:
            with model.observed(stop):
                model.through(number, *each)
        except _Reached as reached:
            yield reached.args[0]


def _write(chosen: list[tuple[torch.Tensor, _Tensor]], inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Choose the codes of weights that are multiplied with the same inputs, and put them into the file."""
    grids = [tensor.grid() for _, tensor in chosen]
    tops = [torch.full((len(weight),), tensor.layout.top) for weight, tensor in chosen if tensor.layout]
    codes = choose(
        torch.cat([weight for weight, _ in chosen]),
        torch.cat([scale for scale, _ in grids]),
        torch.cat([lowest for _, lowest in grids]),
        torch.cat(tops),
        inputs,
        targets,
    )
    for (_, tensor), part in zip(chosen, codes.split([len(top) for top in tops]), strict=True):
        tensor.write(part)


def choose(
    weights: torch.Tensor,
    scale: torch.Tensor,
    lowest: torch.Tensor,
    top: torch.Tensor,
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Codes (rows, columns), uint8: lowest + scale * code does to `inputs` what `weights` do to `targets`.

    weights: (rows, columns). scale, lowest: (rows, columns / SUB). top: (rows,), the largest codes. inputs,
    targets: (tokens, columns), what is read in the quantised model and in the whole one; each token counts
    alike. Raises InputError where they contain NaN or infinity.
    """
    columns, tokens = weights.shape[1], len(inputs)
    length = inputs.square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)
    x = inputs / length
    # The strongest first, while there are most columns left to compensate for them.
    order = x.square().mean(0).argsort(descending=True)
    x = x[:, order]
    drift = ((targets / length)[:, order] - x).T @ x / tokens
    covariance = x.T @ x / tokens
    if not (covariance.isfinite().all() and drift.isfinite().all()):
        raise InputError(
            "the model's activations contain NaN or infinity on its own rows", "merge again: edge merge"
        )
    covariance.diagonal().add_(DAMP)
    lower = torch.linalg.cholesky(covariance)
    del covariance
    # (columns, rows) from here on: a column of weights lies in one place.
    remaining = weights.T[order]
    remaining += torch.cholesky_solve(drift.T @ remaining, lower)
    del drift
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    del lower
    scale, lowest = scale.T.contiguous(), lowest.T.contiguous()
    inverse = torch.where(scale == 0, torch.ones_like(scale), scale).reciprocal()
    zero, top = torch.zeros_like(top, dtype=torch.float32), top.float()
    codes = torch.empty(remaining.shape, dtype=torch.uint8)
    for first in range(0, columns, STEP):
        stop = min(first + STEP, columns)
        errors = torch.empty(stop - first, remaining.shape[1])
        for column in range(first, stop):
            block = int(order[column]) // SUB
            code = ((remaining[column] - lowest[block]) * inverse[block]).round_().clamp_(zero, top)
            codes[order[column]] = code.to(torch.uint8)
            error = remaining[column] - torch.addcmul(lowest[block], scale[block], code)
            error /= upper[column, column]
            remaining[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
            errors[column - first] = error
        remaining[stop:].addmm_(upper[first:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()
