"""Keys of LLaMA-Factory whose effect shows: in weights, losses, files, or what is asked of a library."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from convert import merge
from convert.config import TrainConfig
from convert.data import prepare
from convert.data.encode import Sample
from convert.model import chat_format, hf_folder, hub, lora_adapter
from convert.train import cuda_graphs, distributed, finetune, load_model, memory_estimate
from edge.artefact import manifest
from edge.errors import ExistsError, InputError, UsageError
from tests.support.runs import configure
from tests.support.toy import THINKING, make_model, make_stub

QUIET = Console(quiet=True)
Made = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Made]:
    """Configurations of runs in float32, on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
        yield configure(tmp_path_factory.mktemp("keys"), base, max_steps=3, save_strategy="no")


def weights(config: TrainConfig) -> torch.Tensor:
    """All of the adapter that a run ends with, in one vector."""
    tensors = load_file(finetune.run(config, console=QUIET) / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def plain(made: Made) -> torch.Tensor:
    return weights(made("plain"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"adam_beta1": 0.0},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1.0},
        {"flash_attn": "disabled"},
        {"pure_bf16": True},
    ],
    ids=str,
)
def test_the_weights_change(made: Made, plain: torch.Tensor, changes: dict[str, Any]) -> None:
    assert not torch.equal(weights(made(f"{changes}", **changes)), plain)


@pytest.mark.slow
def test_the_attention_is_the_one_that_is_named(made: Made) -> None:
    for name, attention in (("disabled", "eager"), ("fa2", cuda_graphs.ATTENTION)):
        job = finetune.Run.begin(made(name, flash_attn=name), overwrite=False, console=QUIET, again="")
        job.load()
        assert job.model.config._attn_implementation == attention


@pytest.mark.slow
def test_what_is_dequantised_once_trains_the_same_adapter(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, room = [], 2**40
    for kept in (True, False):
        monkeypatch.setattr(memory_estimate, "free", lambda _, room=room: room)
        config = made(f"kept {kept}", quantization_bit=4)
        job = finetune.Run.begin(config, overwrite=False, console=QUIET, again="")
        job.load()
        job.build_objective()
        layer = job.model.get_base_model().model.layers[0].mlp.up_proj
        assert (layer.forward.args[-1].kept is not None) == kept
        found.append(weights(config))
        room = job.need.total  # leaves nothing beside the copies
    assert torch.equal(*found)


@pytest.mark.slow
def test_an_earlier_run_is_replaced_where_that_is_asked_for(made: Made, plain: torch.Tensor) -> None:
    with pytest.raises(ExistsError, match="--overwrite"):
        finetune.run(made("plain"), console=QUIET)
    assert finetune.plan(made("plain", overwrite_output_dir=True))["steps"] == 3
    assert torch.equal(weights(made("plain", overwrite_output_dir=True)), plain)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4])
def test_a_new_adapter_goes_on_top_of_an_earlier_one(
    made: Made, plain: torch.Tensor, base: Path, bits: int | None
) -> None:
    """The earlier one goes into the base, so that both are in what is merged."""
    earlier = Path(made("plain").output_dir)
    changes = {"create_new_adapter": True, "lora_rank": 2, "quantization_bit": bits, "max_steps": 1}
    config = made(f"second {bits}", adapter_name_or_path=str(earlier), **changes)
    assert finetune.plan(config)["steps"] == 1 and not Path(config.output_dir).exists()
    run = finetune.run(config, console=QUIET).parent
    start = run / "start"
    assert manifest.read(run / "adapter").parents[0]["path"] == str(start)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (base, start))
    first = lora_adapter.read_adapter(earlier / "adapter").updates[name].delta()
    assert torch.allclose(after, before + first, atol=1e-6) and first.abs().max() > 1e-3
    assert lora_adapter.read_adapter(run / "adapter").updates[name].a.shape[0] == 2
    assert manifest.read(merge.run(run, console=QUIET)).verify["logits"]["kl_mean"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("linear", {}),
        ("dynamic", {"original_max_position_embeddings": 512}),
        ("yarn", {"original_max_position_embeddings": 512}),
        (
            "llama3",
            {"original_max_position_embeddings": 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
    ],
)
def test_positions_are_stretched_to_cutoff_len(
    made: Made, plain: torch.Tensor, base: Path, kind: str, more: dict[str, Any]
) -> None:
    """The toy has 512 positions; the factor is the smallest whole number, as in LLaMA-Factory."""
    config = made(f"rope {kind}", rope_scaling=kind, cutoff_len=1200)
    assert not torch.equal(weights(config), plain) or kind == "dynamic"
    run = Path(config.output_dir)
    about = json.loads((run / "start" / "config.json").read_text(encoding="utf-8"))
    assert about["max_position_embeddings"] == 1536
    theta = about["rope_parameters"].pop("rope_theta")
    assert about["rope_parameters"] == {"rope_type": kind, "factor": 3.0, **more} and theta == 10000.0
    assert (run / "start" / "model.safetensors").samefile(base / "model.safetensors")
    if kind == "yarn":
        merged = merge.run(run, console=QUIET)
        assert manifest.read(merged).verify["logits"]["kl_mean"] < 1e-4
        assert json.loads((merged / "config.json").read_text("utf-8"))["max_position_embeddings"] == 1536


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"stage": "dpo", "dataset": "p"}, {"packing": True}], ids=str)
def test_encoded_rows_are_kept_and_taken(
    made: Made, tmp_path: Path, base: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "tokens"
    first = made(f"first {changes}", tokenized_path=str(folder), val_size=2, **changes)
    chat = chat_format.load(base)
    before = prepare.prepare(first, chat)
    again = made(f"second {changes}", tokenized_path=str(folder), **{**changes, "cutoff_len": 9})
    after = prepare.prepare(again, chat)
    assert (after.train, after.held, after.rows) == (before.train, before.held, before.rows)
    assert after.digest() == before.digest() and "other keys of data change nothing" in after.notes[0]
    assert torch.equal(weights(first), weights(again))
    other = make_model(tmp_path / "other", template=THINKING)
    with pytest.raises(InputError, match="another chat template"):
        prepare.prepare(again, chat_format.load(other))
    with pytest.raises(InputError, match="was not written by edge train"):
        prepare.prepare(made("third", tokenized_path=str(base)), chat)
    next(folder.iterdir()).write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"):
        prepare.prepare(again, chat)


@pytest.mark.slow
def test_positions_that_suffice_stay(made: Made, plain: torch.Tensor) -> None:
    config = made("rope none", rope_scaling="linear", cutoff_len=512)
    assert torch.equal(weights(config), plain)
    assert not (Path(config.output_dir) / "start").exists()


@pytest.mark.slow
def test_of_several_adapters_the_last_one_is_trained_on(made: Made, plain: torch.Tensor) -> None:
    earlier = made("plain").output_dir
    other = finetune.run(made("other", seed=7, lora_rank=4), console=QUIET)
    # A rate that changes nothing: what comes out is what went in.
    config = made("both", adapter_name_or_path=f"{earlier},{other}", learning_rate=1e-12, max_steps=1)
    target = finetune.run(config, console=QUIET)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (other, target))
    assert all(torch.allclose(one[name], two[name], atol=1e-7) for name in one)
    assert manifest.read(target).parents[0]["path"] == str(target.parent / "start")


@pytest.mark.slow
def test_modules_are_trained_whole_beside_the_adapter(made: Made, base: Path) -> None:
    config = made("whole", additional_target="lm_head,norm", lora_target="q_proj")
    run = finetune.run(config, console=QUIET).parent
    adapter = lora_adapter.read_adapter(run / "adapter")
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(adapter.whole)
    merged = load_file(merge.run(run, dtype="float32", console=QUIET) / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert not torch.equal(merged["model.norm.weight"], before["model.norm.weight"])
    # The base ties both tables, and they stay tied.
    assert "lm_head.weight" not in merged
    assert not torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert manifest.read(run / "merged").verify["logits"]["kl_mean"] < 1e-4
    for target, bits, why in (("no_such", None, "is no module"), ("up_proj", 4, "is held in few bits")):
        with pytest.raises(UsageError, match=f"additional_target: {target} {why}"):
            finetune.run(made("none", additional_target=target, quantization_bit=bits), console=QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_trained_is_held_in_bfloat16(made: Made, kind: str) -> None:
    config = made(f"pure {kind}", pure_bf16=True, finetuning_type=kind, max_steps=1)
    job = finetune.Run.begin(config, overwrite=False, console=QUIET, again="")
    job.load()
    assert {one.dtype for one in job.model.parameters() if one.requires_grad} == {torch.bfloat16}
    finetune.run(config, console=QUIET)


@pytest.mark.slow
def test_accuracy_is_that_of_the_most_probable_tokens(made: Made, base: Path) -> None:
    """As LLaMA-Factory counts it: of each row's answer, then the mean over rows."""
    changes = {"val_size": 3, "compute_accuracy": True, "eval_strategy": "steps", "eval_steps": 1}
    config = made("accuracy", finetuning_type="full", learning_rate=1e-3, **changes)
    run = finetune.run(config, console=QUIET).parent
    results = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text("utf-8").splitlines()]
    assert [line["eval_accuracy"] for line in log if "eval_loss" in line][-1] == results["eval_accuracy"]
    model = load_model.load_model(run / "merged", load_model.Place("cpu", torch.float32, False)).eval()
    shares = []
    for item in prepare.prepare(config, chat_format.load(base)).held:
        assert isinstance(item, Sample)
        with torch.no_grad():
            best = model(input_ids=torch.tensor([list(item.ids)])).logits[0].argmax(-1).tolist()
        right = [best[at - 1] == item.ids[at] for start, end in item.spans for at in range(start, end)]
        shares.append(sum(right) / len(right))
    assert results["eval_accuracy"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_output_dir_is_loaded_by_name(made: Made, base: Path, kind: str) -> None:
    """By peft and transformers, as LLaMA-Factory's users name it; no byte of weights is there twice."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = finetune.run(made(f"root {kind}", finetuning_type=kind), console=QUIET).parent
    stage = run / {"lora": "adapter", "full": "merged"}[kind]
    model = AutoModelForCausalLM.from_pretrained(base if kind == "lora" else run)
    if kind == "lora":
        with warnings.catch_warnings():
            # peft calls transformers by a deprecated name.
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, run)
    assert AutoTokenizer.from_pretrained(run).chat_template
    name = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}[kind]
    assert (run / name).samefile(stage / name) and not (run / manifest.FILE).exists()
    tensors = load_file(stage / name)
    key = next(iter(tensors))
    loaded = model.state_dict()[key.replace(".weight", ".default.weight") if kind == "lora" else key]
    assert torch.equal(loaded.float(), tensors[key].float())
    # Ours go on from the stage, with what its manifest says.
    assert hf_folder.stage_folder(run, stage.name) == stage
    more = {"adapter_name_or_path": str(run)} if kind == "lora" else {"model_name_or_path": str(run)}
    again = finetune.run(made(f"again {kind}", max_steps=1, **more), console=QUIET)
    assert kind == "lora" or manifest.read(again).parents[0]["path"] == str(stage)


@pytest.mark.slow
def test_a_run_of_another_kind_leaves_no_file_of_the_earlier_one(made: Made) -> None:
    run = finetune.run(made("kinds"), console=QUIET).parent
    finetune.run(made("kinds", finetuning_type="full", max_steps=1), console=QUIET)
    assert not (run / "adapter_config.json").exists() and (run / "config.json").is_file()


def test_processes_wait_as_long_as_ddp_timeout_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(distributed.distributed, "init_process_group", lambda _, **how: asked.update(how))
    monkeypatch.setattr(distributed, "_watch", lambda *_, **how: None)
    monkeypatch.setattr(distributed, "_peers", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    # What LLaMA-Factory's examples have.
    assert distributed.join(cpu=True, timeout=180000000).rank == 1
    assert asked["timeout"] == timedelta(seconds=180000000)


def test_models_are_kept_in_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = make_stub(tmp_path / "m"), []

    def download(**how: Any) -> str:
        asked.append(how["cache_dir"])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.resolve("some/model", "main", str(tmp_path)) == folder
    assert asked == [str(tmp_path)]
    assert hub.resolve("some/model") == folder and asked[1] is None
