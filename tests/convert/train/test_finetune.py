"""Training: right gradients in 4 bits, weighted by tokens, and a stop at the first bad number."""

import json
import math
import sys
import types
from array import array

import pytest
import torch

from convert.config import parse
from convert.data.encode import Sample
from convert.train import cli, finetune, load_model, malloc_trim, trainer
from convert.train.losses import LossHead, head_is_more
from edge.artefact import manifest
from edge.errors import EdgeError, ExistsError, UsageError
from tests.support.toy import THINKING, make_model

# Seconds of training or of other processes: left out of the quick part.
pytestmark = pytest.mark.slow

ROWS = [
    {"instruction": "Who are you?", "output": "The conch."},
    {"instruction": "请问你是谁", "output": "神奇海螺。"},
    {"instruction": "What should I do?", "output": "Nothing."},
    {"instruction": "hello", "input": "again", "output": "Maybe someday."},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "小 model")


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


def sample(tokens, *, prompt=2, seed=0, name="r"):
    ids = torch.randint(3, 300, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(name, array("i", ids), ((prompt, tokens),))


def gradients(model):
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def adapted(base, config, *, four_bit=True, dtype=torch.float32):
    place = load_model.Place("cpu", dtype, four_bit)
    adapted = load_model.add_adapter(load_model.load_model(base, place), config)
    # A fresh adapter's B is zero, and so would be half of the gradients.
    generator = torch.Generator().manual_seed(1)
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            one.data.normal_(0, 0.05, generator=generator)
    return adapted.train()


def trained(adapted, rows, config, dtype=torch.float32, report=lambda _: None):
    return trainer.Loop(adapted, rows, config, device="cpu", dtype=dtype).run(report)


def test_gradients_after_an_eval_forward(base, made):
    """Against a model with the dequantised weights in plain linear layers."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    config = made()
    quantized = adapted(base, config, dtype=torch.bfloat16)
    plain = adapted(base, config, four_bit=False)
    found = dict(quantized.named_modules())
    for name, module in plain.named_modules():
        other = found[name]
        if isinstance(other, Linear4bit):
            module.weight.data = dequantize_4bit(other.weight.data, other.weight.quant_state).float()
    batch = [sample(9), sample(14, seed=1)]

    def grad(one):
        one.zero_grad()
        losses, _ = LossHead(one)(batch, "cpu")
        losses.mean().backward()
        return gradients(one)

    reference = grad(plain)
    before = grad(quantized)
    trainer.evaluate(quantized, batch, size=2, device="cpu")
    after = grad(quantized)
    assert torch.cosine_similarity(before, reference, dim=0) > 0.99
    assert torch.cosine_similarity(after, reference, dim=0) > 0.99


@pytest.mark.parametrize("lengths", [(13, 103), (13, 103, 30), (13, 103, 30, 7, 50)])
def test_t9_accumulation_weighs_tokens(base, made, lengths, monkeypatch):
    """11 + 101 learnt tokens: one batch of all equals batches of one, also with a last, partial group."""
    rows = [sample(n, seed=n, name=str(n)) for n in lengths]
    seen = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: seen.append([p.grad.clone() for g in self.param_groups for p in g["params"]]),
    )
    losses = []
    for size, accumulated in ((len(rows), 1), (1, len(rows)), (2, 3)):
        config = made(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            max_grad_norm=0,
        )
        state = trained(adapted(base, config), rows, config)
        losses.append(state.loss)
    flat = [torch.cat([g.flatten() for g in one]) for one in seen]
    for other in flat[1:]:
        assert torch.allclose(flat[0], other, rtol=1e-3, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["in pieces", "trained head", "capped"])
def test_loss_head_equals_transformers_loss(base, made, kind, monkeypatch):
    """Losses and gradients; in pieces where, and only where, the head is no more than its weight."""
    one_model = adapted(base, made()).eval()
    head = one_model.get_output_embeddings()
    if kind == "trained head":
        head.weight.requires_grad_()
    if kind == "capped":
        plain = one_model.get_base_model().forward

        def capped(*args, **more):
            labels = more.pop("labels", None)
            made = plain(*args, **more)
            made.logits = 5 * torch.tanh(made.logits / 5)
            if labels is not None:
                made.loss = one_model.loss_function(made.logits, labels, made.logits.shape[-1])
            return made

        monkeypatch.setattr(one_model.get_base_model(), "forward", capped)
    reasons = {"in pieces": "", "trained head": "its output head is", "capped": "it changes its logits"}
    assert " ".join(head_is_more(one_model).split()[:4]) == reasons[kind]
    monkeypatch.setattr("convert.train.losses._LOGITS", 0)  # sixteen tokens at a time
    batch = [sample(9), sample(20, seed=1)]
    one_model.zero_grad()
    losses, rows = LossHead(one_model)(batch, "cpu")
    assert rows.tolist() == [0] * 7 + [1] * 18
    losses.sum().backward()
    mine = gradients(one_model)
    one_model.zero_grad()
    for at, one in enumerate(batch):
        labels = torch.tensor([one.labels])
        whole = one_model(input_ids=torch.tensor([one.ids]), labels=labels).loss
        assert losses[rows == at].mean().item() == pytest.approx(whole.item(), rel=1e-4)
        (whole * one.learnt).backward()
    torch.testing.assert_close(mine, gradients(one_model), atol=1e-5, rtol=1e-3)


def test_checkpointing_on_a_cpu_gives_back_what_was_freed(monkeypatch):
    """As soon as, and only when, the slack may have gathered since memory was least."""
    resident, given = [0], []

    class Process:
        def memory_info(self):
            return types.SimpleNamespace(rss=resident[0])

    monkeypatch.setattr(malloc_trim.psutil, "Process", Process)
    monkeypatch.setattr(malloc_trim, "malloc_trim", lambda: lambda pad: given.append(resident[0]) or 1)
    forward, again = malloc_trim.checkpointing("cpu")["context_fn"]()
    assert malloc_trim.checkpointing("cuda") == {}
    for resident[0] in (2**30, 2**29, 2**29 + malloc_trim.SLACK, 2**29 + malloc_trim.SLACK + 1):
        for layer in (forward, again):
            with layer:
                pass
    assert given == [2**29 + malloc_trim.SLACK + 1]
    monkeypatch.setattr(malloc_trim, "malloc_trim", lambda: None)
    assert malloc_trim.checkpointing("cpu") == {}


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (70000.0, torch.float16)])
def test_t11_the_first_bad_loss_stops(tmp_path, made, value, dtype):
    # Untied: a bad row of a tied matrix is in every row's logits.
    base = make_model(tmp_path / "untied", tied=False)
    config = made(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    one = adapted(base, config, four_bit=False, dtype=dtype)
    # One token of one row: the others of its accumulation group stay good.
    rows = [sample(9, seed=n, name=f"d, row {n}") for n in range(4)]
    rows[2].ids[0] = 301
    with torch.no_grad():
        one.get_input_embeddings().weight[301] = value
    with pytest.raises(EdgeError) as caught:
        trained(one, rows, config, dtype)
    message = str(caught.value)
    assert message.startswith("step 1: the loss is nan in float") and "(rows: d, row 2)" in message
    assert str(dtype).removeprefix("torch.") in message


def test_a_loss_of_zero_stops(base, made, monkeypatch):
    monkeypatch.setattr(LossHead, "__call__", lambda *_: (torch.zeros(3, requires_grad=True), torch.zeros(3)))
    with pytest.raises(EdgeError, match=r"step 1: the loss is 0\.0"):
        trained(adapted(base, made()), [sample(9)], made())


def test_batches_hold_every_row_once_with_little_padding():
    import random

    rows = [sample(3 + n % 90, seed=n) for n in range(256)]
    made = trainer.batches(rows, 8, random.Random(1))
    assert sorted(id(one) for batch in made for one in batch) == sorted(id(one) for one in rows)
    padded = sum(len(batch) * max(len(one.ids) for one in batch) for batch in made)
    assert padded < 1.15 * sum(len(one.ids) for one in rows)
    assert made != trainer.batches(rows, 8, random.Random(2))


def test_schedules(made):
    def rates(kind, **more):
        config = made(lr_scheduler_type=kind, learning_rate=1.0, **more)
        return [round(trainer.learning_rate(config, step, 10), 4) for step in range(10)]

    assert rates("linear") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates("linear", warmup_ratio=0.2) == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates("cosine", warmup_steps=2)[:3] == [0.5, 1.0, 1.0]
    assert rates("cosine")[5] == 0.5 and rates("cosine")[9] == round(0.5 + 0.5 * math.cos(0.9 * math.pi), 4)
    assert rates("constant", warmup_steps=5) == [1.0] * 10
    assert rates("constant_with_warmup", warmup_steps=2) == [0.5] + [1.0] * 9


def test_total_steps(made):
    config = made(
        max_steps=-1, num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert [trainer.total_steps(config, rows) for rows in (1, 8, 9, 17)] == [3, 3, 6, 9]
    assert trainer.total_steps(made(max_steps=7), 100) == 7
    assert trainer.total_steps(made(max_steps=-1, num_train_epochs=0.01), 100) == 1


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
    left = sorted(one.name for one in (tmp_path / "跑 1").iterdir())
    assert left == ["adapter", "all_results.json", "trainer_log.jsonl", "trainer_state.json"]


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


def test_paged_optimizer_needs_cuda(made):
    with pytest.raises(EdgeError, match="paged_adamw_8bit needs CUDA"):
        finetune.run(made(optim="paged_adamw_8bit"))


def test_liger_is_never_left_out_in_silence(base, made, monkeypatch):
    with pytest.raises(EdgeError, match="enable_liger_kernel: true needs CUDA, training runs on cpu"):
        finetune.run(made(enable_liger_kernel=True))
    place, asked = load_model.Place("cuda", torch.bfloat16, True), []
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(EdgeError, match="needs the package 'liger-kernel'"):
        load_model.use_liger(None, place)
    package = types.ModuleType("liger_kernel.transformers")
    package.monkey_patch = types.SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda *_, **how: asked.append(how),
    )
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    one = types.SimpleNamespace(config=types.SimpleNamespace(model_type="llama"))
    load_model.use_liger(one, place)
    assert asked == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    one.config.model_type = "mamba"
    with pytest.raises(EdgeError, match="does not know mamba"):
        load_model.use_liger(one, place)


def test_place(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    place = load_model.choose_place(made(use_cpu=False))
    assert place.device == "mps" and not place.four_bit and "bitsandbytes" in place.notes[0]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    place = load_model.choose_place(made(bf16=True))
    assert (place.device, place.dtype, place.four_bit) == ("cpu", torch.float32, True)
    assert "bf16 is slow on this CPU" in place.notes[0]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert load_model.choose_place(made(bf16=True)) == load_model.Place("cpu", torch.bfloat16, True)


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


def test_template_of_another_family(made):
    with pytest.raises(UsageError, match="template: llama3 does not fit"):
        finetune.run(made(template="llama3"))
