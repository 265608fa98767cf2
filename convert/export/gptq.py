"""GPTQ: a quantised GGUF's codes, chosen anew so that they make up for one another on the user's own rows.

llama.cpp rounds each weight to the nearest value of its block. Here column after column is rounded, and what
that changes in a layer's outputs is taken out of the columns that are still to come (Frantar et al. 2022,
https://arxiv.org/abs/2210.17323). A layer reads what the quantised layers before it give, and is fitted to
what the whole model gives in its place (Li et al. 2025, https://arxiv.org/abs/2504.02692). Types, sizes and
the values that a block can hold stay as llama.cpp wrote them: what reads its files reads these, as fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from convert.export import calibration
from convert.model.layerwise import Batch, LayeredModel
from edge.artefact import manifest
from edge.artefact.gguf_header import GGUFTensor, read_header
from edge.errors import InputError
from edge.machine import hardware

# Added to each column's mean square, which is 1 on average: a few thousand tokens say little about how a
# thousand columns go together. With 0.1 and 1 a 135M model in Q4_0 was 1.29 and 1.06 times as far off.
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
        return 15 if self.high is None else 31

    def put(self, codes: Bytes, data: Bytes) -> Bytes:
        """`data` (rows, bytes), with `codes` (rows, columns), 0 to top, in place of its own."""
        made = data.reshape(len(data), -1, self.size).copy()
        parts = codes.reshape(*made.shape[:2], -1, 2, SUB if self.block > SUB else SUB // 2)
        nibbles = parts[..., 0, :] & 15 | (parts[..., 1, :] & 15) << 4
        made[..., self.low : self.low + self.block // 2] = nibbles.reshape(*made.shape[:2], -1)
        if self.high is not None:
            fifth = codes.reshape(*made.shape[:2], -1, SUB) >> 4
            # Small blocks have them in turn, large ones a byte for each value of a sub-block.
            bits = np.packbits(fifth, axis=2 if self.block > SUB else 3, bitorder="little")
            made[..., self.high : self.high + self.block // 8] = bits.reshape(*made.shape[:2], -1)
        return made.reshape(data.shape)


LAYOUTS = {
    "Q4_0": Layout(32, 18, 2),
    "Q4_1": Layout(32, 20, 4),
    "Q5_0": Layout(32, 22, 6, 2),
    "Q5_1": Layout(32, 24, 8, 4),
    "Q4_K": Layout(256, 144, 16),
    "Q5_K": Layout(256, 176, 48, 16),
}


@dataclass(frozen=True)
class Done:
    """tensors: how many were chosen anew. tokens, source: what on, the latter in words."""

    tensors: int
    tokens: int
    source: str


def run(
    folder: Path,
    known: manifest.Manifest | None,
    whole: Path,
    file: Path,
    progress: Callable[[int, int], None],
) -> Done:
    """Choose the codes of `file` anew, in place.

    folder, known: the merged model. whole: its GGUF before it was quantised. progress: is told of each layer,
    and how many there are.
    Raises InputError where no data set is known, for an architecture that the names are not known of, or a
    model whose activations are no numbers.
    """
    rows, source = calibration.rows(folder, known)
    model = LayeredModel(folder)
    try:
        _check_memory(model, sum(map(len, rows)))
        with torch.inference_mode(), contextlib.closing(_Tensors(whole, file)) as tensors:
            batches = model.enter(rows)
            exact = rounded = [batch.states for batch in batches]
            for number, layer in enumerate(model.layers):
                progress(number, len(model.layers))
                with model.present(layer):
                    exact, rounded = _layer(model, number, batches, exact, rounded, tensors)
    finally:
        model.close()
    if not tensors.changed:
        raise InputError(f"{file.name} has no tensor whose codes can be chosen", "export without --gptq")
    return Done(tensors.changed, sum(map(len, rows)), source)


def _check_memory(model: LayeredModel, tokens: int) -> None:
    """Raise InputError unless the widest linear layer's inputs, and how they go together, fit into memory."""
    linear = (one for layer in model.layers for one in layer.modules() if isinstance(one, torch.nn.Linear))
    width = max((one.in_features for one in linear), default=0)
    need, free = 4 * width * (3 * width + 4 * tokens), hardware.memory().available
    if need > free:
        raise InputError(
            f"--gptq needs {need / 2**30:.1f} GiB for {width} columns, {free / 2**30:.1f} GiB are free",
            "close what else uses memory, or leave it out",
        )


class _Tensors:
    """The linear layers' weights in two GGUF files: as they were, and quantised."""

    def __init__(self, whole: Path, file: Path) -> None:
        header = read_header(file)
        self._name = calibration.tensor_names(header)
        self._tensors, self._sources = header.tensors, read_header(whole).tensors
        self._data = np.memmap(file, np.uint8, "r+")
        self._source = np.memmap(whole, np.uint8, "r")
        self.changed = 0

    def close(self) -> None:
        self._data.flush()
        del self._data, self._source

    def find(self, name: str, weight: torch.Tensor) -> _Tensor | None:
        """What transformers calls `name`; None for one that the file holds otherwise than row by row."""
        found = self._name(name)
        if found is None or found not in self._sources:
            return None
        tensor, source = self._tensors[found], self._sources[found]
        data, rows = _rows(self._data, tensor), _rows(self._source, source)
        kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        if source.type not in kinds or len(rows) != len(weight):
            return None
        # The converter changes the order of some architectures' rows: each is looked up by its bytes.
        where: dict[bytes, list[int]] = {}
        for at, row in enumerate(weight.to(kinds[source.type]).view(torch.uint8).numpy()):
            where.setdefault(row.tobytes(), []).append(at)
        order = [where[row.tobytes()].pop() if where.get(row.tobytes()) else -1 for row in rows]
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
        return _values(self._data, self._kind)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, lowest), each (rows, columns / SUB): a code stands for lowest + scale * code."""
        assert self.layout is not None
        shape = (len(self._data), self._data.shape[1] // self.layout.size * self.layout.block)
        low, next_ = (
            _values(self.layout.put(np.full(shape, code, np.uint8), self._data), self._kind)[:, ::SUB]
            for code in (0, 1)
        )
        return next_ - low, low

    def write(self, codes: torch.Tensor) -> None:
        assert self.layout is not None
        self._data = self.layout.put(codes.numpy(), self._data)
        self._file[:] = self._data[self._order]


def _values(data: Bytes, kind: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]).astype(np.float32, copy=False))


class _Reached(Exception):
    """A layer's states have come as far as they are needed: what is read there."""


def _layer(
    model: LayeredModel,
    number: int,
    batches: list[Batch],
    exact: list[torch.Tensor],
    rounded: list[torch.Tensor],
    tensors: _Tensors,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Quantise a layer that is present; what leaves it in the whole model, and in the quantised one."""
    # Linear layers called one after the other with the same input share what is computed from it. By name:
    # the group's first; by that: what they read of each batch.
    leaders: dict[str, str] = {}
    read: dict[str, list[torch.Tensor]] = {}
    last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def note(name: str, values: torch.Tensor) -> None:
        nonlocal last
        if name not in leaders:
            leaders[name] = leaders[last[0]] if torch.equal(values, last[1]) else name
        if leaders[name] == name:
            read.setdefault(name, []).append(values)
        last = name, values

    after = []
    with model.observed(note):
        for batch, states in zip(batches, exact, strict=True):
            after.append(model.through(number, batch, states))
    for leader, wanted in read.items():
        group = [name for name, first in leaders.items() if first == leader]
        modules = [model.linear(name) for name in group]
        found = [tensors.find(name, module.weight) for name, module in zip(group, modules, strict=True)]
        chosen = [
            (module.weight, one) for module, one in zip(modules, found, strict=True) if one and one.layout
        ]
        if chosen:
            inputs = torch.cat(list(_inputs(model, number, batches, rounded, leader)))
            _write(chosen, inputs, torch.cat(wanted))
            tensors.changed += len(chosen)
        for module, one in zip(modules, found, strict=True):
            if one:
                module.weight.copy_(one.values())
        wanted.clear()
    return after, [model.through(number, *each) for each in zip(batches, rounded, strict=True)]


def _inputs(
    model: LayeredModel, number: int, batches: list[Batch], states: list[torch.Tensor], wanted: str
) -> Iterator[torch.Tensor]:
    """What the linear layer `wanted` reads of each batch, as far as the layer is quantised by now."""

    def take(name: str, values: torch.Tensor) -> None:
        if name == wanted:
            raise _Reached(values)

    for batch, each in zip(batches, states, strict=True):
        try:
            with model.observed(take):
                model.through(number, batch, each)
        except _Reached as reached:
            yield reached.args[0]


def _write(chosen: list[tuple[torch.Tensor, _Tensor]], inputs: torch.Tensor, wanted: torch.Tensor) -> None:
    """Choose the codes of weights that are multiplied with the same, and put them into the file."""
    grids = [one.grid() for _, one in chosen]
    tops = [torch.full((len(weight),), one.layout.top) for weight, one in chosen if one.layout]
    codes = choose(
        torch.cat([weight for weight, _ in chosen]),
        torch.cat([scale for scale, _ in grids]),
        torch.cat([lowest for _, lowest in grids]),
        torch.cat(tops),
        inputs,
        wanted,
    )
    for (_, one), part in zip(chosen, codes.split([len(top) for top in tops]), strict=True):
        one.write(part)


def choose(
    weights: torch.Tensor,
    scale: torch.Tensor,
    lowest: torch.Tensor,
    top: torch.Tensor,
    inputs: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Codes (rows, columns), uint8: lowest + scale * code does to `inputs` what `weights` do to `wanted`.

    weights: (rows, columns). scale, lowest: (rows, columns / SUB). top: (rows,), the largest codes. inputs,
    wanted: (tokens, columns), what is read in the quantised model and in the whole one; each token counts
    alike. Raises InputError where they are no numbers.
    """
    columns, tokens = weights.shape[1], len(inputs)
    length = inputs.square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)
    x = inputs / length
    # The strongest first, while there are most columns left to make up for them.
    order = x.square().mean(0).argsort(descending=True)
    x = x[:, order]
    missed = ((wanted / length)[:, order] - x).T @ x / tokens
    square = x.T @ x / tokens
    if not (square.isfinite().all() and missed.isfinite().all()):
        raise InputError("the model's activations on its own rows are no numbers", "merge again: edge merge")
    square.diagonal().add_(DAMP)
    lower = torch.linalg.cholesky(square)
    del square
    # (columns, rows) from here on: a column of weights lies in one place.
    left = weights.T[order]
    left += torch.cholesky_solve(missed.T @ left, lower)
    del missed
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    del lower
    scale, lowest = scale.T.contiguous(), lowest.T.contiguous()
    by = torch.where(scale == 0, torch.ones_like(scale), scale).reciprocal()
    zero, top = torch.zeros_like(top, dtype=torch.float32), top.float()
    codes = torch.empty(left.shape, dtype=torch.uint8)
    for first in range(0, columns, STEP):
        stop = min(first + STEP, columns)
        errors = torch.empty(stop - first, left.shape[1])
        for at in range(first, stop):
            block = int(order[at]) // SUB
            code = ((left[at] - lowest[block]) * by[block]).round_().clamp_(zero, top)
            codes[order[at]] = code.to(torch.uint8)
            error = (left[at] - torch.addcmul(lowest[block], scale[block], code)) / upper[at, at]
            left[at + 1 : stop].addr_(upper[at, at + 1 : stop], error, alpha=-1)
            errors[at - first] = error
        left[stop:].addmm_(upper[first:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()
