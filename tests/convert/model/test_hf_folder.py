"""A transformers folder before anything heavy sees it: safetensors headers, whole and damaged."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.model import chat_format
from convert.model.hf_folder import AdapterTypes, check_folder, check_safetensors
from edge.artefact import json_file
from edge.errors import InputError
from tests.support import toy

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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_stub(tmp_path_factory.mktemp("模型") / "toy")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model_type", [None, 3]),
        ("eos_token_id", ["x", [1, "x"], 1.5]),
        ("auto_map", [5, {"AutoConfig": 5}]),
        ("quantization_config", ["int4"]),
        ("text_config", [3, {"num_attention_heads": 0}]),
        ("architectures", ["LlamaForCausalLM"]),
        ("torch_dtype", [16]),
        *((f"num_{name}", [0, -1, "4", 2.0, True]) for name in ("attention_heads", "hidden_layers")),
        ("num_hidden_layers", [1_000_000]),
        *((name, [0, 2**40]) for name in ("hidden_size", "vocab_size", "max_position_embeddings")),
    ],
)
def test_a_wrong_value_of_config_json_is_named(
    toy_folder: Path, tmp_path: Path, key: str, values: list[Any]
) -> None:
    shutil.copytree(toy_folder, tmp_path, dirs_exist_ok=True)
    config = check_folder(tmp_path).config
    for value in values:
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
        with pytest.raises(InputError, match=rf"config\.json.*{key}"):
            check_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_json_too_deep_is_named(toy_folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(toy_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=name):
        chat_format.load(check_folder(tmp_path).path)


def test_end_tokens_that_are_no_ids_are_named(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id"):
        chat_format.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", None),
        ("lora_alpha", "x"),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", []),
        ("base_model_name_or_path", {}),
    ],
)
def test_a_wrong_value_of_adapter_config_json_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "adapter_config.json"
    right = {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}, "base_model_name_or_path": None}
    path.write_text(json.dumps(right), encoding="utf-8")
    assert json_file.read(path, types=AdapterTypes) == right
    path.write_text(json.dumps(right | {key: value}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"adapter_config\.json.*\$\.{key}"):
        json_file.read(path, types=AdapterTypes)


def test_a_chat_template_of_another_encoding_is_named(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_bytes("你".encode("gbk"))
    with pytest.raises(InputError, match=r"chat_template\.jinja is not UTF-8"):
        chat_format.load(tmp_path)


@pytest.mark.parametrize(
    ("readme", "source", "shown", "whole"),
    [
        ("---\nbase_model: Qwen/Qwen2.5-1.5B\n---\n", "", "x", "Qwen/Qwen2.5-1.5B"),
        ("---\ntags: [a]\nbase_model:\n- meta-llama/Llama-3.2-1B\n---\n", "", "x", "meta-llama/Llama-3.2-1B"),
        ("---\nbase_model: https://huggingface.co/org/m\nquantized_by: x\n---\n", "", "x/m-GPTQ", "org/m"),
        ("---\nbase_model: [org/m-bnb-4bit]\n---\n", "", "me/tuned-bnb-4bit", "org/m"),
        ("---\nbase_model: {\n---\n", "", "org/m-AWQ", "org/m"),
        ("", "", "unsloth/Qwen2.5-7B-unsloth-bnb-4bit", "unsloth/Qwen2.5-7B"),
        ("", "", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("---\nlicense: mit\n---\n", "org/source", "me/m-AWQ", "org/source"),
        ("", "/root/.cache/source", "me/m-AWQ", "me/m"),
        ("base_model: no/header", "", "models/some-awq-like", ""),
    ],
)
def test_a_quantised_base_tells_what_it_was_made_from(tmp_path, readme, source, shown, whole):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}
    config["_name_or_path"] = source
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    with pytest.raises(InputError, match=r"is quantised already \(bitsandbytes\)") as caught:
        check_folder(tmp_path, shown=shown)
    named = f", {whole} by its files" if whole else ""
    assert caught.value.hint.startswith(f"give the 16-bit model{named}: ")
