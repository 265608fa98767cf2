"""What an ONNX file says of itself, read and checked before native code sees it. No onnx package is needed.

The file is untrusted: every length is bounded by what is really there, weights beside it must lie in its own
folder and be as long as their shapes say, and operators are only those that onnxruntime brings itself.
Field numbers are those of onnx.proto3 (onnx/onnx).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from edge.errors import InputError

_AGAIN = "export it again: edge export onnx RUN --overwrite"
# Weights lie beside the graph; what is left of it is nodes and small constants.
MAX_GRAPH = 512 * 2**20
_MAX_DEPTH = 8
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_ATTENTION = "GroupQueryAttention"
# TensorProto.DataType -> (name, bits of an element).
_TYPES = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16),
    6: ("int32", 32), 7: ("int64", 64), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64),
    12: ("uint32", 32), 13: ("uint64", 64), 16: ("bfloat16", 16), 21: ("uint4", 4), 22: ("int4", 4),
}  # fmt: skip
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
# The input that names the positions whose logits are wanted; it has a default, so others need not know it.
OUTPUT_POSITIONS = "output_positions"
# Outputs that a graph may have beside logits: the last layer's states of every position, and the largest
# logits of each chosen position with their ids.
HIDDEN = "hidden_states"
CANDIDATES = ("candidate_values", "candidate_ids")


@dataclass(frozen=True, slots=True)
class OnnxHeader:
    """A decoder's shape. Lengths in elements, sizes in bytes.

    cache_type: of keys, values and logits: float32 or float16. selects: whether logits can be had for chosen
    positions alone. candidates: how many of the largest logits can be had without the others, 0: none.
    hidden: length of the states that can be had, 0: none. matrices: by the bits of their weights, how many.
    """

    path: Path
    block_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    embedding_length: int
    vocab_size: int
    context_length: int
    weights_bytes: int
    head_count: int
    cache_type: str
    selects: bool
    candidates: int
    hidden: int
    inputs: tuple[str, ...]
    matrices: dict[int, int]
    files: tuple[str, ...]


@dataclass
class _Tensor:
    name: str = ""
    dims: list[int] = field(default_factory=list)
    kind: int = 0


@dataclass
class _Graph:
    inputs: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    tensors: dict[str, _Tensor] = field(default_factory=dict)
    attention: list[list[str]] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    matrices: dict[int, int] = field(default_factory=dict)
    external: dict[str, int] = field(default_factory=dict)


def read_onnx(path: Path) -> OnnxHeader:
    """Read and check the ONNX file at `path` and the weights beside it.

    Raises InputError that names the file and what is wrong with it.
    """
    size = path.stat().st_size
    if not 0 < size <= MAX_GRAPH:
        raise InputError(
            f"{path} has {size:,} bytes; a graph with its weights beside it has fewer than {MAX_GRAPH:,}",
            _AGAIN,
        )
    graph = _Graph()
    try:
        found = 0
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == 7 and isinstance(value, memoryview):
                found += 1
                _read_graph(path, value, graph, 0)
            elif number == 8 and isinstance(value, memoryview):
                _check_domain(path, _text(_one(value, 1)))
            elif number == 25:
                raise InputError(f"{path} defines functions of its own, which are not run", _AGAIN)
        if found != 1:
            raise ValueError(f"{found} graphs")
        return _header(path, size, graph)
    except (ValueError, IndexError, OverflowError) as error:
        raise InputError(f"{path} is damaged or no ONNX model: {error}", _AGAIN) from error


def _header(path: Path, size: int, graph: _Graph) -> OnnxHeader:
    past = {name: shape for name, shape in graph.inputs.items() if _PAST.fullmatch(name)}
    if not past or not graph.attention:
        raise InputError(
            f"{path} has no {_ATTENTION} with a KV cache: it cannot hold several sequences at once", _AGAIN
        )
    layers = len(past) // 2
    if set(past) != {f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")}:
        raise ValueError("its caches are not numbered from 0, a key and a value each")
    shapes = {(kind, *shape[1:2], *shape[3:]) for kind, shape in past.values()}
    if len(shapes) != 1 or any(len(shape) != 4 for _, shape in past.values()):
        raise InputError(
            f"{path}: its caches differ in shape or type, which is not supported", "serve a GGUF"
        )
    kind, heads, width = next(iter(shapes))
    if kind not in (1, 10) or heads < 1 or width < 1:
        raise InputError(
            f"{path}: its cache is of type {_TYPES.get(kind, ('?', 0))[0]}", "export fp32 or fp16"
        )
    needed = {"input_ids", "attention_mask", *past, OUTPUT_POSITIONS}
    free = [name for name in graph.inputs if name not in graph.tensors and name not in needed]
    if free or not {"input_ids", "attention_mask"} <= set(graph.inputs):
        raise InputError(
            f"{path}: its inputs {', '.join(free) or 'lack input_ids'} are not known here", _AGAIN
        )
    logits = graph.outputs.get("logits")
    if logits is None or len(logits[1]) != 3 or logits[1][2] < 1:
        raise ValueError("it has no logits of a known vocabulary")
    # Rotation tables of the attention: as many rows as positions.
    tables = {
        graph.tensors[name].dims[0] for one in graph.attention for name in one[7:8] if name in graph.tensors
    }
    if len(tables) != 1:
        raise InputError(f"{path}: its attention does not turn keys by position itself", _AGAIN)
    # Those that are not in blocks of bits are in the type that the graph computes in.
    matrices = {bits or _TYPES[kind][1]: count for bits, count in graph.matrices.items()}
    norm = next((one for one in graph.tensors.values() if one.name.endswith("input_layernorm.weight")), None)
    return OnnxHeader(
        path=path,
        block_count=layers,
        head_count_kv=heads,
        key_length=width,
        value_length=width,
        embedding_length=norm.dims[0] if norm and norm.dims else max(graph.heads) * width,
        vocab_size=logits[1][2],
        context_length=tables.pop(),
        weights_bytes=size + sum(graph.external.values()),
        head_count=max(graph.heads),
        cache_type=_TYPES[kind][0],
        selects=OUTPUT_POSITIONS in graph.inputs,
        candidates=_candidates(graph, kind, logits[1][2]),
        hidden=_hidden(graph, kind),
        inputs=tuple(graph.inputs),
        matrices=dict(sorted(matrices.items())),
        files=tuple(sorted({path.name, *graph.external})),
    )


def _candidates(graph: _Graph, kind: int, vocab: int) -> int:
    found = [graph.outputs.get(name) for name in CANDIDATES]
    if None in found:
        return 0
    (values, shape), (ids, same) = (one for one in found if one is not None)
    if (values, ids) != (kind, 7) or shape != same or len(shape) != 3 or not 0 < shape[2] <= vocab:
        raise ValueError("its candidates are not values and ids of some of the vocabulary")
    return shape[2]


def _hidden(graph: _Graph, kind: int) -> int:
    found, shape = graph.outputs.get(HIDDEN, (kind, [0, 0, 0]))
    if found != kind or len(shape) != 3:
        raise ValueError("its hidden states are of another type or shape than its cache")
    return shape[2]


# -- protobuf ------------------------------------------------------------------------------------------


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: varints and fixed numbers as int, the rest as bytes.

    Raises ValueError where a length reaches beyond what is there.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        length = 8 if wire == 1 else 4
        if wire == 2:
            length, at = _varint(data, at)
        elif wire not in (1, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        if length > end - at:
            raise ValueError(f"a field of {length} bytes where {end - at} are left")
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number without an end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7


def _one(data: memoryview, wanted: int) -> memoryview:
    """The last field `wanted` of a message, empty where it is not given."""
    found = memoryview(b"")
    for number, value in _fields(data):
        if number == wanted and isinstance(value, memoryview):
            found = value
    return found


def _text(data: memoryview) -> str:
    return bytes(data).decode("utf-8")


def _read_graph(path: Path, data: memoryview, graph: _Graph, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs within graphs, too deep")
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            _read_node(path, value, graph, depth)
        elif number == 5:
            tensor = _read_tensor(path, value, graph)
            graph.tensors[tensor.name] = tensor
        elif number == 11 and depth == 0:
            name, shape = _value_info(value)
            graph.inputs[name] = shape
        elif number == 12 and depth == 0:
            name, shape = _value_info(value)
            graph.outputs[name] = shape
        elif number == 15:
            raise ValueError("sparse weights")


def _read_node(path: Path, data: memoryview, graph: _Graph, depth: int) -> None:
    inputs: list[str] = []
    kind = domain = ""
    numbers: dict[str, int] = {}
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            inputs.append(_text(value))
        elif number == 4:
            kind = _text(value)
        elif number == 7:
            domain = _text(value)
        elif number == 5:
            name, number_in_it = _read_attribute(path, value, graph, depth)
            numbers[name] = number_in_it
    _check_domain(path, domain)
    if kind == _ATTENTION:
        graph.attention.append(inputs)
        graph.heads.append(numbers.get("num_heads", 0))
    elif kind == "EPContext":
        raise InputError(f"{path} holds a program for one device, compiled elsewhere", _AGAIN)
    elif kind == "MatMulNBits":
        bits = numbers.get("bits", 4)
        graph.matrices[bits] = graph.matrices.get(bits, 0) + 1
    elif kind == "MatMul":
        graph.matrices[0] = graph.matrices.get(0, 0) + 1


def _read_attribute(path: Path, data: memoryview, graph: _Graph, depth: int) -> tuple[str, int]:
    """(name, whole number, or 0 where it holds something else); tensors and graphs in it are checked."""
    name, integer = "", 0
    for number, value in _fields(data):
        if number == 3 and isinstance(value, int):
            integer = value
        elif isinstance(value, memoryview):
            if number == 1:
                name = _text(value)
            elif number in (5, 10):
                _read_tensor(path, value, graph)
            elif number in (6, 11):
                _read_graph(path, value, graph, depth + 1)
    return name, integer


def _read_tensor(path: Path, data: memoryview, graph: _Graph) -> _Tensor:
    tensor = _Tensor()
    entries: dict[str, str] = {}
    external = False
    for number, value in _fields(data):
        if number == 1:
            tensor.dims += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            tensor.kind = value
        elif number == 8 and isinstance(value, memoryview):
            tensor.name = _text(value)
        elif number == 13 and isinstance(value, memoryview):
            entries[_text(_one(value, 1))] = _text(_one(value, 2))
        elif number == 14:
            external = value == 1
    if external or entries:
        _check_external(path, tensor, entries, graph)
    return tensor


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _check_external(path: Path, tensor: _Tensor, entries: dict[str, str], graph: _Graph) -> None:
    """Weights beside the file: in its own folder, within their file, as long as their shape says."""
    place = entries.get("location", "")
    parts = (PurePosixPath(place), PureWindowsPath(place))
    if not place or "\0" in place or any(len(one.parts) != 1 or one.anchor for one in parts) or place == "..":
        raise InputError(f"{path}: the weights {tensor.name} lie in {place!r}, outside its folder", _AGAIN)
    if place not in graph.external:
        file = path.parent / place
        if not file.is_file() or file.resolve().parent != path.parent.resolve():
            raise InputError(f"{path}: its weights {place} are not a file in its folder", _AGAIN)
        graph.external[place] = file.stat().st_size
    if tensor.kind not in _TYPES:
        raise ValueError(f"{tensor.name} is of type {tensor.kind}")
    offset = int(entries.get("offset") or 0)
    need = -(-math.prod(tensor.dims) * _TYPES[tensor.kind][1] // 8)
    length = int(entries.get("length") or need)
    if length != need or not 0 <= offset <= graph.external[place] - length:
        raise InputError(
            f"{path}: {tensor.name} should have {need:,} bytes at {offset:,} of {place}, "
            f"which has {graph.external[place]:,}",
            "the file was cut off: " + _AGAIN,
        )


def _value_info(data: memoryview) -> tuple[str, tuple[int, list[int]]]:
    """(name, (element type, dimensions, 0 where they are open))."""
    tensor = _one(_one(data, 2), 1)
    kind, dims = 0, []
    for number, value in _fields(tensor):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number == 2 and isinstance(value, memoryview):
            for inner, dim in _fields(value):
                if inner == 1 and isinstance(dim, memoryview):
                    dims.append(next((v for n, v in _fields(dim) if n == 1 and isinstance(v, int)), 0))
    return _text(_one(data, 1)), (kind, dims)


def _check_domain(path: Path, domain: str) -> None:
    if domain not in _DOMAINS:
        raise InputError(
            f"{path} wants operators of '{domain}', which come from a library of native code", _AGAIN
        )
