"""The same YAML through LLaMA-Factory 0.9.5 and through here: losses, rates and weights, step by step."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.config import parse
from convert.data import prepare
from convert.model import chat_format
from convert.train import finetune
from convert.train.losses import LossHead
from tests.support import llamafactory_train
from tests.support.toy import END_OF_TEXT
from tests.support.training import plain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.skipif(
        not llamafactory_train.OWN.is_dir(),
        reason="LLaMA-Factory is not there: make .peers/llamafactory-train/installed",
    ),
]
WARMUP, RATE, MORE = 4, 5e-3, ", more"


@pytest.fixture(scope="module")
def keys(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A YAML as its users write it; 126 rows make 32 steps, the last of two rows."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "instruction": f"question {n} " * (1 + n % 3),
            "input": "",
            "output": f"回答 {n}{', more' * (n % 5)}.",
        }
        for n in range(126)
    ]
    (folder / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    texts = [{"text": f"第{n} line of text, {'more ' * (n % 4)}end."} for n in range(32)]
    (folder / "t.json").write_text(json.dumps(texts), encoding="utf-8")
    info = {"d": {"file_name": "d.json"}, "t": {"file_name": "t.json", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return {
        "model_name_or_path": str(base), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 16, "lora_target": "all", "dataset": "d", "dataset_dir": str(folder), "template": "qwen",
        "cutoff_len": 256, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "learning_rate": RATE, "num_train_epochs": 1.0, "lr_scheduler_type": "cosine", "warmup_steps": WARMUP,
        "logging_steps": 1, "save_strategy": "no", "disable_shuffling": True, "use_cpu": True,
        "disable_gradient_checkpointing": True, "report_to": "none",
    }  # fmt: skip


def theirs(keys: dict[str, Any], folder: Path, *, alike: bool) -> list[dict[str, Any]]:
    """What LLaMA-Factory logs of each step."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.llamafactory_train"],
        input=json.dumps({"keys": {**keys, "output_dir": str(folder)}, "alike": alike}),
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return history(folder)


def history(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [line for line in state["log_history"] if "loss" in line]


def of_each(name: str, lines: list[dict[str, Any]]) -> list[float]:
    return [line[name] for line in lines]


def ours(keys: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        # A processor with bfloat16 would compute in it here.
        patch.setattr(torch.cpu, "get_capabilities", lambda: {})
        finetune.run(parse({**keys, "output_dir": str(folder)}))
    return history(folder)


@pytest.fixture(scope="module")
def both(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Output folders of ours and theirs, their line end and their first rate taken out."""
    folder = tmp_path_factory.mktemp("both")
    theirs(keys, folder / "theirs", alike=True)
    ours(keys, folder / "ours")
    return folder / "ours", folder / "theirs"


def test_the_curve_is_the_same(both: tuple[Path, Path]) -> None:
    """32 losses, norms and rates, and the trained adapter."""
    here, there = map(history, both)
    assert len(here) == len(there) == 32
    assert of_each("loss", here) == pytest.approx(of_each("loss", there), rel=1e-5)
    assert of_each("grad_norm", here) == pytest.approx(of_each("grad_norm", there), rel=1e-3)
    assert of_each("lr", here) == pytest.approx(of_each("learning_rate", there), rel=1e-6)
    assert here[-1]["loss"] < 0.5 * here[0]["loss"]
    name = "adapter_model.safetensors"
    weights, trained = (load_file(folder / name) for folder in both)
    assert set(weights) == set(trained)
    for layer, weight in weights.items():
        torch.testing.assert_close(weight, trained[layer], rtol=0, atol=1e-3)


def test_the_curve_of_plain_text_is_the_same(keys: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Over a tokenizer whose padding is not its end token, which theirs would not learn then.

    Its trainer divides by all tokens of a step, with those that begin a row and that nothing predicts.
    """
    model = shutil.copytree(base, tmp_path / "model")
    words = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    words["pad_token"] = END_OF_TEXT
    (model / "tokenizer_config.json").write_text(json.dumps(words), encoding="utf-8")
    texts = {**keys, "stage": "pt", "dataset": "t", "template": "default", "packing": False}
    texts["model_name_or_path"] = str(model)
    here, there = ours(texts, tmp_path / "ours"), theirs(texts, tmp_path / "theirs", alike=True)
    assert len(here) == 8 and here[-1]["loss"] < 0.8 * here[0]["loss"]
    config = parse({**texts, "output_dir": str(tmp_path / "ours")})
    items = prepare.prepare(config, prepare.chat_of(config, model)).train
    sizes = [sum(item.size for item in items[first : first + 4]) for first in range(0, 32, 4)]
    wanted = [loss * size / (size - 4) for loss, size in zip(of_each("loss", there), sizes, strict=True)]
    assert of_each("loss", here) == pytest.approx(wanted, rel=1e-5)


def test_each_goes_on_from_the_others_output_dir(
    keys: dict[str, Any], both: tuple[Path, Path], tmp_path: Path
) -> None:
    for number, folder in enumerate(both):
        more = {**keys, "adapter_name_or_path": str(folder), "max_steps": 6}
        here = ours(more, tmp_path / f"ours {number}")
        there = theirs(more, tmp_path / f"theirs {number}", alike=True)
        assert of_each("loss", here) == pytest.approx(of_each("loss", there), rel=1e-5)
        assert here[0]["loss"] < 0.5 * history(folder)[0]["loss"]


def test_what_differs_is_the_line_end_and_the_first_rate(
    keys: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """As it is, theirs begins with a rate of 0, and has the loss of one token more in each row."""
    there = theirs(keys, tmp_path / "theirs", alike=False)
    assert of_each("learning_rate", there)[: WARMUP + 1] == pytest.approx(
        [RATE * step / WARMUP for step in range(WARMUP + 1)]
    )
    config = parse({**keys, "output_dir": str(tmp_path / "ours")})
    form = chat_format.load(base, template="qwen")
    (line_end,) = form.encode(["\n"])[0]
    head = LossHead(plain(base))
    # Neither the adapter as it begins nor one step at a rate of 0 changes the model.
    items = prepare.prepare(config, form).train
    for step, line in enumerate(there[:2]):
        rows = items[4 * step : 4 * step + 4]
        longer = [
            dataclasses.replace(
                row,
                ids=row.ids + type(row.ids)("i", [line_end]),
                spans=((row.spans[0][0], row.spans[0][1] + 1),),
            )
            for row in rows
        ]
        with torch.no_grad():
            as_theirs, as_ours = head(longer, "cpu")[0].mean(), head(rows, "cpu")[0].mean()
        assert line["loss"] == pytest.approx(float(as_theirs), rel=1e-5)
        assert line["loss"] != pytest.approx(float(as_ours), rel=1e-5)
