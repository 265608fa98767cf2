"""The header of a GGUF file, read and checked in plain Python before native code sees the file.

    header = read_header(Path("model.gguf"))
    header.architecture, header.context_length, header.chat_template

Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The checks are those that llama.cpp makes, and
more: every count, length and tensor must lie within the file. Arrays (a tokenizer has several, as long as its
vocabulary) are skipped over and only decoded when their values are asked for.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from edge.errors import InputError

# ggml type number -> name, elements a block, bytes a block (ggml.h and its tables of block sizes).
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

# llama_ftype -> name (llama.h), for `general.file_type`.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# Lists whose type llama.cpp does not check: another type would end the process.
_TOKENS = "tokenizer.ggml.tokens"
_ARRAYS = {
    _TOKENS: (_STRING,),
    "tokenizer.ggml.merges": (_STRING,),
    "tokenizer.ggml.precompiled_charsmap": (0, 1),
    "tokenizer.ggml.suppress_tokens": (5,),
}
_EPSILONS = ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon")
# Types that llama.cpp has no matrix product for.
_NO_PRODUCT = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
_MAX_NAME = 64  # GGML_MAX_NAME, the terminating zero included
_MAX_DIMS = 4
_INT64_MAX = 2**63 - 1

Scalar = int | float | bool | str


@dataclass(frozen=True)
class GGUFArray:
    """An array that was skipped over: `count` items of GGUF type `item_type`, at `offset` in the file."""

    path: Path
    item_type: int
    count: int
    offset: int
    size: int

    def __len__(self) -> int:
        return self.count

    def values(self) -> list[Scalar]:
        """Decode the items. Strings that are not UTF-8 (byte-level tokens) keep their bytes as surrogates."""
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            data = handle.read(self.size)
        if self.item_type != _STRING:
            scalar = _SCALARS[self.item_type]
            return [row[0] for row in scalar.iter_unpack(data)]
        items: list[Scalar] = []
        position = 0
        for _ in range(self.count):
            (length,) = _U64.unpack_from(data, position)
            position += 8
            items.append(data[position : position + length].decode("utf-8", "surrogateescape"))
            position += length
        return items


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor. `shape` is in ggml's order (row length first); `offset` is from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file. Lengths are in tokens, layers, heads or elements; sizes in bytes.

    The properties raise InputError where the field is missing or of the wrong type.
    """

    path: Path
    version: int
    alignment: int
    file_size: int
    metadata: dict[str, Scalar | GGUFArray] = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)

    def _int(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, GGUFArray) and 0 < value.count <= 4096 and value.item_type in (4, 5, 10, 11):
            # One value a layer (Gemma 3n, OpenELM): the largest is what memory must be planned for.
            value = max(int(item) for item in value.values())
        if value is None:
            _fail(self.path, key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _fail(self.path, key, f"must be a whole number of at least {least}, it is {value!r}")
        return value

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            _fail(self.path, key, f"must be text, it is {value!r}")
        return value

    @property
    def architecture(self) -> str:
        value = self._text("general.architecture")
        if not value:
            _fail(self.path, "general.architecture", "is missing")
        return value

    @property
    def name(self) -> str:
        """`general.name`, or the file's own name without one."""
        return self._text("general.name") or self.path.stem

    @property
    def context_length(self) -> int:
        return self._int(f"{self.architecture}.context_length")

    @property
    def block_count(self) -> int:
        return self._int(f"{self.architecture}.block_count")

    @property
    def embedding_length(self) -> int:
        return self._int(f"{self.architecture}.embedding_length")

    @property
    def head_count(self) -> int:
        return self._int(f"{self.architecture}.attention.head_count")

    @property
    def head_count_kv(self) -> int:
        return self._int(f"{self.architecture}.attention.head_count_kv", self.head_count)

    @property
    def key_length(self) -> int:
        """Elements of one key head; embedding / heads unless the file says otherwise (as llama.cpp does)."""
        default = self.embedding_length // self.head_count
        return self._int(f"{self.architecture}.attention.key_length", default)

    @property
    def value_length(self) -> int:
        default = self.embedding_length // self.head_count
        return self._int(f"{self.architecture}.attention.value_length", default)

    @property
    def vocab_size(self) -> int:
        tokens = self.metadata.get(_TOKENS)
        if not isinstance(tokens, GGUFArray) or tokens.item_type != _STRING:
            _fail(self.path, _TOKENS, "is missing or not a list of strings")
        return len(tokens)

    @property
    def chat_template(self) -> str | None:
        return self._text("tokenizer.chat_template")

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def file_type(self) -> str | None:
        """What the file was quantised to, such as "Q4_K_M"; None where it does not say."""
        value = self.metadata.get("general.file_type")
        return FILE_TYPES.get(value & ~1024) if isinstance(value, int) else None  # 1024 marks a guess


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of `path`; tensor data is not read.

    Raises InputError that names the file and the field: not GGUF, another version or byte order, a count or
    length beyond the file, a duplicate, an unknown type, a shape that overflows, or a truncated file.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}", "check the path, or make it with `edge export gguf`")
    size = path.stat().st_size
    if size < 24:
        _fail(path, "magic", f"is missing: the file has {size} bytes")
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(path, data, size).header()


def check_model(header: GGUFHeader) -> None:
    """Raise InputError, naming the field, for a value over which llama.cpp would end the process.

    Some of them are only used when a request is computed: a negative epsilon, a byte without a token.
    """
    path, prefix = header.path, header.architecture
    layers, most = header.block_count, min(len(header.tensors), _MAX_LAYERS)
    if layers > most:
        _fail(path, f"{prefix}.block_count", f"is {layers}, with its tensors at most {most} are possible")
    # Each of them is checked as it is read.
    _ = (header.context_length, header.embedding_length, header.key_length, header.value_length)
    heads, heads_kv = header.head_count, header.head_count_kv
    if isinstance(header.metadata[f"{prefix}.attention.head_count"], int) and heads % heads_kv:
        _fail(path, f"{prefix}.attention.head_count_kv", f"is {heads_kv}, it must divide {heads} heads")
    experts, used = (header._int(f"{prefix}.expert_{n}", 0, least=0) for n in ("count", "used_count"))
    if experts > _MAX_EXPERTS or used > experts or (experts and not used):
        _fail(path, f"{prefix}.expert_used_count", f"is {used} of {experts} experts")
    for name in _EPSILONS:
        value = header.metadata.get(f"{prefix}.attention.{name}", 1.0)
        if not isinstance(value, float) or not 0 < value < math.inf:
            _fail(path, f"{prefix}.attention.{name}", f"must be a number above 0, it is {value!r}")
    for tensor in header.tensors.values():
        if len(tensor.shape) > 1 and tensor.type in _NO_PRODUCT:
            _fail(path, tensor.name, f"is a matrix of type {tensor.type}, which nothing is multiplied by")
    _check_vocabulary(header)


def _check_vocabulary(header: GGUFHeader) -> None:
    if (kind := header.metadata.get("tokenizer.ggml.model")) in ("none", "no_vocab"):
        _fail(header.path, "tokenizer.ggml.model", f"is {kind!r}: no text can be tokenized")
    if header.vocab_size < 1:
        _fail(header.path, _TOKENS, "is empty")
    array = header.metadata[_TOKENS]
    assert isinstance(array, GGUFArray)
    texts = array.values()
    tokens = set(texts)
    # llama.cpp gives empty ones names of their own.
    if len(tokens) - ("" in tokens) != len(texts) - texts.count(""):
        _fail(header.path, _TOKENS, "holds a token twice")
    if kind == "llama":  # SentencePiece
        for byte in range(256):
            name, itself = f"<0x{byte:02X}>", bytes([byte]).decode("utf-8", "surrogateescape")
            if name not in tokens and itself not in tokens:
                _fail(header.path, _TOKENS, f"has no token {name}: not every text could be tokenized")


def _fail(path: Path, name: str, problem: str) -> NoReturn:
    raise InputError(
        f"{path}: {name} {problem}", "the file is damaged or not a GGUF model: get or export it again"
    )


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.position = 0

    def need(self, count: int, what: str) -> int:
        """Claim `count` bytes for `what`; returns where they begin."""
        start = self.position
        if count > self.size - start:
            _fail(self.path, what, f"ends beyond the file ({count} bytes wanted at {start} of {self.size})")
        self.position = start + count
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.need(8, what))[0])

    def text(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        start = self.need(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            _fail(self.path, what, "is not UTF-8")

    def header(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            _fail(self.path, "magic", f"is {self.data[:4]!r}, not b'GGUF'")
        self.position = 4
        version = self.u32("version")
        if version not in (2, 3):
            swapped = version & 0xFFFF == 0
            _fail(
                self.path,
                "version",
                "has the other byte order" if swapped else f"is {version}, supported are 2 and 3",
            )
        tensor_count = self.count("the number of tensors", least=24)
        metadata_count = self.count("the number of metadata fields", least=13)

        metadata: dict[str, Scalar | GGUFArray] = {}
        for index in range(metadata_count):
            key = self.text(f"metadata key {index}")
            if not key or key in metadata:
                _fail(self.path, f"metadata key {index}", f"is a duplicate: {key!r}" if key else "is empty")
            metadata[key] = self.value(key)

        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            _fail(self.path, "general.alignment", f"must be a power of two, it is {alignment!r}")
        for key, kinds in _ARRAYS.items():
            item = metadata.get(key)
            if item is not None and not (isinstance(item, GGUFArray) and item.item_type in kinds):
                _fail(self.path, key, "is not a list of the right type")
        tensors = self.tensors(tensor_count, alignment)
        return GGUFHeader(self.path, version, alignment, self.size, metadata, tensors)

    def count(self, what: str, least: int) -> int:
        """A count of entries of at least `least` bytes each: more than the file could hold is refused."""
        count = self.u64(what)
        if count > (self.size - self.position) // least:
            _fail(self.path, what, f"is {count}, more than the file can hold")
        return count

    def value(self, key: str) -> Scalar | GGUFArray:
        kind = self.u32(f"the type of {key}")
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            _fail(self.path, key, f"has the unknown type {kind}")
        scalar = _SCALARS[kind]
        result: Scalar = scalar.unpack_from(self.data, self.need(scalar.size, key))[0]
        return result

    def array(self, key: str) -> GGUFArray:
        kind = self.u32(f"the item type of {key}")
        if kind != _STRING and kind not in _SCALARS:
            _fail(self.path, key, f"is an array of the unknown type {kind}")
        count = self.count(f"the length of {key}", least=8 if kind == _STRING else _SCALARS[kind].size)
        start = self.position
        if kind != _STRING:
            self.need(count * _SCALARS[kind].size, key)
            return GGUFArray(self.path, kind, count, start, self.position - start)
        # Up to a million strings: no call, and one check after the loop in place of one for each string.
        unpack: Callable[[mmap.mmap, int], tuple[int, ...]] = _U64.unpack_from
        data, position = self.data, start
        try:
            for _ in range(count):
                position += 8 + unpack(data, position)[0]
        except (struct.error, OverflowError):
            position = self.size + 1
        if position > self.size:
            _fail(self.path, key, "ends beyond the file")
        self.position = position
        return GGUFArray(self.path, kind, count, start, position - start)

    def tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        expected = 0
        for index in range(count):
            name = self.text(f"the name of tensor {index}")
            if len(name.encode("utf-8")) >= _MAX_NAME or name in tensors:
                problem = f"has a name that is too long or a duplicate: {name[:80]!r}"
                _fail(self.path, f"tensor {index}", problem)
            tensors[name] = self.tensor(name)
            if tensors[name].offset != expected:
                problem = f"has the offset {tensors[name].offset}, expected {expected}"
                _fail(self.path, f"tensor {name!r}", problem)
            expected += -(-tensors[name].bytes // alignment) * alignment
        base = -(-self.position // alignment) * alignment
        for name, tensor in tensors.items():
            tensors[name] = replace(tensor, offset=base + tensor.offset)
            end = base + tensor.offset + tensor.bytes
            if end > self.size:
                problem = f"ends at byte {end}, the file has {self.size}: it is truncated"
                _fail(self.path, f"tensor {name!r}", problem)
        return tensors

    def tensor(self, name: str) -> GGUFTensor:
        """What is said about one tensor; its offset is from the start of the data."""
        what = f"tensor {name!r}"
        dims = self.u32(f"the dimensions of {what}")
        if dims > _MAX_DIMS:
            _fail(self.path, what, f"has {dims} dimensions, at most {_MAX_DIMS} are possible")
        shape = tuple(self.u64(f"the shape of {what}") for _ in range(dims))
        kind = self.u32(f"the type of {what}")
        if kind not in GGML_TYPES:
            _fail(self.path, what, f"has the unknown type {kind}")
        type_name, block, block_bytes = GGML_TYPES[kind]
        if max(shape, default=0) > _INT64_MAX or math.prod(shape) > _INT64_MAX:
            _fail(self.path, what, f"has a shape that overflows: {shape}")
        row = shape[0] if shape else 1
        if row % block:
            _fail(self.path, what, f"has rows of {row} elements, {type_name} wants multiples of {block}")
        size = math.prod(shape) // block * block_bytes
        return GGUFTensor(name, shape, type_name, self.u64(f"the offset of {what}"), size)
