"""Each way to train on a CUDA GPU: the losses of the processor in float32, and an adapter that merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from convert import merge
from convert.train import finetune
from edge.artefact import manifest
from tests.support.runs import configure

QUIET = Console(quiet=True)
WAYS: dict[str, dict[str, Any]] = {
    "4 bits": {"quantization_bit": 4},
    "8 bits": {"quantization_bit": 8},
    "8 bits, padding-free off": {"quantization_bit": 8, "flash_attn": "sdpa"},
    "pure_bf16": {"pure_bf16": True},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "full, pure_bf16": {"finetuning_type": "full", "pure_bf16": True, "learning_rate": 1e-3},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-3},
    "dpo": {"stage": "dpo", "dataset": "p"},
    "kto": {"stage": "kto", "dataset": "k"},
    "kto, 8 bits": {"stage": "kto", "dataset": "k", "quantization_bit": 8},
    "pt": {"stage": "pt", "dataset": "t", "cutoff_len": 64},
    "DoRA": {"use_dora": True},
    "LoRA+": {"loraplus_lr_ratio": 4.0},
}


def losses(folder: Path, base: Path, **changes: Any) -> list[float]:
    """The loss of each of six steps, of a run in `folder`."""
    folder.mkdir()
    made = configure(
        folder, base, max_steps=6, save_strategy="no", disable_shuffling=True, learning_rate=2e-3
    )
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    info |= {"t": {"file_name": "t.txt"}, "k": {"file_name": "k.json", "columns": {"kto_tag": "label"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "t.txt").write_text(
        "\n".join(f"第{n} line of text, more, end." for n in range(30)), encoding="utf-8"
    )
    marked = [
        {"instruction": f"question {n}", "output": f"{'good' if n % 2 else 'bad'} {n}", "label": bool(n % 2)}
        for n in range(12)
    ]
    (folder / "k.json").write_text(json.dumps(marked), encoding="utf-8")
    finetune.run(made(**changes), console=QUIET)
    lines = (folder / "run" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in line]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_trains_as_the_processor_does(tmp_path: Path, base: Path, way: str) -> None:
    changes = WAYS[way]
    gpu = losses(tmp_path / "gpu", base, use_cpu=False, **changes)
    processor = losses(tmp_path / "processor", base, use_cpu=True, **changes)
    # What is loaded next is quantised on the default stream.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert len(gpu) == 6
    assert gpu == pytest.approx(processor, rel=0.03)
    if changes.get("finetuning_type", "lora") == "lora":
        proof = manifest.read(merge.run(tmp_path / "gpu" / "run", console=QUIET)).verify
        assert proof["logits"]["kl_mean"] < 1e-2
