"""Ways to train: packed rows, preferences, DoRA, PiSSA, every weight; evaluations, and several processes."""

import json
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from rich.console import Console
from safetensors.torch import load_file

from convert import merge
from convert.data import encode, prepare
from convert.model import chat_format
from convert.train import cli, finetune, load_model, loftq, trainer
from edge.errors import InputError, UsageError
from tests.convert.test_config import DPO, QLORA
from tests.support.runs import PAIRS, ROWS, configure
from tests.support.toy import make_model
from tests.support.training import logits, plain, sample

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
QUIET = Console(quiet=True)


@pytest.fixture
def made(tmp_path, base):
    return configure(tmp_path, base, max_steps=2, save_strategy="no")


def test_packs_hold_each_row_once_and_little_room():
    shuffle = random.Random(3)
    rows = [sample(shuffle.randint(2, 60), prompt=1, seed=n) for n in range(200)]
    packs = encode.pack(rows, 64)
    assert sum(len(one.starts) for one in packs) == len(rows)
    assert sum(one.learnt for one in packs) == sum(one.learnt for one in rows)
    assert max(len(one.ids) for one in packs) <= 64
    assert sum(len(one.ids) for one in packs) > 0.9 * 64 * len(packs)


@pytest.mark.slow
def test_packing_trains(made, tmp_path):
    said = Console(record=True, width=200)
    finetune.run(made(packing=True, cutoff_len=128, eval_dataset="d"), console=said)
    assert "packing: 10 rows in" in said.export_text()


def test_loss_on_the_prompt_but_for_the_first_token(base, made):
    form = chat_format.load(base)
    (item, *_) = prepare.prepare(made(train_on_prompt=True), form).train
    assert item.spans[0][0] == 1 and item.learnt == len(item.ids) - 1


def test_num_samples_and_mixing(made, tmp_path, base):
    info = {
        "a": {"file_name": "d.json", "num_samples": 3},
        "b": {"file_name": "d.json", "num_samples": 25},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    form = chat_format.load(base)

    def sources(**changes):
        return [one.source[0] for one in prepare.prepare(made(dataset="a,b", **changes), form).train]

    assert "".join(sources()) == "a" * 3 + "b" * 25
    assert "".join(sources(mix_strategy="interleave_under")) == "ababa"
    assert sources(mix_strategy="interleave_over").count("a") == 25
    drawn = sources(mix_strategy="interleave_over", interleave_probs="0.1,0.9")
    assert 0 < drawn.count("a") < 10 and drawn.count("b") >= 25


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_preferences_are_learnt(made, tmp_path, loss):
    config = made(
        stage="dpo", dataset="p", pref_loss=loss, max_steps=12, val_size=2, quantization_bit=4, pref_beta=0.5
    )
    finetune.run(config, console=QUIET)
    log = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    if loss == "sigmoid":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("text", "names"), [(QLORA, ("identity", "alpaca_en_demo")), (DPO, ("dpo_en_demo",))]
)
def test_examples_of_llamafactory_run_through(tmp_path, base, capsys, text, names):
    """Their keys and values; places, template and, for a short run, logging_steps are this test's own."""
    ranking = text is DPO
    info = {name: {"file_name": "d.json", **({"ranking": True} if ranking else {})} for name in names}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (tmp_path / "d.json").write_text(json.dumps(PAIRS if ranking else ROWS), encoding="utf-8")
    (tmp_path / "theirs.yaml").write_text(text, encoding="utf-8")
    places = {"model_name_or_path": base, "dataset_dir": tmp_path, "output_dir": tmp_path / "run"}
    words = [
        *(f"{key}={value}" for key, value in places.items()),
        "template=qwen",
        "use_cpu=true",
        "logging_steps=2",
    ]
    assert cli.main([str(tmp_path / "theirs.yaml"), *words]) == 0
    rows = len(names) * len(PAIRS if ranking else ROWS)
    steps = 3 * math.ceil(rows / 8)
    assert f"{rows} {'pairs' if ranking else 'rows'} to train on" in capsys.readouterr().out
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == steps and (tmp_path / "run" / "training_loss.svg").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_stage_and_data_must_fit(made):
    with pytest.raises(UsageError, match="stage: dpo needs preference rows"):
        finetune.run(made(stage="dpo"), console=QUIET)
    with pytest.raises(UsageError, match="holds preference rows"):
        finetune.run(made(dataset="p"), console=QUIET)


@pytest.mark.slow
def test_every_weight(made, base):
    target = finetune.run(made(finetuning_type="full", learning_rate=1e-3, bf16=True), console=QUIET)
    trained, before = plain(target), plain(base)
    assert target.name == "merged"
    for name, one in trained.named_parameters():
        assert not torch.equal(one.float(), before.get_parameter(name)), name
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert (
        config["dtype"] == "float16" and chat_format.load(target).stop_ids == chat_format.load(base).stop_ids
    )
    with pytest.raises(InputError, match="changed the weights themselves"):
        merge.run(target.parent, console=QUIET)


@pytest.mark.slow
def test_pissa_is_saved_as_a_plain_adapter(made, base, tmp_path, monkeypatch):
    """The base with the adapter is the model that was trained, whose base was changed."""
    seen = {}
    real = trainer.Loop.run

    def watched(self, *args, **more):
        state = real(self, *args, **more)
        seen["trained"] = logits(self.model.eval())
        return state

    monkeypatch.setattr(trainer.Loop, "run", watched)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    target = finetune.run(made(pissa_init=True, max_steps=5), console=QUIET)
    adapter = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["r"] == 16 and adapter["init_lora_weights"] is True
    from convert.train.evaluate import load_tuned

    again = load_tuned(target, base, made(), load_model.Place("cpu", torch.float32, False)).eval()
    assert torch.allclose(logits(again), seen["trained"], atol=1e-3)
    assert not torch.allclose(logits(plain(base)), seen["trained"], atol=1e-1)


def test_loftq_begins_with_what_four_bits_lost(base, made, tmp_path):
    config = made(loftq_init=True, quantization_bit=4, lora_rank=16, lora_alpha=8, use_rslora=True)
    tuned = load_model.add_adapter(
        load_model.load_model(base, load_model.Place("cpu", torch.float32, True)), config
    ).eval()
    before, want = logits(tuned), logits(plain(base))
    share = loftq.begin(tuned, base)
    assert 0.1 < share < 0.9
    assert (logits(tuned) - want).norm() < 0.9 * (before - want).norm()
    # By the formula, of one layer.
    layer = tuned.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    weight = load_file(base / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
    data = layer.get_base_layer().weight
    missing = weight - dequantize_4bit(data.data, data.quant_state).float()
    kept = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    rest = torch.linalg.svdvals(missing)[16:].square().sum()
    assert float((missing - kept).detach().square().sum()) == pytest.approx(float(rest), rel=0.02)
    other = make_model(tmp_path / "other", layers=1)
    with pytest.raises(InputError, match="has no tensor model\\.layers\\.1"):
        loftq.begin(tuned, other)


def test_training_starts_with_loftq_and_merges_as_it_was_trained(made, tmp_path):
    said = Console(record=True, width=200)
    target = finetune.run(made("run", loftq_init=True, quantization_bit=4, learning_rate=1e-9), console=said)
    assert "of the quantisation error" in said.export_text()
    merge.run(target.parent, console=QUIET)
    found = json.loads((target.parent / "merged" / "edge.json").read_text(encoding="utf-8"))
    assert found["verify"]["logits"]["kl_mean"] < 1e-4


def test_training_goes_on_from_an_adapter(made, base, tmp_path):
    first = finetune.run(
        made("one", lora_rank=4, use_rslora=True, lora_target="q_proj,v_proj"), console=QUIET
    )
    said = Console(record=True, width=200)
    again = made("two", adapter_name_or_path=str(tmp_path / "one"), learning_rate=1e-9)
    second = finetune.run(again, console=said)
    assert "whose settings hold: lora_rank 4, lora_alpha 8, use_rslora True" in said.export_text()
    before, after = (load_file(one / "adapter_model.safetensors") for one in (first, second))
    assert set(before) == set(after) and all(
        torch.allclose(before[key], after[key], atol=1e-7) for key in before
    )
    assert all(one.abs().max() > 0 for key, one in before.items() if "lora_B" in key)
    assert json.loads((second / "adapter_config.json").read_text(encoding="utf-8"))["use_rslora"] is True


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, UsageError, "has modules_to_save: .*edge merge"),
        ({"r": 2}, InputError, "does not fit this model"),
        ({"r": None}, InputError, "adapter_config.json cannot be read"),
    ],
)
def test_adapters_that_cannot_be_gone_on_from(made, tmp_path, change, error, words):
    target = finetune.run(made("one", max_steps=1), console=QUIET)
    known = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    (target / "adapter_config.json").write_text(json.dumps({**known, **change}), encoding="utf-8")
    with pytest.raises(error, match=f"(?s){words}"):
        finetune.run(made("two", adapter_name_or_path=str(target)), console=QUIET)
    with pytest.raises(InputError, match=r"adapter_name_or_path: .*none holds no adapter_config\.json"):
        finetune.run(made("two", adapter_name_or_path=str(tmp_path / "none")), console=QUIET)


@pytest.mark.slow
def test_dora(made):
    target = finetune.run(made(use_dora=True, quantization_bit=4), console=QUIET)
    tensors = load_file(target / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in tensors)


@pytest.mark.slow
def test_the_best_evaluation_is_kept_and_training_stops(made, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 9.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: next(losses))
    said = Console(record=True, width=200)
    config = made(
        val_size=2, max_steps=20, eval_strategy="steps", eval_steps=2, early_stopping_steps=2,
        save_strategy="steps", save_steps=3, save_total_limit=1, plot_loss=True,
    )  # fmt: skip
    target = finetune.run(config, console=said)
    text = said.export_text()
    assert "stopping early at step 8: no better validation loss than 1.0000 (step 4)" in text
    assert "the weights are those of step 4" in text and " -> " in text
    folder = tmp_path / "run"
    assert sorted(one.name for one in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_metric"] == 1.0 and state["best_model_checkpoint"].endswith("checkpoint-4")
    best = load_file(folder / "checkpoint-4" / "trained.safetensors")
    kept = load_file(target / "adapter_model.safetensors")
    for name, one in kept.items():
        assert torch.equal(one, best[name.replace(".weight", ".default.weight")])
    answers = (folder / "eval_answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 2 * 4 and set(json.loads(answers[0])) == {"current_steps", "question", "answer"}
    for name in ("training_loss.svg", "training_eval_loss.svg"):
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
