"""Every family that people tune, from an adapter to a GGUF file in llama.cpp: the same model all the way."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from convert import merge
from convert.export import gguf, gguf_lora, llamacpp_tools
from convert.verify import compare
from edge.artefact import find, manifest
from edge.artefact.gguf_header import read_header
from edge.errors import InputError
from tests.support import tiny_llama
from tests.support.families import FAMILIES, as_transformers_4, make_adapter, make_family
from tests.support.matrix import few
from tests.support.toy import CHATML

# What is compared here by texts is compared whole in tests/convert/verify and in real exports.
pytestmark = pytest.mark.usefixtures("short_answers")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.slow
@pytest.mark.parametrize("family", few(FAMILIES, ("llama",)))
def test_adapter_merged_and_gguf_are_one_model(tmp_path: Path, toy_converter: None, family: str) -> None:
    base = make_family(tmp_path / "base", family)
    run = tmp_path / "run"
    make_adapter(run / "adapter", base)
    merged = merge.run(run, dtype="float32", console=quiet())
    found = manifest.read(merged).verify
    assert found["unequal"] == [] and found["logits"]["kl_mean"] < 1e-6 and found["logits"]["top1"] == 1.0
    path = gguf.run(run, quant="F32", console=quiet())
    found = manifest.read(run / "gguf").verify
    assert found["unequal"] == [] and found["token_ids"] == "equal"
    assert found["logits"]["kl_mean"] < 1e-4 and found["logits"]["top1"] > 0.98
    assert ("output.weight" in read_header(path).tensors) is not family.startswith("gemma")


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("family", few(["llama", "qwen2"], ["qwen2"]))
def test_a_folder_of_transformers_4(tmp_path: Path, toy_converter: None, family: str) -> None:
    """rope_theta at the top level, the template in tokenizer_config.json, several shards."""
    base = make_family(tmp_path / "base", family)
    run = tmp_path / "run"
    make_adapter(run / "adapter", base)
    as_transformers_4(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = 500.0  # none that anybody would guess
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert len(list(base.glob("*.safetensors"))) > 3
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (run / "adapter" / name).unlink()
    merged = merge.run(run, dtype="float32", console=quiet())
    found = manifest.read(merged).verify
    assert found["unequal"] == [] and found["logits"]["kl_mean"] < 1e-6 and found["logits"]["top1"] == 1.0
    assert (merged / "chat_template.jinja").read_text(encoding="utf-8") == CHATML
    for folder in (run, base):
        path = gguf.run(folder, quant="F32", console=quiet())
        found = manifest.read(path.parent).verify
        assert found["unequal"] == [] and found["logits"]["kl_mean"] < 1e-4
        header = read_header(path)
        assert header.chat_template == CHATML and header.metadata[f"{family}.rope.freq_base"] == 500.0


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize(("family", "more"), few([("llama", {"use_rslora": True}), ("qwen2", {})], ["llama"]))
def test_m8_an_adapter_on_top_of_a_base_in_gguf(
    tmp_path: Path, toy_converter: None, family: str, more: dict[str, bool]
) -> None:
    base = make_family(tmp_path / "base", family)
    run = tmp_path / "run"
    make_adapter(run / "adapter", base, **more)
    lora = gguf_lora.run(run)
    file = gguf.run(base, quant="F32", console=quiet())
    report = compare.run(run / "adapter", file, lora=lora, console=quiet())
    assert report.logits["kl_mean"] < 1e-3 and report.logits["top1"] > 0.97
    # Without it the base is another model.
    assert compare.run(run / "adapter", file, console=quiet()).logits["kl_mean"] > 0.02
    found = find.with_lora(find.resolve(base), run)
    assert found.lora == lora and found.name == "toy" and found.digest.count("sha256:") == 2
    other = tiny_llama.write(tmp_path / "other.gguf")
    with pytest.raises(InputError, match=r"is for|changes blk"):
        find.check_lora(lora, read_header(other))
    with pytest.raises(InputError, match="is no LoRA adapter"):
        find.check_lora(other)


TYPES = [one for one in llamacpp_tools.QUANTS if one not in llamacpp_tools.WHOLE and one != "MXFP4_MOE"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "quants",
    [
        pytest.param(("Q8_0", "Q6_K", "Q4_K_M", "Q2_K", "IQ2_XXS"), id="five"),
        pytest.param(TYPES, id="all", marks=pytest.mark.matrix),
    ],
)
def test_every_type_of_the_quantiser(tmp_path: Path, converted_toy: Path, quants: list[str]) -> None:
    [first] = converted_toy.glob(".gguf-first/*.gguf")
    header = read_header(first)
    import numpy as np
    from safetensors.numpy import save_file

    ones = {
        name: np.ones(one.shape[0], np.float32) for name, one in header.tensors.items() if len(one.shape) > 1
    }
    save_file(ones, tmp_path / "m.safetensors")

    def size(quant: str) -> int:
        path = tmp_path / f"{quant}.gguf"
        llamacpp_tools.quantize(
            first, path, quant, tmp_path / "m.safetensors" if quant in llamacpp_tools.NEED_MATRIX else None
        )
        made = read_header(path)
        assert made.file_type == quant and made.tensors.keys() == header.tensors.keys()
        return made.weights_bytes

    # Each is a process of its own; what takes time is their starting.
    with ThreadPoolExecutor(2) as pool:
        sizes = dict(zip(quants, pool.map(size, quants), strict=True))
    assert sizes["Q8_0"] > sizes["Q6_K"] > sizes["Q4_K_M"] > sizes["Q2_K"] > sizes["IQ2_XXS"]


def test_a_lora_file_with_fields_that_would_end_the_process(tmp_path: Path) -> None:
    from tests.support.tiny_gguf import gguf as write

    good = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    good["adapter.lora.alpha"] = 1.0
    tensors = [
        ("blk.0.attn_q.weight.lora_a", (64, 4), 0, 0),
        ("blk.0.attn_q.weight.lora_b", (4, 64), 0, 1024),
    ]
    path = tmp_path / "适.gguf"
    path.write_bytes(write(good, tensors, 2048))
    assert find.check_lora(path).architecture == "llama"
    for change, message in (
        ({"general.type": 3}, "is no LoRA adapter"),
        ({"adapter.type": [1]}, "is no LoRA adapter"),
        ({"adapter.lora.alpha": 1}, "is no number of the right type"),
    ):
        path.write_bytes(write(good | change, tensors, 2048))
        with pytest.raises(InputError, match=message):
            find.check_lora(path)
    for wrong, message in (
        (tensors[:1], "two halves"),
        ([("odd", (64,), 0, 0)], "is no half"),
        ([tensors[0], ("blk.0.attn_q.weight.lora_b", (8, 64), 0, 1024)], "two halves"),
        ([], "changes nothing"),
    ):
        path.write_bytes(write(good, wrong, 4096))
        with pytest.raises(InputError, match=message):
            find.check_lora(path)


# Merging what is more than low-rank updates


_ADAPTERS = [
    {"use_dora": True},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 2}},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        # That the tables are apart tells where one of them is trained.
        pytest.param(lora, tied, marks=[] if tied or "lm_head" in str(lora) else [pytest.mark.matrix])
        for lora in _ADAPTERS
        for tied in (True, False)
    ],
    ids=str,
)
def test_the_merged_model_is_what_peft_computes(tmp_path: Path, tied: bool, lora: dict[str, object]) -> None:
    base = make_family(tmp_path / "base", "llama", tied=tied)
    make_adapter(tmp_path / "run" / "adapter", base, **lora)
    merged = merge.run(tmp_path / "run", dtype="float32", console=quiet())
    found = manifest.read(merged).verify["logits"]
    assert (
        found["kl_mean"] < 1e-6 and found["top1"] == 1.0 and found["greedy_equal"] == found["greedy_tokens"]
    )
    # The adapter does something: this would notice a merge that leaves it out.
    assert manifest.read(merged).settings["drift"]["update"] > 0.001
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    touched = "embed_tokens" in str(lora) or "lm_head" in str(lora)
    assert config["tie_word_embeddings"] is (tied and not touched)


_TOKENS = {"trainable_token_indices": [384, 385]}
_BOTH, _ONE = {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "added", "lora"),
    [
        (True, 0, {"trainable_token_indices": [5, 300]}),
        (False, 0, {"trainable_token_indices": {"embed_tokens": [5, 300]}}),
        (True, 2, _TOKENS),
        (False, 2, _TOKENS),
        (True, 2, _BOTH),
        (False, 2, _BOTH),
        (True, 2, _ONE),
        (True, 2, _ONE | {"ensure_weight_tying": True}),
        (True, 2, {}),
        (False, 2, {}),
    ],
    ids=str,
)
def test_t14_added_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, added: int, lora: dict[str, object]
) -> None:
    """Tokens behind the base's, or trained by themselves: in the tables, the tokenizer and config.json."""
    from convert.model import reference

    base = make_family(tmp_path / "base", "llama", tied=tied)
    adapter = tmp_path / "run" / "adapter"
    make_adapter(adapter, base, added=added, **{"target_modules": ["q_proj"]} | lora)
    merged = merge.run(tmp_path / "run", dtype="float32", console=quiet())
    found = manifest.read(merged).verify
    assert found["unequal"] == [] and found["logits"]["kl_mean"] < 1e-6 and found["logits"]["top1"] == 1.0
    monkeypatch.setattr(reference, "WHOLE", 0)  # the reference a layer at a time
    report = compare.run(adapter, merged, console=quiet())
    if lora is _TOKENS:
        assert "in memory as a whole" in report.notes[-1]
    else:
        assert report.logits["kl_mean"] < 1e-6
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    tensors, plain = (load_file(folder / "model.safetensors") for folder in (merged, base))
    table, before = (one["model.embed_tokens.weight"] for one in (tensors, plain))
    assert table.shape == (384 + added, 256) and config["vocab_size"] == 384 + added
    # peft trains a copy of a table that is named alone; its twin then stays behind.
    apart = tied and lora.get("modules_to_save") == ["embed_tokens"] and "ensure_weight_tying" not in lora
    both = tied and len(str(lora.get("modules_to_save"))) > 20 and "lm_head" in str(lora)
    assert config["tie_word_embeddings"] is (tied and not apart and not both)
    if "trainable_token_indices" in lora and not added:
        changed = (table != before).any(1).nonzero().flatten().tolist()
        assert changed == [5, 300]
