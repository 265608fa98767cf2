"""Configuration: what LLaMA-Factory's users bring loads unchanged, everything else is a clear error."""

import dataclasses
import os
from pathlib import Path

import pytest

from convert.config import FIELDS, TrainConfig, as_yaml, load_train_config, parse, recorded
from edge.errors import InputError, UsageError

NEEDED = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}

# LLaMA-Factory's example of QLoRA, word for word in its keys and values.
QLORA = """\
### model
model_name_or_path: deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
quantization_bit: 4  # choices: [8 (bnb/hqq/eetq), 4 (bnb/hqq), 3 (hqq), 2 (hqq)]
quantization_method: bnb  # choices: [bnb, hqq, eetq]
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: deepseekr1
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
# eval_dataset: alpaca_en_demo
"""


def write(folder: Path, text: str, *, bom: bool = False, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    return path


def test_example_of_llamafactory_loads_unchanged(tmp_path):
    config = load_train_config(write(tmp_path, QLORA), [])
    assert config.dataset == ("identity", "alpaca_en_demo")
    assert (config.quantization_bit, config.lora_rank, config.alpha) == (4, 8, 16)
    assert config.learning_rate == 1e-4 and config.warmup_ratio == 0.1 and config.bf16
    assert config.lora_target == ("all",) and config.template == "deepseekr1"
    said = " ".join(config.warnings)
    assert "trust_remote_code is ignored" in said and config.overwrite_output_dir
    assert (config.save_steps, config.plot_loss, config.report_to) == (500, True, ("none",))
    assert config.resume_from_checkpoint is None


def test_defaults():
    config = parse(NEEDED)
    assert config.cutoff_len == 2048 and config.enable_thinking is True and config.quantization_bit is None
    assert (config.learning_rate, config.num_train_epochs, config.lr_scheduler_type) == (5e-5, 3.0, "linear")
    assert config.dataset_dir == "data" and config.val_size == 0 and config.warnings == ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ('"1e-4"', 1e-4),
        (".0001", 1e-4),
        ("1", 1.0),
    ],
)
def test_t7_numbers(tmp_path, text, value):
    base = "model_name_or_path: m\ndataset: d\noutput_dir: o\n"
    config = load_train_config(write(tmp_path, base + f"learning_rate: {text}\n"), [])
    assert config.learning_rate == value and isinstance(config.learning_rate, float)
    assert load_train_config(write(tmp_path, base), [f"learning_rate={text}"]).learning_rate == value


@pytest.mark.parametrize("text", ["nan", ".nan", ".inf", "-1", "0", "true", "abc", "[1]", "1e999"])
def test_t7_no_such_rate(tmp_path, text):
    path = write(tmp_path, f"model_name_or_path: m\ndataset: d\noutput_dir: o\nlearning_rate: {text}\n")
    with pytest.raises(UsageError, match="learning_rate"):
        load_train_config(path, [])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_rank", 0, "lora_rank: 0 must be at least 1"),
        ("lora_rank", 1.5, "lora_rank: 1.5 is not a whole number"),
        ("lora_rank", True, "is not a whole number"),
        ("bf16", "yes please", "is not true or false"),
        ("quantization_bit", 3, "quantization_bit: 3 is not supported"),
        ("quantization_type", "fp4", "known from LLaMA-Factory, but not supported yet"),
        ("stage", "sfft", "stage: 'sfft' is not supported"),
        ("finetuning_type", "oft", "finetuning_type: 'oft' is not supported"),
        ("report_to", "neptune", "report_to: 'neptune' is not supported"),
        # T14: never a size mismatch later, but a refusal before anything is loaded.
        ("swanlab_api_key", "k", "set SWANLAB_API_KEY"),
        ("eval_strategy", "steps", "has nothing to evaluate on"),
        ("early_stopping_steps", 3, "early_stopping_steps needs evaluations"),
        ("pref_loss", "rso", "pref_loss: 'rso' is not supported"),
        ("max_new_tokens", 0, "max_new_tokens: 0 must be at least 1"),
        ("interleave_probs", "0.5,x", "interleave_probs: '0.5,x' is not numbers"),
        ("interleave_probs", "0.5,0.5", "needs mix_strategy"),
        ("resume_from_checkpoint", 3.5j, "is not true, false or a path"),
        ("lr_scheduler_type", "polynomial", "lr_scheduler_type: 'polynomial' is not supported"),
        ("warmup_ratio", 1.5, "at most 1.0"),
        ("lora_dropout", 1, "below 1.0"),
        ("val_size", 1.5, "neither a fraction nor a count"),
        ("max_steps", 0, "would train nothing"),
        ("dataset", [], "dataset"),
        ("output_dir", None, "output_dir is missing"),
    ],
)
def test_bad_values_name_the_field(key, value, message):
    with pytest.raises(UsageError) as caught:
        parse({**NEEDED, key: value})
    assert message in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="a path of this system there")
def test_paths_of_windows(tmp_path):
    config = parse({**NEEDED, "output_dir": "saves\\lora\\run1"})
    assert config.output_dir == "saves/lora/run1" and "taken as saves/lora/run1" in config.warnings[0]
    with pytest.raises(UsageError, match=r"model_name_or_path: .* is a path of Windows"):
        parse({**NEEDED, "model_name_or_path": "D:\\models\\x"})


@pytest.mark.parametrize(
    ("key", "value", "note"),
    [
        ("use_unsloth", True, "use_unsloth is ignored: training runs on this project's own CUDA kernels"),
        ("freeze_vision_tower", True, "freeze_vision_tower is ignored: only text is trained on"),
        ("flash_attn", "fa2", "flash_attn: fa2 is torch's own fused attention"),
        ("infer_backend", "vllm", "infer_backend is ignored"),
    ],
)
def test_taken_with_a_note(key, value, note):
    assert note in " ".join(parse({**NEEDED, key: value}).warnings)


@pytest.mark.parametrize(
    "key", ["pissa_convert", "preprocessing_num_workers", "upcast_layernorm", "galore_rank"]
)
def test_taken_in_silence(key):
    assert parse({**NEEDED, key: 4}) == parse(NEEDED)


def test_unknown_key_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'learning_rate'"):
        parse({**NEEDED, "learning_rat": 1})
    with pytest.raises(UsageError, match="did you mean 'lora_rank'"):
        parse({**NEEDED, "lora_rnak": 1})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lr", "did you mean 'learning_rate'?"),
        ("load_in_4bit", "did you mean 'quantization_bit: 4'?"),
        ("colour", "leave it out; edge train --json-schema shows every key"),
    ],
)
def test_unknown_keys_of_other_programs(key, hint):
    with pytest.raises(UsageError, match=f"unknown key '{key}'") as caught:
        parse({**NEEDED, key: 1})
    assert caught.value.hint == hint
    assert "batch_size is ignored" in parse({**NEEDED, "batch_size": 4}).warnings[0]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a: b\n\tdataset: d\n", "begin lines with spaces, not with a tab"),
        ("dataset: d\nlora_rank： 8\n", "line 2 wants `key: value`, with the colon : and a space behind it"),
        ("dataset:d\n", "line 1 wants `key: value`, with the colon : and a space behind it"),
        (
            'output_dir: "C:\\Users\\me"\n',
            "a backslash in double quotes begins an escape: write the path without",
        ),
    ],
)
def test_yaml_as_it_is_mistyped(tmp_path, text, hint):
    with pytest.raises(InputError, match=r"t\.yaml") as caught:
        load_train_config(write(tmp_path, text, name="t.yaml"), [])
    assert caught.value.hint.startswith(hint)


def test_a_path_in_double_quotes_that_became_another(tmp_path):
    text = 'model_name_or_path: "models\\toy"\ndataset: d\noutput_dir: o\n'
    with pytest.raises(UsageError, match=r"model_name_or_path: 'models\\toy' holds a control character"):
        load_train_config(write(tmp_path, text), [])


def test_chinese_punctuation_and_empty_values():
    assert parse({**NEEDED, "dataset": "a，b, c"}).dataset == ("a", "b", "c")
    with pytest.raises(UsageError, match="model_name_or_path: “m” has quotes that are none in YAML"):
        parse({**NEEDED, "model_name_or_path": "“m”"})
    assert parse({**NEEDED, "eval_dataset": "", "template": ""}) == parse(NEEDED)


def test_bf16_and_fp16_exclude_each_other():
    with pytest.raises(UsageError, match="bf16 and fp16"):
        parse({**NEEDED, "bf16": True, "fp16": True})


def test_thinking_has_three_values():
    assert [parse({**NEEDED, "enable_thinking": v}).enable_thinking for v in (True, False, None)] == [
        True,
        False,
        None,
    ]


# LLaMA-Factory's example of DPO: its keys and values.
DPO = """\
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid  # choices: [sigmoid (dpo), orpo, simpo]
dataset: dpo_en_demo
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/qwen3-4b/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""


def test_example_of_dpo_loads_unchanged(tmp_path):
    config = load_train_config(write(tmp_path, DPO))
    assert (config.stage, config.pref_beta, config.pref_loss) == ("dpo", 0.1, "sigmoid")
    assert config.dataset == ("dpo_en_demo",) and not config.packs


def test_print_config_reads_back(tmp_path):
    config = load_train_config(
        write(tmp_path, QLORA), ["resume_from_checkpoint=true", "enable_thinking=null"]
    )
    again = load_train_config(write(tmp_path, as_yaml(config), name="again.yaml"))
    assert dataclasses.replace(again, warnings=()) == dataclasses.replace(config, warnings=())
    assert config.resume_from_checkpoint == "auto" and config.enable_thinking is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_size": 0.1, "eval_dataset": "e"}, "val_size and eval_dataset"),
        ({"finetuning_type": "full", "quantization_bit": 4}, "cannot train 4-bit weights"),
        ({"finetuning_type": "full", "use_dora": True}, "use_dora belongs to finetuning_type: lora"),
        ({"pissa_init": True, "quantization_bit": 4}, "pissa_init changes the base's weights"),
        ({"pissa_init": True, "adapter_name_or_path": "a"}, "pissa_init starts a new adapter"),
        ({"loftq_init": True}, "loftq_init starts from the error of 4-bit weights"),
        (
            {"loftq_init": True, "quantization_bit": 4, "adapter_name_or_path": "a"},
            "loftq_init starts a new adapter",
        ),
        ({"loftq_init": True, "quantization_bit": 4, "use_dora": True}, "loftq_init and use_dora"),
        ({"finetuning_type": "full", "adapter_name_or_path": "a"}, "adapter_name_or_path belongs to"),
        ({"stage": "dpo", "neat_packing": True}, "packing has no meaning in stage: dpo"),
        ({"max_steps": 10, "warmup_steps": 10}, "warmup_steps: 10 takes all 10 steps"),
        (
            {"dataset": "a,b", "mix_strategy": "interleave_under", "interleave_probs": "0.5,0.2"},
            "add up to 0.7",
        ),
    ],
)
def test_values_that_exclude_each_other(changes, words):
    with pytest.raises(UsageError, match=words):
        parse({**NEEDED, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.1}, "learning_rate 0.1 usually destroys the model with lora"),
        ({"learning_rate": 1e-8}, "teaches next to nothing"),
        ({"stage": "dpo", "learning_rate": 2e-4}, "usually destroys the model with dpo"),
        ({"warmup_ratio": 0.9}, "most of the steps only warm up"),
        ({"lora_alpha": 1024}, "lora_alpha 1024 is more than eight times"),
    ],
)
def test_values_that_are_hardly_meant(changes, words):
    (said,) = parse({**NEEDED, **changes}).warnings
    assert words in said


def test_a_bare_no_is_no_boolean_here(tmp_path):
    text = "model_name_or_path: m\ndataset: d\noutput_dir: o\nsave_strategy: no\neval_strategy: no\n"
    config = load_train_config(write(tmp_path, text))
    assert config.save_strategy == config.eval_strategy == "no"


def test_overrides(tmp_path):
    path = write(tmp_path, QLORA)
    config = load_train_config(
        path, ["bf16=false", "output_dir=跑 1/a=b", "dataset=x, y", "lora_alpha=null", "--seed=7", "seed=8"]
    )
    assert not config.bf16 and config.output_dir == "跑 1/a=b" and config.dataset == ("x", "y")
    assert config.lora_alpha is None and config.seed == 8
    with pytest.raises(UsageError, match="'bf16' is no key=value"):
        load_train_config(path, ["bf16"])
    with pytest.raises(UsageError, match="unknown key 'sed'"):
        load_train_config(path, ["sed=1"])


def test_files(tmp_path):
    folder = tmp_path / "配置 目录"
    folder.mkdir()
    text = "model_name_or_path: 模型/一\ndataset: d\noutput_dir: o\n"
    config = load_train_config(write(folder, text, bom=True, name="训练.yaml"), [])
    assert config.model_name_or_path == "模型/一"
    with pytest.raises(InputError, match="stands twice"):
        load_train_config(write(tmp_path, text + "dataset: e\n"), [])
    with pytest.raises(InputError, match="not valid YAML"):
        load_train_config(write(tmp_path, "a: [1\n"), [])
    with pytest.raises(InputError, match="holds no"):
        load_train_config(write(tmp_path, ""), [])
    with pytest.raises(InputError, match="no such file"):
        load_train_config(tmp_path / "none.yaml", [])
    (tmp_path / "gbk.yaml").write_bytes("dataset: 海螺".encode("gbk"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_train_config(tmp_path / "gbk.yaml", [])


@pytest.mark.slow
def test_yaml_that_is_nested_too_deeply(tmp_path):
    text = "model_name_or_path: m\ndataset: d\noutput_dir: o\n"
    deep = "[" * 5000
    with pytest.raises(InputError, match="not valid YAML"):
        load_train_config(write(tmp_path, f"a: {deep}\n"), [])
    with pytest.raises(UsageError, match=r"seed: .* cannot be read"):
        load_train_config(write(tmp_path, text), [f"seed={deep}"])


def test_every_field_says_what_it_is():
    assert all(key.help and key.help_zh for key in FIELDS.values())
    assert set(TrainConfig.__dataclass_fields__) - set(FIELDS) == {"warnings"}


def test_recorded_paths_hold_in_other_working_folders(tmp_path, monkeypatch):
    for name in ("data", "model", "run", "ONLINE"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"model_name_or_path": "model", "dataset": "d", "dataset_dir": "data", "output_dir": "run"}
    keys = recorded(parse(given))
    for key in ("model_name_or_path", "dataset_dir", "output_dir"):
        assert keys[key] == str(tmp_path / given[key])
    keys = recorded(parse(given | {"model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_dir": "ONLINE"}))
    assert (keys["model_name_or_path"], keys["dataset_dir"]) == ("Qwen/Qwen3-0.6B", "ONLINE")
    assert "warnings" not in keys


def test_the_file_of_a_wrong_value_is_named_and_not_for_what_was_given_beside_it(tmp_path):
    path = tmp_path / "训练.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset: d\noutput_dir: o\nlearning_rate: fast\n", encoding="utf-8"
    )
    with pytest.raises(UsageError) as caught:
        load_train_config(path)
    assert caught.value.message.startswith(f"{path}: learning_rate: 'fast'")
    for overrides, message in (
        (["learning_rate=1e-4", "lora_rank=-1"], "lora_rank: -1"),
        (["learning_rate=slow"], "learning_rate: 'slow'"),
    ):
        with pytest.raises(UsageError) as caught:
            load_train_config(path, overrides)
        assert caught.value.message.startswith(message)
