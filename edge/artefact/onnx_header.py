"""The header of an ONNX file, read and checked before native code sees the file. Needs no onnx package.

The file is untrusted: every length must lie within what is really there, weights beside it must lie in its
own folder and be as long as their shapes say, and operators are only those that onnxruntime itself has.
Field numbers are those of onnx.proto3 (onnx/onnx).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from edge.errors import InputError

_AGAIN = "export it again: edge export onnx RUN --overwrite"
# Weights lie beside the graph; what is left of it is nodes and small constants.
MAX_GRAPH = 512 * 2**20
_MAX_DEPTH = 8
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_ATTENTION = "GroupQueryAttention"
# Wire type of protobuf -> bytes of a value.
_FIXED = {1: 8, 5: 4}
# Element type and dimensions (0 where they are open).
_Shape = tuple[int, list[int]]
# TensorProto.DataType -> (name, bits of an element).
_TYPES = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16),
    6: ("int32", 32), 7: ("int64", 64), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64),
    12: ("uint32", 32), 13: ("uint64", 64), 16: ("bfloat16", 16), 21: ("uint4", 4), 22: ("int4", 4),
}  # fmt: skip
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
# The input with the positions whose logits are wanted. It has a default, so other programs need not know it.
OUTPUT_POSITIONS = "output_positions"
# Outputs that a graph may have beside logits: the last layer's hidden states of every position, and the
# largest logits of each chosen position with their ids.
HIDDEN = "hidden_states"
CANDIDATES = ("candidate_values", "candidate_ids")


@dataclass(frozen=True, slots=True)
class OnnxHeader:
    """A decoder's shape. Lengths in elements, sizes in bytes.

    cache_type: of keys, values and logits: float32 or float16. selects: whether it can compute the logits of
    chosen positions only. candidates: how many of the largest logits it can output without the others, 0:
    none. hidden: width of the hidden states that it can output, 0: none. matrices: how many, by the bits of
    their weights.
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
    matrices: dict[int, int]
    files: tuple[str, ...]


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
    graph = _Graph(path)
    try:
        model = _Message(memoryview(path.read_bytes()))
        graphs = model.messages(7)
        for opset in model.messages(8):
            graph.check_domain(opset.text(1))
        if model.messages(25):
            raise InputError(f"{path} defines functions of its own, which are not run", _AGAIN)
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs")
        graph.read(graphs[0])
        return _header(path, size, graph)
    except (ValueError, IndexError, OverflowError) as error:
        raise InputError(f"{path} is damaged or no ONNX model: {error}", _AGAIN) from error


def _header(path: Path, size: int, graph: _Graph) -> OnnxHeader:
    kind, heads, width, layers = _cache(path, graph)
    needed = {"input_ids", "attention_mask", OUTPUT_POSITIONS}
    free = [
        name
        for name in graph.inputs
        if name not in graph.tensors and name not in needed and not _PAST.fullmatch(name)
    ]
    if free or not {"input_ids", "attention_mask"} <= set(graph.inputs):
        raise InputError(
            f"{path}: its inputs {', '.join(free) or 'lack input_ids'} are not supported", _AGAIN
        )
    _, logits = graph.outputs.get("logits", (0, []))
    if len(logits) != 3 or logits[2] < 1:
        raise ValueError("it has no logits of a known vocabulary")
    # Rotation tables of the attention: as many rows as positions.
    tables = {graph.tensors[name][0] for one in graph.attention for name in one[7:8] if name in graph.tensors}
    if len(tables) != 1:
        raise InputError(f"{path}: its attention does not rotate keys by position itself", _AGAIN)
    hidden_kind, hidden = graph.outputs.get(HIDDEN, (kind, [0, 0, 0]))
    if hidden_kind != kind or len(hidden) != 3:
        raise ValueError("its hidden states are of another type or shape than its cache")
    # Those that are not in blocks of bits are in the type that the graph computes in.
    matrices = {bits or _TYPES[kind][1]: count for bits, count in graph.matrices.items()}
    norms = [dims for name, dims in graph.tensors.items() if name.endswith("input_layernorm.weight") and dims]
    return OnnxHeader(
        path=path,
        block_count=layers,
        head_count_kv=heads,
        key_length=width,
        value_length=width,
        embedding_length=norms[0][0] if norms else max(graph.heads) * width,
        vocab_size=logits[2],
        context_length=tables.pop(),
        weights_bytes=size + sum(graph.external.values()),
        head_count=max(graph.heads),
        cache_type=_TYPES[kind][0],
        selects=OUTPUT_POSITIONS in graph.inputs,
        candidates=_candidates(graph, kind, logits[2]),
        hidden=hidden[2],
        matrices=dict(sorted(matrices.items())),
        files=tuple(sorted({path.name, *graph.external})),
    )


def _cache(path: Path, graph: _Graph) -> tuple[int, int, int, int]:
    """(element type, heads, width, layers) of the KV cache."""
    past = {name: shape for name, shape in graph.inputs.items() if _PAST.fullmatch(name)}
    if not past or not graph.attention:
        raise InputError(
            f"{path} has no {_ATTENTION} with a KV cache: it cannot hold several sequences at once", _AGAIN
        )
    layers = len(past) // 2
    if set(past) != {f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")}:
        raise ValueError("its caches are not numbered from 0, a key and a value each")
    shapes = {(kind, *dims[1:2], *dims[3:]) for kind, dims in past.values()}
    if len(shapes) != 1 or any(len(dims) != 4 for _, dims in past.values()):
        raise InputError(
            f"{path}: its caches differ in shape or type, which is not supported", "serve a GGUF"
        )
    kind, heads, width = next(iter(shapes))
    if kind not in (1, 10) or heads < 1 or width < 1:
        name = _TYPES.get(kind, ("?", 0))[0]
        raise InputError(f"{path}: its cache is of type {name}", "export fp32 or fp16")
    return kind, heads, width, layers


def _candidates(graph: _Graph, kind: int, vocab: int) -> int:
    if not set(CANDIDATES) <= set(graph.outputs):
        return 0
    (values, shape), (ids, ids_shape) = (graph.outputs[name] for name in CANDIDATES)
    if (values, ids) != (kind, 7) or shape != ids_shape or len(shape) != 3 or not 0 < shape[2] <= vocab:
        raise ValueError("its candidates are not values and ids of some of the vocabulary")
    return shape[2]


class _Graph:
    """What is read of a model's graph and of the graphs within it; everything in them is checked.

    tensors: dimensions by name. attention: inputs of each attention node; heads: of each. matrices: products
    by bits of their weights, 0 for those that are not in blocks. external: sizes of the files with weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inputs: dict[str, _Shape] = {}
        self.outputs: dict[str, _Shape] = {}
        self.tensors: dict[str, list[int]] = {}
        self.attention: list[list[str]] = []
        self.heads: list[int] = []
        self.matrices: Counter[int] = Counter()
        self.external: dict[str, int] = {}

    def read(self, graph: _Message, depth: int = 0) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("graphs within graphs, too deep")
        if graph.messages(15):
            raise ValueError("sparse weights")
        for node in graph.messages(1):
            self._node(node, depth)
        for tensor in graph.messages(5):
            self.tensors[tensor.text(8)] = self._tensor(tensor)
        if depth == 0:
            self.inputs = dict(map(_value_info, graph.messages(11)))
            self.outputs = dict(map(_value_info, graph.messages(12)))

    def check_domain(self, domain: str) -> None:
        if domain not in _DOMAINS:
            raise InputError(
                f"{self.path} wants operators of '{domain}', which come from a library of native code", _AGAIN
            )

    def _node(self, node: _Message, depth: int) -> None:
        kind = node.text(4)
        self.check_domain(node.text(7))
        numbers: dict[str, int] = {}
        for attribute in node.messages(5):
            numbers[attribute.text(1)] = attribute.number(3)
            for tensor in (*attribute.messages(5), *attribute.messages(10)):
                self._tensor(tensor)
            for graph in (*attribute.messages(6), *attribute.messages(11)):
                self.read(graph, depth + 1)
        if kind == _ATTENTION:
            self.attention.append(node.texts(1))
            self.heads.append(numbers.get("num_heads", 0))
        elif kind == "EPContext":
            raise InputError(f"{self.path} holds a program for one device, compiled elsewhere", _AGAIN)
        elif kind in ("MatMul", "MatMulNBits"):
            self.matrices[numbers.get("bits", 4) if kind == "MatMulNBits" else 0] += 1

    def _tensor(self, tensor: _Message) -> list[int]:
        """Its dimensions. Weights beside the model must lie in its folder, in a file that is long enough."""
        dims, name = tensor.numbers(1), tensor.text(8)
        entries = {entry.text(1): entry.text(2) for entry in tensor.messages(13)}
        if tensor.number(14) != 1 and not entries:
            return dims
        place = entries.get("location", "")
        parts = (PurePosixPath(place), PureWindowsPath(place))
        if not place or "\0" in place or any(len(p.parts) != 1 or p.anchor for p in parts) or place == "..":
            raise InputError(f"{self.path}: the weights {name} lie in {place!r}, outside its folder", _AGAIN)
        if place not in self.external:
            file = self.path.parent / place
            if not file.is_file() or file.resolve().parent != self.path.parent.resolve():
                raise InputError(f"{self.path}: its weights {place} are not a file in its folder", _AGAIN)
            self.external[place] = file.stat().st_size
        kind = tensor.number(2)
        if kind not in _TYPES:
            raise ValueError(f"{name} is of type {kind}")
        offset = int(entries.get("offset") or 0)
        need = -(-math.prod(dims) * _TYPES[kind][1] // 8)
        length = int(entries.get("length") or need)
        if length != need or not 0 <= offset <= self.external[place] - length:
            raise InputError(
                f"{self.path}: {name} should have {need:,} bytes at {offset:,} of {place}, "
                f"which has {self.external[place]:,}",
                "the file was cut off: " + _AGAIN,
            )
        return dims


def _value_info(value: _Message) -> tuple[str, _Shape]:
    tensor = value.message(2).message(1)
    return value.text(1), (tensor.number(1), [dim.number(1) for dim in tensor.message(2).messages(1)])


class _Message:
    """A protobuf message: its fields by number. Of a field that is not repeated the last value counts.

    Raises ValueError where a length reaches beyond what is there.
    """

    def __init__(self, data: memoryview) -> None:
        self._fields: dict[int, list[int | memoryview]] = {}
        at, end = 0, len(data)
        while at < end:
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            value: int | memoryview
            if wire == 0:
                value, at = _varint(data, at)
            elif wire == 2 or wire in _FIXED:
                length, at = _varint(data, at) if wire == 2 else (_FIXED[wire], at)
                if length > end - at:
                    raise ValueError(f"a field of {length} bytes where {end - at} are left")
                value = data[at : at + length]
                at += length
            else:
                raise ValueError(f"wire type {wire} at byte {at}")
            self._fields.setdefault(number, []).append(value)

    def _bytes(self, field: int) -> list[memoryview]:
        return [value for value in self._fields.get(field, ()) if isinstance(value, memoryview)]

    def messages(self, field: int) -> list[_Message]:
        return [_Message(value) for value in self._bytes(field)]

    def message(self, field: int) -> _Message:
        return _Message((self._bytes(field) or [memoryview(b"")])[-1])

    def texts(self, field: int) -> list[str]:
        return [bytes(value).decode("utf-8") for value in self._bytes(field)]

    def text(self, field: int) -> str:
        return (self.texts(field) or [""])[-1]

    def numbers(self, field: int) -> list[int]:
        """Whole numbers, one by one or packed."""
        numbers = []
        for value in self._fields.get(field, ()):
            if isinstance(value, int):
                numbers.append(value)
                continue
            at = 0
            while at < len(value):
                number, at = _varint(value, at)
                numbers.append(number)
        return numbers

    def number(self, field: int) -> int:
        return (self.numbers(field) or [0])[-1]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(a number of variable length, where the next field begins)."""
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
