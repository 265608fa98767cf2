"""The JSON Schema of a training configuration says what parse() does: the same values, the same keys."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from convert.config import as_yaml, parse
from convert.config_keys import FIELDS
from convert.config_schema import schema
from convert.config_unused import UNUSED
from convert.train import cli
from edge.errors import UsageError
from tests.convert.test_config import DPO, NEEDED, QLORA

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
CHINESE = re.compile("[\u4e00-\u9fff]")
VALIDATOR = Draft202012Validator(schema())
# What LLaMA-Factory's web page saves: its keys and values.
BOARD = """\
bf16: true
cutoff_len: 2048
dataset: magic_conch
dataset_dir: data
ddp_timeout: 180000000
do_train: true
enable_thinking: true
finetuning_type: lora
flash_attn: auto
gradient_accumulation_steps: 8
include_num_input_tokens_seen: true
learning_rate: 5.0e-05
logging_steps: 5
lora_alpha: 16
lora_dropout: 0
lora_rank: 8
lora_target: all
lr_scheduler_type: cosine
max_grad_norm: 1.0
max_samples: 100000
model_name_or_path: some/model
num_train_epochs: 3.0
optim: adamw_torch
output_dir: saves/model/lora/train_2026-11-28-19-30-00
packing: false
per_device_train_batch_size: 2
plot_loss: true
preprocessing_num_workers: 16
report_to: none
save_steps: 100
seed: 42
stage: sft
trust_remote_code: true
warmup_steps: 0
create_new_adapter: true
"""


def wrong_keys(given: dict[str, Any]) -> set[str]:
    """The keys that the schema refuses; "" stands for the whole."""
    return {str(error.path[0]) if error.path else "" for error in VALIDATOR.iter_errors(given)}


def refused(given: dict[str, Any]) -> str:
    """The key that parse() refuses, "" for none; values that exclude each other are no key's fault."""
    try:
        parse(given)
    except UsageError as error:
        key = re.match(r"(\w+)(: .* (is not|must be|is known|would|is neither)| is missing)", error.message)
        return key[1] if key else ""
    return ""


def test_it_is_a_schema_and_has_every_key() -> None:
    Draft202012Validator.check_schema(schema())
    properties = schema()["properties"]
    assert set(properties) == set(FIELDS) | set(UNUSED) and not set(FIELDS) & set(UNUSED)
    assert {key for key, one in properties.items() if not one["x-llamafactory"]} == {
        "loftq_init", "eval_answers", "ignore_memory", "parse_control_tokens", "strict",
    }  # fmt: skip


def test_every_key_speaks_both_languages() -> None:
    for name, one in schema()["properties"].items():
        assert one["description"] and not CHINESE.search(one["description"]), name
        assert CHINESE.search(one["x-description-zh"]), name
        assert one["x-status"] in ("honoured", "no-effect", "refused")
        if one["x-status"] == "honoured":
            assert one["x-group"] and CHINESE.search(one["x-group-zh"]), name
        else:
            assert one["x-reason"] and CHINESE.search(one["x-reason-zh"]), name


def test_defaults_are_valid_and_are_parses() -> None:
    config = parse(NEEDED)
    for name, one in schema()["properties"].items():
        if "default" in one:
            assert not wrong_keys({**NEEDED, name: one["default"]}), name
            assert getattr(parse({**NEEDED, name: one["default"]}), name) == getattr(config, name)


@pytest.mark.parametrize("text", [QLORA, DPO, BOARD, *(path.read_text("utf-8") for path in EXAMPLES)])
def test_what_parse_accepts_is_valid(text: str) -> None:
    given = yaml.safe_load(text)
    assert not wrong_keys(given)
    printed = yaml.safe_load(as_yaml(parse(given)))
    assert not wrong_keys(printed)


def test_a_key_that_is_refused_is_refused_by_both() -> None:
    given = {**yaml.safe_load(BOARD), "use_galore": True}
    assert wrong_keys(given) == {"use_galore"} == {refused(given)}


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate: 1e-4", "learning_rate: '1e-4'", "learning_rate: .0001", "lora_rank: '16'",
        "lora_rank: 16.0", "lora_rank: 1e1", "save_strategy: no", "lora_alpha: none", "lora_alpha: null",
        "max_steps: '-1'", "dataset: [a, b]", "dataset: a, b", "interleave_probs: 0.5, .5",
        "interleave_probs: [0.5, '5e-1']", "report_to: []", "report_to: none, tensorboard",
        "resume_from_checkpoint: true", "resume_from_checkpoint: runs/a/checkpoint-5", "output_dir: 12",
        "quantization_bit: '4'", "enable_thinking: null", "fsdp: none", "val_size: 10",
    ],
)  # fmt: skip
def test_what_yaml_makes_of_values_is_valid_too(line: str) -> None:
    given = {**NEEDED, **yaml.safe_load(line)}
    assert not wrong_keys(given) and not refused(given)


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate: 0", "learning_rate: -1e-4", "learning_rate: '-1e-4'", "learning_rate: fast",
        "learning_rate: true", "lora_rank: 0", "lora_rank: 1.5", "lora_rank: [8]", "cutoff_len: 7",
        "warmup_ratio: 1.5", "lora_dropout: 1", "bf16: 'yes'", "bf16: 1", "stage: ppo",
        "quantization_bit: 3", "save_strategy: true", "report_to: neptune", "report_to: [none, neptune]",
        "dataset: []", "dataset: 5", "dataset: [1]", "output_dir: ''", "output_dir: null", "max_steps: -2",
        "interleave_probs: 0.5;0.5", "interleave_probs: [0, 1]", "enable_thinking: none", "seed: '-1'",
        "hub_token: x", "adapter_folder: x", "quantization_type: fp4", "flash_attn: fa4",
        "learning_rate: 10%",
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_both(line: str) -> None:
    given = {**NEEDED, **yaml.safe_load(line)}
    (key,) = yaml.safe_load(line)
    assert wrong_keys(given) == {key}
    with pytest.raises(UsageError, match=key):
        parse(given)


def test_missing_and_unknown_keys_are_refused_by_both() -> None:
    for given in ({"dataset": "d", "output_dir": "o"}, {**NEEDED, "lora_rnak": 8}):
        assert wrong_keys(given) == {""}
        with pytest.raises(UsageError):
            parse(given)


POOL = [
    None, True, False, 0, 1, -1, 4, 8, 1.5, 0.5, 1e9, "", " ", "none", "None", "no", "steps", "4", "1e-4",
    "1.", "-3", "0.5,0.5", "all", "all, x", [], ["a"], [1], [0.5], {}, "lora", "auto",
]  # fmt: skip


@pytest.mark.parametrize("name", [*FIELDS, *UNUSED])
def test_nothing_that_parse_takes_is_invalid(name: str) -> None:
    """Every key with values of every kind. What is valid and refused clashes with another key, or is a
    number written as text beyond a bound, which no pattern tells."""
    numeric = name in FIELDS and FIELDS[name].kind in ("int", "float")
    for value in POOL:
        given = {**NEEDED, name: value}
        valid = not wrong_keys(given)
        try:
            parse(given)
        except UsageError as error:
            clash = re.search(r"needs|cannot|belongs|nothing|both|starts|neither|takes all", error.message)
            text = numeric and isinstance(value, str) and "must be" in error.message
            assert not valid or clash or text, (value, str(error))
        else:
            assert valid, value


def test_the_verb_prints_it_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--json-schema"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema()))


@pytest.mark.slow
def test_neither_the_schema_nor_help_imports_torch() -> None:
    code = (
        "import sys\nfrom edge.cli import main\n"
        "try: main(['train', sys.argv[1]])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'rich', 'numpy')))"
    )
    for option in ("--json-schema", "--help"):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, timeout=60)
        assert done.returncode == 0, (option, done.stderr.decode())
