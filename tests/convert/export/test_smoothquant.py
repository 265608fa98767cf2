"""Smoothed activations: the same model, its columns scaled; and families that are left as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from convert.export import onnx, smoothquant
from convert.model.reference import TorchModel
from edge.artefact import manifest
from edge.errors import InputError
from tests.support.families import make_family, make_run
from tests.support.matrix import few

# Each makes a model of its own.
pytestmark = pytest.mark.slow

IDS = list(range(5, 60))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto").float()
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([IDS])).logits[0]
    return found


def uneven(folder: Path, reader: str) -> float:
    """The strongest column of what enters `reader`, by the median of all columns."""
    model = TorchModel(folder)
    seen: list[torch.Tensor] = []
    module = model.linear(reader)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].abs().amax(0)))
    list(model.logits([IDS], [1]))
    handle.remove()
    return float(seen[0].max() / seen[0].median())


@pytest.mark.parametrize("family", few(["llama", "qwen2", "qwen3", "phi3"], ["llama", "phi3"]))
def test_a_model_stays_the_same_and_its_activations_are_evener(tmp_path: Path, family: str) -> None:
    merged = make_run(tmp_path, family) / "merged"
    # A column that is far stronger than others, as trained models have them.
    weights = load_file(merged / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    weights[name][7] *= 60
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    layers, rows = smoothquant.run(merged, manifest.read(merged), tmp_path / "均匀 even")
    assert layers == 2 and "rows" in rows
    wanted, found = logits(merged), logits(tmp_path / "均匀 even")
    assert (found - wanted).norm() / wanted.norm() < 1e-4
    reader = "model.layers.1.self_attn." + ("qkv_proj" if family == "phi3" else "q_proj")
    assert uneven(merged, reader) > 20
    assert uneven(tmp_path / "均匀 even", reader) < 8
    # Nothing lacks, and what was not changed is what it was, bit by bit.
    index = json.loads((tmp_path / "均匀 even" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(weights)
    table = "model.embed_tokens.weight"
    file = load_file(tmp_path / "均匀 even" / index["weight_map"][table])
    assert torch.equal(file[table], weights[table]) and file[table].dtype == torch.float16


@pytest.mark.parametrize("family", few(["gemma2", "phi"], ["gemma2"]))
def test_layers_that_are_built_otherwise_are_left_as_they_are(tmp_path: Path, family: str) -> None:
    merged = make_run(tmp_path, family) / "merged"
    with pytest.raises(InputError, match="no layer whose activations"):
        smoothquant.run(merged, manifest.read(merged), tmp_path / "even")


def test_an_export_in_8_bits_is_smoothed_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    run = make_run(tmp_path, "llama")
    onnx.run(run, precision="int8", console=Console(quiet=True))
    made = manifest.read(run / "onnx")
    assert "smoothed in 2 layers on" in made.settings["activations"]
    assert made.settings["activations"].endswith("in blocks of 64")
    assert not [path for path in (run / "onnx").iterdir() if path.is_dir()]
    assert made.verify["logits"]["kl_mean"] < 0.005


@pytest.mark.matrix
def test_smoothed_8_bits_are_as_close_as_plain_ones(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    run = make_run(tmp_path, "llama")
    onnx.run(run, precision="int8", console=Console(quiet=True))
    smoothed = manifest.read(run / "onnx").verify["logits"]["kl_mean"]
    # Where the rows cannot be found any more.
    (tmp_path / "d.json").unlink()
    onnx.run(run, precision="int8", console=Console(quiet=True), overwrite=True)
    made = manifest.read(run / "onnx")
    assert (
        "as they are, in blocks of 32: measuring needs rows of the data set" in made.settings["activations"]
    )
    assert smoothed < 2 * made.verify["logits"]["kl_mean"]


def test_without_a_data_set_nothing_is_written(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    with pytest.raises(InputError, match="rows of the data set"):
        smoothquant.run(base, None, tmp_path / "even")
    assert not (tmp_path / "even").exists()
