"""LLaMA-Factory's YAML for export and inference: what is written, and what is handed to chat and serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from convert import yaml_verbs
from convert.model import lora_adapter
from convert.train import finetune
from edge import cli
from edge.artefact import manifest
from edge.errors import ExistsError, UsageError
from tests.support.runs import configure
from tests.support.tiny_gguf import ONE_TENSOR, gguf, shape
from tests.support.toy import make_model

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, run) of a 16-bit LoRA."""
    folder = tmp_path_factory.mktemp("verbs")
    base = make_model(folder / "model")
    config = configure(folder, base, max_steps=2, save_strategy="no")("saves/lora/sft")
    with pytest.MonkeyPatch.context() as patch:
        # In float32 on every machine.
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
        finetune.run(config, console=Console(quiet=True))
    return base, Path(config.output_dir)


@pytest.fixture
def write(tmp_path: Path, trained: tuple[Path, Path]) -> Any:
    """Writes a YAML with the keys of LLaMA-Factory's examples; its path."""

    def write(**changes: Any) -> str:
        keys = {
            "model_name_or_path": str(trained[0]),
            "adapter_name_or_path": str(trained[1]),
            "trust_remote_code": True,
            "export_dir": str(tmp_path / "out" / "merged"),
            "export_size": 5,
            "export_device": "cpu",
            "export_legacy_format": False,
            **changes,
        }
        path = tmp_path / "theirs.yaml"
        path.write_text(yaml.safe_dump({key: one for key, one in keys.items() if one is not None}))
        return str(path)

    return write


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["export", "merge"])
def test_an_adapter_is_merged_where_export_dir_says(
    verb: str, write: Any, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    base, run = trained
    assert cli.main([verb, write(), "infer_dtype=float32"]) == 0
    target = tmp_path / "out" / "merged"
    update = lora_adapter.read_adapter(run / "adapter").updates[NAME].delta()
    before, after = (load_file(folder / "model.safetensors")[NAME] for folder in (base, target))
    assert ((after - before) - update).abs().max() < 1e-6 < update.abs().max()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (target / name).is_file()
    modelfile = (target / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith("FROM .\n") and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert not (run / "merged").exists()
    with pytest.raises(ExistsError, match="--overwrite"):
        cli.main([verb, write()])
    assert cli.main([verb, write(), "--overwrite"]) == 0
    assert manifest.read(target).settings["dtype"] == "float16"


@pytest.mark.slow
def test_several_adapters_are_added_one_after_the_other(
    write: Any, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    base, run = trained
    assert cli.main(["export", write(adapter_name_or_path=f"{run}, {run}"), "infer_dtype=float32"]) == 0
    update = lora_adapter.read_adapter(run / "adapter").updates[NAME].delta()
    before, after = (
        load_file(folder / "model.safetensors")[NAME] for folder in (base, tmp_path / "out" / "merged")
    )
    assert ((after - before) - 2 * update).abs().max() < 1e-6


@pytest.mark.slow
def test_a_model_without_an_adapter_is_rewritten(write: Any, tmp_path: Path) -> None:
    assert cli.main(["export", write(adapter_name_or_path=None)]) == 0
    config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float16"


@pytest.mark.slow
def test_chat_and_serve_make_what_is_missing(
    write: Any, trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call merges and exports, the second finds what the first made."""
    _, run = trained
    asked: list[list[str]] = []
    exported: list[Path] = []

    def convert(folder: Path, **_: Any) -> None:
        exported.append(folder)
        (folder / "gguf").mkdir()
        (folder / "gguf" / "x.gguf").write_bytes(gguf(shape("llama"), ONE_TENSOR, 16))

    monkeypatch.setattr("convert.export.gguf.run", convert)
    monkeypatch.setattr("edge.chat_cli.main", lambda argv: asked.append(argv) or 0)
    monkeypatch.setattr("edge.server.cli.main", lambda argv: asked.append(argv) or 0)
    inference = {"export_dir": None, "infer_backend": "huggingface"}
    assert cli.main(["chat", write(**inference), "--help"]) == 0
    assert asked.pop() == ["--help"] and not exported
    assert cli.main(["chat", write(**inference), "temperature=0.5", "--ctx", "64"]) == 0
    merged = (run / "merged" / "edge.json").stat().st_mtime_ns
    assert cli.main(["serve", write(**inference), "--port", "0"]) == 0
    assert (run / "merged" / "edge.json").stat().st_mtime_ns == merged and exported == [run]
    chat, serve = asked
    assert chat[0] == serve[0] == str(run) and chat[-2:] == ["--ctx", "64"]
    # LLaMA-Factory's defaults, but for what is given.
    options = dict(zip(chat[1::2], chat[2::2], strict=True))
    assert (options["--temperature"], options["--top-p"], options["--top-k"]) == ("0.5", "0.7", "50")
    assert serve[1:] == ["--port", "0"]


@pytest.mark.slow
def test_what_is_refused_before_anything_is_loaded(write: Any) -> None:
    with pytest.raises(UsageError, match="export_dir is missing"):
        cli.main(["export", write(export_dir=None)])
    with pytest.raises(UsageError, match=r"(?s)2 adapters.*edge export"):
        cli.main(["chat", write(adapter_name_or_path="a,b")])
    with pytest.raises(UsageError, match=r"export_quantization_bit: 4 .*--gptq"):
        cli.main(["export", write(export_quantization_bit=4)])
    with pytest.raises(UsageError, match="edge serve"):
        cli.main(["api", write()])


def test_yaml_is_told_from_runs_and_options() -> None:
    assert yaml_verbs.find_yaml(["--x", "a/b.yml"]) == "a/b.yml" and yaml_verbs.find_yaml(["run"]) is None


@pytest.mark.slow
def test_a_template_that_the_model_was_not_tuned_with_is_ignored_and_said(
    write: Any, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", write(template="alpaca")]) == 0
    assert "template: alpaca is not what the model was tuned with, and is ignored" in capsys.readouterr().out
    own = manifest.read(trained[1] / "adapter").chat_template
    assert manifest.read(tmp_path / "out" / "merged").chat_template == own
