"""What LLaMA-Factory 0.9.5 publishes as examples of text on one machine, written anew, on a toy.

One test for each kind: `train_lora`, `train_qlora`, `train_full`, `merge_lora`, `inference`, as its folders
are called. Places and lengths are a toy's; the keys are those that its examples set.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge import cli
from edge.artefact import manifest
from edge.errors import UsageError
from tests.convert.conftest import converting
from tests.convert.test_config_schema import BOARD
from tests.support.runs import PAIRS, ROWS
from tests.support.toy import make_model

pytestmark = pytest.mark.slow

# What nearly every one of its training examples sets beside its method.
COMMON = {
    "trust_remote_code": True, "do_train": True, "cutoff_len": 2048, "max_samples": 1000,
    "preprocessing_num_workers": 16, "dataloader_num_workers": 4, "logging_steps": 10, "save_steps": 500,
    "plot_loss": True, "overwrite_output_dir": True, "save_only_model": False, "report_to": "none",
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
    "ddp_timeout": 180000000, "resume_from_checkpoint": None,
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
SFT = {"stage": "sft", "dataset": "identity,alpaca_en_demo", "template": "qwen"}
EXAMPLES: dict[str, dict[str, Any]] = {
    "lora_sft": {**SFT, **LORA},
    "lora_sft_ds3": {**SFT, **LORA, "deepspeed": "ds_z3_config.json", "gradient_accumulation_steps": 2},
    "lora_sft_ray": {**SFT, **LORA, "ray_num_workers": 4},
    "lora_dpo": {**LORA, "stage": "dpo", "dataset": "dpo_en_demo", "template": "qwen", "pref_beta": 0.1,
                 "pref_loss": "sigmoid", "learning_rate": 5.0e-6},
    "lora_kto": {**LORA, "stage": "kto", "dataset": "kto_en_demo", "template": "qwen", "pref_beta": 0.1,
                 "learning_rate": 5.0e-6},
    "preprocess": {**SFT, **LORA, "tokenized_path": "saves/dataset/sft"},
    "lora_pretrain": {**LORA, "stage": "pt", "dataset": "c4_demo"},
    "qlora_sft_8bit": {**SFT, **LORA, "quantization_bit": 8, "quantization_method": "bnb"},
    "qlora_sft_otfq": {**SFT, **LORA, "quantization_bit": 4, "quantization_method": "bnb"},
    "qlora_sft_bnb_npu": {**SFT, **LORA, "quantization_bit": 4, "quantization_method": "bnb",
                          "double_quantization": False},
    "full_sft": {**SFT, "finetuning_type": "full", "deepspeed": "ds_z3_config.json",
                 "gradient_accumulation_steps": 2, "learning_rate": 1.0e-5},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, its data and DeepSpeed's JSON, where the examples are run."""
    folder = tmp_path_factory.mktemp("examples")
    make_model(folder / "model")
    (folder / "data").mkdir()
    texts = [{"text": f"{row['instruction']} {row['output']}" * 3} for row in ROWS]
    marked = [{**row, "label": number % 2 == 0} for number, row in enumerate(ROWS)]
    for name, rows in (("rows", ROWS), ("pairs", PAIRS), ("texts", texts), ("marked", marked)):
        (folder / "data" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    info: dict[str, Any] = {name: {"file_name": "rows.json"} for name in ("identity", "alpaca_en_demo")}
    info["dpo_en_demo"] = {"file_name": "pairs.json", "ranking": True, "columns": {
        "prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}  # fmt: skip
    info["kto_en_demo"] = {"file_name": "marked.json", "columns": {"kto_tag": "label"}}
    info["c4_demo"] = {"file_name": "texts.json", "columns": {"prompt": "text"}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    auto = {"gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 3, "overlap_comm": False}}
    (folder / "ds_z3_config.json").write_text(json.dumps(auto), encoding="utf-8")
    return folder


def run(home: Path, verb: str, keys: dict[str, Any], *more: str) -> None:
    (home / "x.yaml").write_text(yaml.safe_dump({"model_name_or_path": "model", **keys}), encoding="utf-8")
    assert cli.main([verb, "x.yaml", *more]) == 0


def train(home: Path, name: str, *more: str) -> Path:
    run(
        home,
        "train",
        {**COMMON, **EXAMPLES[name], "output_dir": f"saves/{name}"},
        "use_cpu=true",
        "logging_steps=1",
        *more,
    )
    return Path("saves") / name


@pytest.mark.parametrize("name", EXAMPLES)
def test_train(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    folder = train(home, name, "max_steps=2")
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2 and (folder / "training_loss.svg").is_file()
    weights = "model.safetensors" if name == "full_sft" else "adapter_model.safetensors"
    assert (folder / weights).is_file()
    if name in ("lora_sft", "full_sft"):  # an adapter, and weights in the folder itself
        # overwrite_output_dir: the second run replaces the first.
        train(home, name, "max_steps=1")
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["global_step"] == 1


def test_merge_and_inference(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter and the full model, both named by output_dir, as its examples name them."""
    monkeypatch.chdir(home)
    train(home, "lora_sft", "max_steps=1")
    train(home, "full_sft", "max_steps=1")
    adapter = {"adapter_name_or_path": "saves/lora_sft", "template": "qwen", "trust_remote_code": True}
    full = {"model_name_or_path": "saves/full_sft", "template": "qwen", "trust_remote_code": True}
    export = {"export_size": 5, "export_device": "cpu", "export_legacy_format": False}
    for keys, target in ((adapter, "saves/merged"), (full, "saves/merged_full")):
        run(home, "export", {**keys, **export, "export_dir": target})
        assert manifest.read(Path(target)).stage == "merged" and (Path(target) / "Modelfile").is_file()
    asked: list[list[str]] = []
    exported: list[Path] = []
    monkeypatch.setattr("edge.chat_cli.main", lambda argv: asked.append(argv) or 0)
    monkeypatch.setattr("convert.export.gguf.run", lambda folder, **_: exported.append(folder))
    for keys in (adapter, full):
        run(home, "chat", {**keys, "infer_backend": "huggingface"})
    assert [words[0] for words in asked] == ["saves/lora_sft", "saves/full_sft"]
    assert exported == [Path("saves/lora_sft"), Path("saves/full_sft")]


def test_predict(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    train(home, "lora_sft", "max_steps=1")
    keys = {
        "adapter_name_or_path": "saves/lora_sft", "trust_remote_code": True, "stage": "sft",
        "do_predict": True, "finetuning_type": "lora", "eval_dataset": "identity,alpaca_en_demo",
        "template": "qwen", "cutoff_len": 2048, "max_samples": 2, "overwrite_cache": True,
        "preprocessing_num_workers": 16, "output_dir": "saves/predict", "overwrite_output_dir": True,
        "report_to": "none", "per_device_eval_batch_size": 1, "predict_with_generate": True,
        "ddp_timeout": 180000000,
    }  # fmt: skip
    run(home, "train", keys, "max_new_tokens=4", "use_cpu=true")
    text = (home / "saves" / "predict" / "generated_predictions.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"stage": "rm"}, "reward models and PPO are not trained here"),
        ({"export_quantization_bit": 4, "export_dir": "x"}, "edge export gguf RUN --gptq"),
        ({"use_galore": True}, "nearest: finetuning_type: lora"),
    ],
)
def test_what_is_refused_says_what_is_near(
    home: Path, keys: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(UsageError, match=words):
        run(home, "export" if "export_dir" in keys else "train", {**COMMON, **SFT, "output_dir": "o", **keys})


def test_what_llamaboard_saves(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its default configuration, not a letter changed, with the box create_new_adapter ticked."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "model", "models/smollm2-135m-instruct")
    shutil.copytree(home / "data", "data")
    info = json.dumps({"magic_conch": {"file_name": "rows.json"}})
    Path("data/dataset_info.json").write_text(info, encoding="utf-8")
    Path("llamaboard.yaml").write_text(BOARD.replace("some/model", "models/smollm2-135m-instruct"), "utf-8")
    run = yaml.safe_load(BOARD)["output_dir"]
    assert cli.main(["train", "llamaboard.yaml"]) == 0
    assert cli.main(["merge", run]) == 0
    with converting(tmp_path):
        assert cli.main(["export", "gguf", run]) == 0
    (file,) = Path(run, "gguf").glob("*.gguf")
    about = manifest.read(file.parent)
    assert [parent["stage"] for parent in about.parents[:2]] == ["merged", "adapter"]
    assert about.verify["logits"]["top1"] > 0.9
