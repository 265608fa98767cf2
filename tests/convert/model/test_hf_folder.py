"""A transformers folder before anything heavy sees it: safetensors headers, whole and damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.model.hf_folder import check_folder, check_safetensors
from edge.errors import InputError

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
    "好": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [16, 16]},
}


def file(header: Any, data: int = 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\1" * data


def put(folder: Path, data: bytes) -> Path:
    path = folder / "模型.safetensors"
    path.write_bytes(data)
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return HEADER | {name: HEADER[name] | fields}


def test_a_whole_header(tmp_path: Path) -> None:
    check_safetensors(put(tmp_path, file(HEADER)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or no safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "damaged or no safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (file(b"[1]"), "damaged header"),
        (file(b'{"a": 1, "a": 2}'), "a name stands twice"),
        (file(b"[" * 200_000), "damaged header"),
        (file(b"\xff\xfe{}"), "damaged header"),
        (file(changed("a.weight", dtype="F17")), "'a.weight' has the unknown type 'F17'"),
        (file(changed("a.weight", shape=[2, -3])), "has the shape"),
        (file(changed("a.weight", shape=[2, 3.0])), "has the shape"),
        (file(changed("a.weight", shape=[True, 6])), "has the shape"),
        (file(changed("a.weight", shape=[2**62, 2**62])), "has the bytes [0, 12]"),
        (file(changed("a.weight", data_offsets=[0, 14])), "has the bytes"),
        (file(changed("a.weight", data_offsets=[4, 16])), "begins at 4, 0 was expected"),
        (file(changed("好", data_offsets=[8, 12])), "begins at 8, 12 was expected"),
        (file(changed("好", data_offsets=[12])), "has the bytes"),
        (file(HEADER, 15), "it was cut off"),
        (file(HEADER, 17), "its header says"),
    ],
)
def test_damage_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_safetensors(put(tmp_path, data))
    assert message in caught.value.message + caught.value.hint and "模型.safetensors" in caught.value.message


WHOLE = file(HEADER)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 17), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_mutation_loads_or_is_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    from safetensors import SafetensorError, safe_open

    data = bytearray(WHOLE)
    for position, byte in changes:
        data[position] = byte
    path = put(tmp_path, bytes(data))
    try:
        check_safetensors(path)
    except InputError:
        return
    try:
        with safe_open(path, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                handle.get_slice(name).get_shape()
    except SafetensorError as error:
        # What it reads more strictly (metadata of other types, surrogates) is an error there, no crash.
        assert str(error)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = tmp_path / "a 'b"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match="pickle") as caught:
        check_folder(folder)
    assert "save_pretrained" in caught.value.hint and "AutoModelForCausalLM" in caught.value.hint
