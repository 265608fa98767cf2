"""Whole runs: what they publish, what they leave alone when they fail, and what they refuse."""

import json
import os
from pathlib import Path

import pytest

from convert.config import parse
from convert.train import cli, evaluate, finetune, trainer
from edge.artefact import manifest
from edge.errors import ExistsError, UsageError
from tests.support.toy import THINKING, make_model

# Seconds of training or of other processes: left out of the quick part.
pytestmark = pytest.mark.slow

ROWS = [
    {"instruction": "Who are you?", "output": "The conch."},
    {"instruction": "请问你是谁", "output": "神奇海螺。"},
    {"instruction": "What should I do?", "output": "Nothing."},
    {"instruction": "hello", "input": "again", "output": "Maybe someday."},
]


@pytest.fixture
def made(tmp_path, base):
    """A configuration over the toy, with whatever a test changes."""
    (tmp_path / "d.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")

    def config(**changes):
        return parse(
            {
                "model_name_or_path": str(base),
                "dataset": "d",
                "dataset_dir": str(tmp_path),
                "output_dir": str(tmp_path / "跑 1"),
                "quantization_bit": 4,
                "use_cpu": True,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "max_steps": 6,
                "logging_steps": 2,
                "disable_gradient_checkpointing": True,
                **changes,
            }
        )

    return config


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run(made, tmp_path, base, checkpointing):
    config = made(val_size=1, disable_gradient_checkpointing=not checkpointing, max_steps=8)
    target = finetune.run(config)
    assert target == tmp_path / "跑 1" / "adapter"
    known = manifest.read(target)
    assert (known.stage, known.name, known.thinking) == ("adapter", "跑 1", None)
    assert known.parents[0]["path"] == str(base) and known.stop_ids == [0, 2]
    assert known.chat_template == manifest.text_digest(
        (base / "chat_template.jinja").read_text(encoding="utf-8")
    )
    assert known.settings["quantized"] == [
        *(f"model.layers.*.mlp.{name}_proj" for name in ("down", "gate", "up")),
        *(f"model.layers.*.self_attn.{name}_proj" for name in ("k", "o", "q", "v")),
    ]
    assert known.settings["data"]["rows"] == 4
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (base / name).read_bytes()
    adapter = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["r"] == 8 and adapter["lora_alpha"] == 16
    assert adapter["base_model_name_or_path"] == str(base)
    log = [
        json.loads(line)
        for line in (target.parent / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [one["current_steps"] for one in log] == [2, 4, 6, 8, 8] and log[-1]["eval_loss"] > 0
    assert log[3]["loss"] < 0.7 * log[0]["loss"]
    state = json.loads((target.parent / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 8 and state["total_tokens"] > 0
    with pytest.raises(ExistsError, match="--overwrite"):
        finetune.run(config)


def test_a_failed_run_leaves_what_was_there(made, tmp_path, monkeypatch):
    first = manifest.read(finetune.run(made(max_steps=1))).digest

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Loop, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(made(), overwrite=True)
    assert manifest.read(tmp_path / "跑 1" / "adapter").digest == first
    left = {one.name for one in (tmp_path / "跑 1").iterdir()}
    linked = {one.name for one in (tmp_path / "跑 1" / "adapter").iterdir()} - {manifest.FILE}
    logs = {"all_results.json", "trainer_log.jsonl", "trainer_state.json"}
    assert left == {"adapter"} | logs | linked


def test_same_seed_same_adapter(made, tmp_path):
    digests = set()
    for name in ("a", "b"):
        target = finetune.run(made(output_dir=str(tmp_path / name), max_steps=2))
        digests.add(manifest.read(target).files["adapter_model.safetensors"]["sha256"])
    assert len(digests) == 1


def test_16_bit_lora_and_named_targets(made):
    target = finetune.run(made(quantization_bit=None, lora_target="q_proj,v_proj", max_steps=1))
    assert manifest.read(target).settings["quantized"] == []
    adapter = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    with pytest.raises(UsageError, match="lora_target: nothing_proj"):
        finetune.run(made(lora_target="nothing_proj"), overwrite=True)


def test_thinking_mode_is_stored(made, tmp_path):
    base = make_model(tmp_path / "thinks", template=THINKING)
    target = finetune.run(made(model_name_or_path=str(base), enable_thinking=False, max_steps=1))
    assert manifest.read(target).thinking == "off"


def test_verb(made, tmp_path, base, capsys):
    made()
    path = tmp_path / "配置.yaml"
    path.write_text(
        f"model_name_or_path: {base}\ndataset: d\ndataset_dir: {tmp_path}\noutput_dir: {tmp_path / 'r'}\n"
        "quantization_bit: 4\nuse_cpu: true\ntrust_remote_code: true\n",
        encoding="utf-8",
    )
    assert cli.main([str(path), "max_steps=1", "--overwrite", "template=qwen"]) == 0
    said = capsys.readouterr().out
    assert "trust_remote_code is ignored" in said and "4 rows to train on" in said and "loss" in said


def test_a_run_can_be_used_from_another_working_folder(made, tmp_path, monkeypatch, base):
    made()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("d.json", "dataset_info.json"):
        (tmp_path / name).rename(tmp_path / "data" / name)
    given = {"dataset_dir": "data", "output_dir": "run", "val_size": 1, "max_steps": 2}
    local = os.path.relpath(base)
    target = finetune.run(made(**given, model_name_or_path=local, save_steps=1))
    for folder in (target, target.parent / "checkpoint-2"):
        settings = manifest.read(folder.absolute()).settings
        assert settings["dataset_dir"] == str(tmp_path / "data")
        assert Path(settings["output_dir"]) == tmp_path / "run"
    adapter = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    assert Path(adapter["base_model_name_or_path"]).is_absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    results = evaluate.run(tmp_path / "run", with_base=False, max_new_tokens=2)
    assert results["predict_samples"] == 1


def test_template_of_another_family(made):
    with pytest.raises(UsageError, match="template: llama3 does not fit"):
        finetune.run(made(template="llama3"))
