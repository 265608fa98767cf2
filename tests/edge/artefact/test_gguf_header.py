"""The header reader: right values, and one clear error for any damage."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.artefact.find import Artefact
from edge.artefact.gguf_header import GGML_TYPES, GGUFArray, read_header
from edge.artefact.gguf_shards import read_whole
from edge.errors import InputError
from edge.loading.load_plan import estimate
from tests.support.tiny_gguf import gguf

TEMPLATE = "{% for m in messages %}你好 🍔 {{ m.content }}{% endfor %}"

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "贝壳",
    "general.file_type": 15,
    "llama.context_length": 2048,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["a", "好", "\udcff", ""],
    "tokenizer.ggml.token_type": [1, 1, 6, 3],
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}
TENSORS = [("token_embd.weight", (64, 4), 2, 0), ("output_norm.weight", (64,), 0, 160)]
WHOLE = gguf(METADATA, TENSORS, 416)


def put(folder: Path, data: bytes) -> Path:
    path = folder / "模型 x.gguf"
    path.write_bytes(data)
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    header = read_header(put(tmp_path, WHOLE))
    assert (header.version, header.alignment, header.file_size) == (3, 32, len(WHOLE))
    assert (header.architecture, header.name, header.file_type) == ("llama", "贝壳", "Q4_K_M")
    assert (header.context_length, header.block_count, header.embedding_length) == (2048, 2, 64)
    assert (header.head_count, header.head_count_kv, header.key_length, header.value_length) == (4, 2, 16, 16)
    assert header.chat_template == TEMPLATE
    assert header.vocab_size == 4
    assert header.metadata["llama.rope.freq_base"] == 10000.0
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    tokens, kinds = header.metadata["tokenizer.ggml.tokens"], header.metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, GGUFArray) and tokens.values() == METADATA["tokenizer.ggml.tokens"]
    assert isinstance(kinds, GGUFArray) and kinds.values() == [1, 1, 6, 3]
    embedding = header.tensors["token_embd.weight"]
    assert (embedding.type, embedding.shape, embedding.bytes) == ("Q4_0", (64, 4), 8 * 18)
    assert header.tensors["output_norm.weight"].offset == embedding.offset + 160
    assert header.weights_bytes == 144 + 256


def test_every_truncation_is_refused_by_name(tmp_path: Path) -> None:
    for length in range(0, len(WHOLE) - 1, 7):
        with pytest.raises(InputError, match=r"模型 x\.gguf"):
            read_header(put(tmp_path, WHOLE[: min(length, len(WHOLE) - 1)]))


def with_change(**changes: Any) -> bytes:
    return gguf(METADATA | {key.replace("__", "."): item for key, item in changes.items()}, TENSORS, 416)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\3\4" + WHOLE[4:], "magic"),
        (WHOLE[:4] + struct.pack("<I", 1) + WHOLE[8:], "version is 1"),
        (WHOLE[:4] + struct.pack(">I", 3) + WHOLE[8:], "byte order"),
        (WHOLE[:8] + struct.pack("<Q", 2**63) + WHOLE[16:], "number of tensors"),
        (WHOLE[:16] + struct.pack("<Q", 2**40) + WHOLE[24:], "number of metadata"),
        (with_change(general__alignment=24), "general.alignment"),
        (with_change(tokenizer__ggml__tokens=[1, 2]), "tokens is not a list of the right type"),
        (with_change(tokenizer__ggml__merges="a b"), "merges is not a list of the right type"),
        (with_change(tokenizer__ggml__precompiled_charsmap=["a"]), "charsmap is not a list"),
        (gguf(METADATA, [("t", (64, 4), 4, 0)], 416), "unknown type 4"),
        (gguf(METADATA, [("t", (63, 4), 2, 0)], 416), "rows of 63"),
        (gguf(METADATA, [("t", (2**40, 2**40), 0, 0)], 416), "overflows"),
        (gguf(METADATA, [("t", (1,) * 5, 0, 0)], 416), "5 dimensions"),
        (gguf(METADATA, [("t" * 64, (1,), 0, 0)], 416), "too long"),
        (gguf(METADATA, [("t", (8,), 0, 0), ("t", (8,), 0, 32)], 416), "duplicate"),
        (gguf(METADATA, [("t", (64, 4), 2, 32)], 416), "expected 0"),
        (gguf(METADATA, [("t", (64, 4), 2, 0)], 143), "truncated"),
    ],
)
def test_damage_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_header(put(tmp_path, data))


def test_fields_of_a_wrong_kind_are_named(tmp_path: Path) -> None:
    header = read_header(
        put(tmp_path, gguf({"general.architecture": "llama", "llama.block_count": "two"}, []))
    )
    with pytest.raises(InputError, match=r"llama\.context_length is missing"):
        _ = header.context_length
    with pytest.raises(InputError, match=r"llama\.block_count must be a whole number"):
        _ = header.block_count
    assert header.chat_template is None and header.file_type is None and header.name == "模型 x"


def test_head_counts_per_layer_give_the_largest(tmp_path: Path) -> None:
    header = read_header(put(tmp_path, gguf(METADATA | {"llama.attention.head_count_kv": [2, 8, 4]}, [])))
    assert header.head_count_kv == 8


@pytest.mark.parametrize("kind", [24, 28, 15])  # I8, F64, Q8_K
def test_a_matrix_that_nothing_is_multiplied_by_is_refused(tmp_path: Path, kind: int) -> None:
    _, size, block = GGML_TYPES[kind]
    tensors = [("blk.0.ffn_up.weight", (256, 4), kind, 0)]
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight is a matrix of type"):
        read_whole(put(tmp_path, gguf(METADATA | {"llama.block_count": 1}, tensors, 1024 * block // size)))


BYTES = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [f"<0x{i:02X}>" for i in range(256)]}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        *((f"llama.{name}", [0, "4", 2.0, True]) for name in ("context_length", "embedding_length")),
        ("llama.block_count", [0, 3, 1_000_000, 2**40]),
        *((f"llama.attention.{name}", [0, [0, 0]]) for name in ("head_count", "head_count_kv")),
        *((f"llama.attention.{name}", [0, -1.0]) for name in ("key_length", "value_length")),
        ("llama.attention.head_count_kv", [3, 8]),
        ("llama.expert_used_count", [1]),
        *(
            (f"llama.attention.{name}", [-1e-5, 0.0, float("nan"), float("inf"), 1])
            for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon")
        ),
        ("tokenizer.ggml.tokens", [["a", "b", "a"]]),
        ("tokenizer.ggml.model", ["none", "no_vocab"]),
    ],
)
def test_a_value_that_would_end_the_process_is_refused_by_name(
    tmp_path: Path, field: str, values: list[Any]
) -> None:
    right = {"llama.attention.layer_norm_rms_epsilon": 1e-5}
    read_whole(put(tmp_path, gguf(METADATA | right, TENSORS, 416)))
    for value in values:
        path = put(tmp_path, gguf(METADATA | right | {field: value}, TENSORS, 416))
        with pytest.raises(InputError) as caught:
            read_whole(path)
        assert f"模型 x.gguf: {field} " in caught.value.message


def test_a_sentencepiece_vocabulary_needs_a_token_for_each_byte(tmp_path: Path) -> None:
    read_whole(put(tmp_path, gguf(METADATA | BYTES, TENSORS, 416)))
    # A token that is the byte itself will do.
    written = [*BYTES["tokenizer.ggml.tokens"][1:], "\0"]
    read_whole(put(tmp_path, gguf(METADATA | BYTES | {"tokenizer.ggml.tokens": written}, TENSORS, 416)))
    lacking = METADATA | BYTES | {"tokenizer.ggml.tokens": BYTES["tokenizer.ggml.tokens"][:-1]}
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.tokens has no token <0xFF>"):
        read_whole(put(tmp_path, gguf(lacking, TENSORS, 416)))


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_header(tmp_path / "none.gguf")


def test_large_vocabularies_are_fast(tmp_path: Path) -> None:
    path = put(tmp_path, gguf(METADATA | {"tokenizer.ggml.merges": ["ab cd"] * 300_000}, []))
    start = time.process_time()
    assert len(read_header(path).metadata["tokenizer.ggml.merges"]) == 300_000  # type: ignore[arg-type]
    assert time.process_time() - start < 0.5


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(4, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_mutation_parses_or_is_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for position, byte in changes:
        data[position] = byte
    try:
        header = read_header(put(tmp_path, bytes(data)))
    except InputError:
        return
    assert all(tensor.offset + tensor.bytes <= len(data) for tensor in header.tensors.values())
    assert all(
        len(item.values()) == item.count for item in header.metadata.values() if isinstance(item, GGUFArray)
    )
    # What is not refused can be planned for.
    with contextlib.suppress(InputError):
        model = Artefact(header.path, "x", read_whole(header.path))
        assert estimate(model, kv_type="f16", slots=1).cells(2**30) >= 0
