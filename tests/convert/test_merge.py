"""Merging: the merged model is the model that was trained, with everything it needs beside it."""

import json
import math
import shutil
import warnings

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convert import merge
from convert.config import parse
from convert.export import gguf_lora
from convert.model import lora_adapter
from convert.train import finetune
from edge.artefact import find, manifest
from edge.errors import EdgeError, ExistsError, InputError, UsageError
from tests.support.toy import make_model
from tests.support.training import plain

from tests.convert.train.test_finetune import ROWS  # isort: skip

# Seconds of training or of other processes: left out of the quick part.
pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)


@pytest.fixture
def trained(tmp_path, monkeypatch, short_answers):
    """Train on a toy; returns (run folder, base folder)."""
    (tmp_path / "d.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")

    def train(*, bf16=False, toy=None, **changes):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
        base = tmp_path / "base"
        if not base.exists():
            make_model(base, **(toy or {}))
        config = {
            "model_name_or_path": str(base),
            "dataset": "d",
            "dataset_dir": str(tmp_path),
            "output_dir": str(tmp_path / "r 一'x"),
            "quantization_bit": 4,
            "use_cpu": True,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "disable_gradient_checkpointing": True,
            **changes,
        }
        return finetune.run(parse(config), overwrite=True).parent, base

    return train


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def trained_model(run, base, dtype, double=True):
    from peft import PeftModel

    model = finetune.load_model(base, finetune.Place("cpu", dtype, True), double_quant=double)
    with warnings.catch_warnings():
        # peft asks transformers by an old name.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, run / "adapter").eval()


def difference(one, other):
    """(mean KL divergence, share of equal most probable tokens)."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item(), (p.argmax(-1) == q.argmax(-1)).float().mean().item()


@pytest.mark.parametrize(
    ("toy", "double"),
    [
        ({}, True),
        ({"arch": "qwen2", "tied": False}, False),
        pytest.param({}, False, marks=pytest.mark.matrix),
        pytest.param({"arch": "qwen2", "tied": False}, True, marks=pytest.mark.matrix),
    ],
)
def test_merged_equals_trained(trained, toy, double):
    from transformers import AutoModelForCausalLM

    run, base = trained(toy=toy, double_quantization=double)
    target = merge.run(run, dtype="float32")
    ids = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForCausalLM.from_pretrained(target).eval()
    reference = logits(trained_model(run, base, torch.float32, double), ids)
    kl, top = difference(reference, logits(merged, ids))
    assert kl < 1e-4 and top == 1.0
    # The base it was not trained on is another model: this test would notice.
    other = AutoModelForCausalLM.from_pretrained(
        merge.run(run, dtype="float32", into="original", overwrite=True)
    )
    assert difference(reference, logits(other.eval(), ids))[0] > 10 * max(kl, 1e-5)


def test_merged_in_16_bits_is_close(trained):
    from transformers import AutoModelForCausalLM

    run, base = trained(bf16=True)
    assert manifest.read(run / "adapter").settings["compute_dtype"] == "bfloat16"
    target = merge.run(run)
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert (
        merged.config.dtype == torch.float32
        and load_file(target / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float16
    )
    ids = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    kl, top = difference(logits(trained_model(run, base, torch.bfloat16), ids), logits(merged, ids))
    assert kl < 2e-3 and top > 0.95


def test_m1_updates_below_a_4_bit_step_survive(trained):
    """The base's dequantised weights plus exactly the update, however small."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    run, base = trained(max_steps=1)
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        tensor.normal_(
            0, 5e-4 if "lora_B" in name else 1.0, generator=torch.Generator().manual_seed(len(name))
        )
    save_file(tensors, path)
    target = merge.run(run, dtype="float32")
    weight = load_file(base / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    seen = dequantize_4bit(packed, state)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    update = 2.0 * tensors[key.format("B")] @ tensors[key.format("A")]
    # Smaller than half the narrowest step of NF4 (0.08 of a block's largest weight) nearly everywhere.
    assert update.abs().mean() < 0.25 * 0.08 * weight.abs().mean()
    merged = load_file(target / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.allclose(merged - seen, update, atol=1e-6)
    again, state = quantize_4bit(merged, blocksize=64, compress_statistics=True, quant_type="nf4")
    lost = dequantize_4bit(again, state) - seen
    assert (lost - update).norm() > update.norm()
    drift = manifest.read(target).settings["drift"]
    assert 0 < drift["update"] < 0.1 and drift["rounding"] < 1e-3


def test_m8_rank_stabilised(trained):
    from transformers import AutoModelForCausalLM

    assert lora_adapter.scaling({"r": 4, "lora_alpha": 8}, "a.q_proj") == 2.0
    assert lora_adapter.scaling({"r": 4, "lora_alpha": 8, "use_rslora": True}, "a.q_proj") == 4.0
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 16}, "alpha_pattern": {"b.q_proj": 4}}
    assert (
        lora_adapter.scaling(config, "a.q_proj") == 0.5 and lora_adapter.scaling(config, "a.b.q_proj") == 0.25
    )
    run, base = trained(use_rslora=True, lora_rank=4, max_steps=3)
    target = merge.run(run, dtype="float32")
    ids = torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    kl, top = difference(
        logits(trained_model(run, base, torch.float32), ids),
        logits(AutoModelForCausalLM.from_pretrained(target).eval(), ids),
    )
    assert kl < 1e-4 and top == 1.0
    plain = lora_adapter.read_adapter(run / "adapter")
    assert {lora.scaling for lora in plain.updates.values()} == {8 / math.sqrt(4)}


@pytest.mark.parametrize("bits", [4, None])
def test_dora_trained_here_is_merged_as_it_was_trained(trained, bits):
    run, _ = trained(use_dora=True, quantization_bit=bits, max_steps=4)
    target = merge.run(run, dtype="float32")
    found = manifest.read(target)
    updates = lora_adapter.read_adapter(run / "adapter").updates
    assert all(lora.magnitude is not None for lora in updates.values()) and len(updates) == 14
    assert found.settings["into"] == ("nf4" if bits else "original")
    assert found.settings["drift"]["update"] > 1e-3
    logits = found.verify["logits"]
    assert logits["kl_mean"] < 1e-6 and logits["top1"] == 1.0
    assert logits["greedy_equal"] == logits["greedy_tokens"] > 0


def test_the_folder_has_what_serving_needs(trained):
    run, base = trained(toy={"arch": "qwen2"})
    target = merge.run(run)
    known, adapter = manifest.read(target), manifest.read(run / "adapter")
    assert (known.stage, known.name, known.stop_ids) == ("merged", "r 一'x", [0, 2])
    assert known.parents[0]["digest"] == adapter.digest and known.settings["into"] == "nf4"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (base / name).read_bytes()
    before, after = (json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (base, target))
    assert after == {**before, "dtype": "float16"}
    ends = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))
    assert ends["eos_token_id"] == [0, 2] and ends["pad_token_id"] == 2
    with safe_open(target / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    with safe_open(base / "model.safetensors", framework="pt") as file:
        assert names == set(file.keys()) and "lm_head.weight" not in names
    with pytest.raises(ExistsError, match="--overwrite"):
        merge.run(run)


def test_m2_chat_template(trained):
    run, base = trained(max_steps=1)
    path = run / "adapter" / "chat_template.jinja"
    source = path.read_bytes()
    path.unlink()
    assert (merge.run(run) / "chat_template.jinja").read_bytes() == source
    path.write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(InputError, match="the chat template is not the one"):
        merge.run(run, overwrite=True)
    path.unlink()
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(EdgeError):
        merge.run(run, overwrite=True)
    assert (run / "merged" / "chat_template.jinja").read_bytes() == source


def test_shards(trained):
    from transformers import AutoModelForCausalLM

    run, _ = trained(max_steps=1, toy={"tied": False})
    whole = load_file(merge.run(run) / "model.safetensors")
    target = merge.run(run, overwrite=True, shard=100_000)
    assert len(list(target.glob("*.safetensors"))) > 1 and not (target / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_16_bit_training_merges_into_the_original(trained):
    run, base = trained(quantization_bit=None, max_steps=1)
    target = merge.run(run, dtype="float32")
    assert manifest.read(target).settings["into"] == "original"
    lora = lora_adapter.read_adapter(run / "adapter").updates["model.layers.0.self_attn.q_proj.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    merged, old = (load_file(folder / "model.safetensors")[name] for folder in (target, base))
    assert torch.equal(merged, old + lora.delta())


def test_what_cannot_be_merged(trained, tmp_path):
    run, base = trained(max_steps=1)
    with pytest.raises(InputError, match="no such folder"):
        merge.run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no adapter"):
        merge.run(tmp_path / "empty")
    with pytest.raises(UsageError, match="--dtype int8"):
        merge.run(run, dtype="int8")
    path = run / "adapter" / "adapter_config.json"
    config = path.read_text(encoding="utf-8")
    path.write_text(config.replace('"fan_in_fan_out": false', '"fan_in_fan_out": true'), encoding="utf-8")
    with pytest.raises(InputError, match="fan_in_fan_out is True"):
        merge.run(run)
    path.write_text(config.replace('"LORA"', '"IA3"'), encoding="utf-8")
    with pytest.raises(InputError, match="'IA3' cannot be merged"):
        merge.run(run)
    path.write_text(config, encoding="utf-8")
    make_model(base, hidden=32)
    with pytest.raises(InputError, match="the adapter belongs to another model"):
        merge.run(run)
    assert not (run / "merged").exists()


def test_a_base_that_was_changed_is_refused(trained, tmp_path):
    make_model(tmp_path / "base")
    manifest.write(tmp_path / "base", manifest.Manifest(stage="model", name="toy", base_model="the toy"))
    run, base = trained(max_steps=1)
    assert manifest.read(run / "adapter").base_model == "the toy"
    assert manifest.read(merge.run(run)).base_model == "the toy"
    make_model(base, seed=1)
    manifest.write(base, manifest.Manifest(stage="model", name="toy"))
    with pytest.raises(InputError, match="is not the base that"):
        merge.run(run, overwrite=True)


def test_float16_that_overflows_is_refused(trained):
    run, base = trained(max_steps=1)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EdgeError, match=r"model\.norm\.weight does not fit into torch\.float16"):
        merge.run(run, dtype="float16")


@pytest.mark.parametrize("named", ["D:\\models\\Qwen2.5-0.5B", "", None])
def test_a_base_that_is_not_where_the_adapter_says(trained, tmp_path, named):
    """An adapter of LLaMA-Factory's from another machine: without edge.json, its base at another path."""
    run, base = trained(quantization_bit=None, max_steps=1)
    theirs = tmp_path / "theirs"
    (run / "adapter").rename(theirs)
    (theirs / "edge.json").unlink()
    path = theirs / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": named}), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"(?s)adapter_config\.json: base_model_name_or_path is .*--base PATH"
    ):
        merge.run(theirs)
    target = merge.run(theirs, base=base)
    assert target == theirs / "merged" and manifest.read(target).verify["logits"]["kl_mean"] < 1e-4


def test_verb(trained, capsys):
    run, _ = trained(max_steps=1)
    assert merge.main([str(run), "--dtype", "float32", "--into", "original"]) == 0
    said = capsys.readouterr().out
    assert "14 layers changed by" in said and "original base" in said


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """(base, adapter): what peft alone writes, with a base of another machine."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("elsewhere")
    base = make_model(folder / "base")
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft calls transformers by a deprecated name.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    model.peft_config["default"].base_model_name_or_path = "C:\\Users\\me\\Qwen2.5-1.5B"
    model.save_pretrained(folder / "lora", save_embedding_layers=False)
    return base, folder / "lora"


def test_an_adapter_whose_base_is_gone_names_file_and_key(elsewhere, tmp_path):
    _, adapter = elsewhere
    copied = shutil.copytree(adapter, tmp_path / "lora")
    words = r"adapter_config\.json: base_model_name_or_path is 'C:.*Qwen2.5-1.5B', and there is no such model"
    with pytest.raises(InputError, match=f"(?s){words}.*--base PATH"):
        merge.run(copied, console=QUIET)
    config = json.loads((copied / "adapter_config.json").read_text(encoding="utf-8"))
    for empty in ("", None):
        text = json.dumps({**config, "base_model_name_or_path": empty})
        (copied / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(
            InputError, match=r"(?s)base_model_name_or_path is '', and there is no such.*--base PATH"
        ):
            merge.run(copied, console=QUIET)


@pytest.mark.slow
def test_an_adapter_made_elsewhere_is_merged_into_the_base_that_is_named(elsewhere, tmp_path):
    """The merged model's logits are those of peft's adapter over its base; the proof stands in edge.json."""
    from peft import PeftModel

    base, adapter = elsewhere
    copied = shutil.copytree(adapter, tmp_path / "lora")
    merge.main([str(copied), "--base", str(base), "--dtype", "float32"])
    found = manifest.read(copied / "merged")
    assert found.verify["logits"]["kl_mean"] < 1e-6 and found.chat_template is not None
    config = json.loads((copied / "adapter_config.json").read_text(encoding="utf-8"))
    (copied / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(base)}), encoding="utf-8"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(plain(base), str(copied)).eval()
    ids = torch.tensor([[5, 60, 7, 80, 9, 100]])
    merged = plain(copied / "merged")
    torch.testing.assert_close(logits(merged, ids), logits(theirs, ids), atol=1e-4, rtol=1e-4)


def test_an_adapter_is_not_merged_into_another_model(elsewhere, tmp_path):
    _, adapter = elsewhere
    copied = shutil.copytree(adapter, tmp_path / "lora")
    other = make_model(tmp_path / "other", hidden=32)
    with pytest.raises(InputError, match=r"weight has the shape .* there, .*other has the shape"):
        merge.run(copied, base=other, console=QUIET)
    assert not (copied / "merged").exists()


@pytest.mark.slow
def test_an_adapter_made_elsewhere_is_exported_for_the_base_that_is_named(elsewhere, tmp_path):
    pytest.importorskip("llama_cpp")
    base, adapter = elsewhere
    copied = shutil.copytree(adapter, tmp_path / "lora")
    with pytest.raises(InputError, match=r"base_model_name_or_path is 'C:.*, and there is no such model"):
        gguf_lora.run(copied)
    other = make_model(tmp_path / "other", hidden=32)
    with pytest.raises(InputError, match=r"there, .*other has the shape"):
        gguf_lora.run(copied, base=other)
    file = gguf_lora.run(copied, base=base)
    header = find.check_lora(file)
    assert len(header.tensors) == 2 * 4
    with pytest.raises(InputError, match=r"(?s)is an adapter, which needs.*edge merge .*--base"):
        find.resolve(copied)
