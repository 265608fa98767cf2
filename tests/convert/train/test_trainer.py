"""The training loop: right gradients in 4 bits, weighted by tokens, and a stop at the first bad number."""

import math
import random

import pytest
import torch
from rich.console import Console

from convert.train import finetune, trainer
from convert.train.losses import LossHead
from edge.errors import EdgeError
from tests.support.runs import configure
from tests.support.toy import make_model
from tests.support.training import adapted, gradients, logits, plain, sample

# Seconds of training: left out of the quick part.
pytestmark = pytest.mark.slow


@pytest.fixture
def made(tmp_path, base):
    """Configurations over the toy."""
    return configure(tmp_path, base, quantization_bit=4, learning_rate=1e-2, max_steps=6, save_strategy="no")


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


def test_paged_optimizer_needs_cuda(made):
    with pytest.raises(EdgeError, match="paged_adamw_8bit needs CUDA"):
        finetune.run(made(optim="paged_adamw_8bit"))


def test_neftune_is_noise_in_training_alone(base, made):
    config = made(neftune_noise_alpha=5.0)
    one = plain(base)
    runner = trainer.Loop(one, [sample(9, seed=1)], config, device="cpu", dtype=torch.float32)
    remove = runner._noise()
    quiet_ = logits(one.eval())
    assert torch.equal(quiet_, logits(one.eval())) and not torch.equal(quiet_, logits(one.train()))
    width = one.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    one.eval()
    bound = 5 / math.sqrt(3 * width.shape[2])
    assert 0 < (width - one.get_input_embeddings()(torch.tensor([[1, 2, 3]]))).abs().max() <= bound
    remove()
    assert torch.equal(quiet_, logits(one.train()))


def test_one_bad_row_is_named_in_a_preference_too(made, monkeypatch):
    def broken(self, batch, device):
        return torch.full((len(batch),), math.nan, requires_grad=True), torch.ones(len(batch))

    monkeypatch.setattr(LossHead, "sums", broken)
    config = made(stage="dpo", dataset="p", pref_loss="simpo")
    with pytest.raises(EdgeError, match=r"step 1: the loss is nan in .* \(rows: p, row"):
        finetune.run(config, console=Console(quiet=True))
