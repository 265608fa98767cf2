"""Rows joined without padding: the same losses and gradients as padded ones, recorded or not."""

from __future__ import annotations

import dataclasses
import functools
from array import array
from typing import Any
from unittest import mock

import pytest
import torch

from convert.config import TrainConfig, parse
from convert.data.encode import Sample
from convert.train import cuda_graphs, fused_kernels, load_model, trainer
from convert.train.losses import LossHead

# Seconds of passes through small models: left out of the quick part.
pytestmark = pytest.mark.slow

VOCABULARY = 600


def config(**changes: Any) -> TrainConfig:
    given = {
        "model_name_or_path": "base", "template": "qwen", "dataset": "d", "output_dir": "run", "lora_rank": 8,
        "quantization_bit": 4, "disable_gradient_checkpointing": False, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "max_steps": 12, "learning_rate": 1e-3,
    }  # fmt: skip
    return parse(given | changes)


def sample(length: int, *, at: int = 0, starts: tuple[int, ...] = (0,)) -> Sample:
    draw = torch.Generator().manual_seed(1000 * at + length)
    ids = array("l", torch.randint(0, VOCABULARY, (length,), generator=draw).tolist())
    ends = [*starts[1:], length]
    spans = tuple((start + (end - start) // 3 + 1, end) for start, end in zip(starts, ends, strict=True))
    return Sample(f"row {at}", ids, spans, starts, at)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    folder = tmp_path_factory.mktemp("packed") / "基"
    torch.manual_seed(0)
    shape = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(folder)
    return folder


class Alone:
    """Hidden states of each row by itself, as the body that joins them must give."""

    def __init__(self, whole: Any) -> None:
        self._decoder = whole.get_base_model().model

    def __call__(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        pieces = ids.split(lengths)
        return torch.cat([self._decoder(input_ids=one[None]).last_hidden_state[0] for one in pieces])


class Tokens:
    """Counts the tokens that the first layer computes, padding too."""

    def __init__(self, adapted: Any) -> None:
        self._layer, self.seen = adapted.get_base_model().model.layers[0], 0

    def __enter__(self) -> Tokens:
        self._hook = self._layer.register_forward_pre_hook(self._count)
        return self

    def _count(self, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.seen += inputs[0].shape[0] * inputs[0].shape[1]

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def gradients(adapted: Any) -> torch.Tensor:
    return torch.cat([one.grad.flatten().float() for one in adapted.parameters() if one.requires_grad])


def adapter(base: Any, place: load_model.Place, setting: TrainConfig, attention: str = "sdpa") -> Any:
    adapted = load_model.add_adapter(load_model.load_model(base, place, attention=attention), setting).train()
    torch.manual_seed(3)
    for name, one in adapted.named_parameters():
        if "lora_B" in name:  # at zero it would hide all behind it
            one.data = torch.randn(one.shape).mul(0.05).to(one.device)
    return adapted


BATCHES = {
    "rows": [sample(5), sample(70, at=1), sample(33, at=2)],
    "packed": [sample(60, starts=(0, 20, 41)), sample(44, at=1, starts=(0, 10))],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_joined_rows_have_the_losses_and_gradients_of_padded_ones(base: Any, kind: str) -> None:
    place = load_model.Place("cpu", torch.float32, False)
    adapted = adapter(base, place, config(quantization_bit=None))
    found = []
    for body in (None, Alone(adapted)):
        adapted.zero_grad()
        losses, rows = LossHead(adapted, body=body)(BATCHES[kind], "cpu")
        losses.mean().backward()
        found.append((losses.detach(), rows, gradients(adapted)))
    (padded, rows, slope), (joined, same, other) = found
    assert torch.equal(rows, same)
    torch.testing.assert_close(joined, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, slope, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("bits", [None, 4])
def test_rows_on_a_cpu_are_joined_too(base: Any, kind: str, bits: int | None) -> None:
    place, setting = load_model.Place("cpu", torch.float32, bits == 4), config(quantization_bit=bits)
    name = cuda_graphs.attention_name(setting, place, longest=70)
    assert name == cuda_graphs.ATTENTION
    adapted = adapter(base, place, setting, name)
    found = []
    for padded in (True, False):
        head = LossHead(adapted) if padded else cuda_graphs.head(adapted, setting, place)[0]
        adapted.zero_grad()
        with Tokens(adapted) as tokens:
            losses, rows = head(BATCHES[kind], "cpu")
        losses.mean().backward()
        found.append((losses.detach(), rows, gradients(adapted), tokens.seen))
    (want, rows, slope, many), (losses, same, other, few) = found
    assert few == sum(len(one.ids) for one in BATCHES[kind]) < many
    assert torch.equal(rows, same)
    torch.testing.assert_close(losses, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, slope, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"flash_attn": "disabled"}, {"finetuning_type": "full"}], ids=str)
def test_what_is_padded_on_a_cpu_has_an_attention_for_it(changes: dict[str, Any]) -> None:
    place, setting = load_model.Place("cpu", torch.float32, False), config(quantization_bit=None, **changes)
    assert cuda_graphs.attention_name(setting, place, longest=512) == "eager"
    assert cuda_graphs.attention_name(setting, place, longest=513) == (
        "eager" if "flash_attn" in changes else "sdpa"
    )


@pytest.mark.parametrize("window", [None, 7])
def test_no_token_sees_another_row_or_beyond_its_window(window: int | None) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 5, 25, 26])
    query, key, value = torch.randn(1, 4, 26, 8), torch.randn(1, 2, 26, 8), torch.randn(1, 2, 26, 8)
    row = torch.bucketize(torch.arange(26), bounds[1:], right=True)
    back = torch.arange(26)[:, None] - torch.arange(26)
    seen = (row[:, None] == row) & (back >= 0) & (back < (window or 26))
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=True, scale=0.3
    )
    more = {"cu_seq_lens_q": bounds, "max_length_q": 26, "scaling": 0.3, "sliding_window": window}
    out, _ = cuda_graphs.attention(None, query, key, value, None, **more)
    torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_few_sizes_and_little_padding() -> None:
    sizes = {cuda_graphs.size(tokens) for tokens in range(1, 8193)}
    assert len(sizes) < 80
    for tokens in range(300, 8193):
        assert tokens <= cuda_graphs.size(tokens) < tokens * 1.13


@pytest.mark.parametrize(("bits", "keep"), [(None, False), (4, False), (4, True)])
@pytest.mark.parametrize("rank", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}])
def test_fused_layers_are_pefts(base: Any, bits: int | None, keep: bool, rank: dict[str, Any]) -> None:
    setting = config(quantization_bit=bits, **rank)
    adapted = adapter(base, load_model.Place("cpu", torch.float32, bits == 4), setting)
    found = []
    for step in range(2):
        if step:
            fused_kernels.fuse(adapted, keep=keep)
        adapted.zero_grad()
        torch.manual_seed(0)
        losses, _ = LossHead(adapted)(BATCHES["rows"], "cpu")
        losses.mean().backward()
        found.append((losses.detach(), gradients(adapted)))
    (want, slope), (losses, other) = found
    torch.testing.assert_close(losses, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other, slope, atol=1e-5, rtol=1e-3)
    layer = adapted.get_base_model().model.layers[0]
    took = [isinstance(one.forward, functools.partial) for one in (layer.mlp.up_proj, layer.input_layernorm)]
    assert took == ["use_dora" not in rank and "lora_dropout" not in rank, True]


def test_kept_weights_are_dequantised_no_more(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place, setting = load_model.Place("cpu", torch.float32, True), config()
    adapted = adapter(base, place, setting, cuda_graphs.attention_name(setting, place, longest=70))
    asked = []
    dequantised = fused_kernels._dequantised
    monkeypatch.setattr(fused_kernels, "_dequantised", lambda one: asked.append(one) or dequantised(one))
    head, _ = cuda_graphs.head(adapted, setting, place, keep=True)
    assert len(asked) == 3 * 7
    losses, _ = head(BATCHES["rows"], "cpu")
    losses.mean().backward()
    assert len(asked) == 3 * 7


def test_what_is_said_to_be_kept_is_kept_where_rows_are_padded_too(base: Any) -> None:
    """Whether rows can be joined shows only when the model is there, after its memory was estimated."""
    place, setting = load_model.Place("cpu", torch.float32, True), config()
    adapted = adapter(base, place, setting, cuda_graphs.attention_name(setting, place, longest=70))
    adapted.config.attn_logit_softcapping = 50.0
    assert cuda_graphs.usable(adapted, setting, place)
    cuda_graphs.head(adapted, setting, place, keep=True)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    assert layer.forward.args[-1].kept is not None


def test_a_norm_of_another_kind_stays(base: Any) -> None:
    adapted = adapter(base, load_model.Place("cpu", torch.float32, False), config(quantization_bit=None))
    norm = adapted.get_base_model().model.norm
    norm.forward = lambda x: x * (1 + norm.weight)
    before = norm.forward
    fused_kernels.fuse(adapted)
    assert norm.forward is before


# -- on a card ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")


def on_card(base: Any, setting: TrainConfig) -> tuple[Any, load_model.Place]:
    place = load_model.Place("cuda", torch.bfloat16, setting.quantization_bit == 4)
    cuda_graphs.register()
    return adapter(base, place, setting, cuda_graphs.ATTENTION), place


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("kind", BATCHES)
def test_recorded_passes_give_what_padded_rows_do(base: Any, kind: str) -> None:
    setting = config()
    adapted, place = on_card(base, setting)
    whole = trainer.flattened([one for one in adapted.parameters() if one.requires_grad])[0]
    with cuda_graphs.own_stream(place):
        head, said = cuda_graphs.head(adapted, setting, place)
        assert "rows are padding-free, passes are captured" in said
        assert adapted.get_input_embeddings().weight.device.type == "cpu"
        plain = LossHead(adapted, autocast=load_model.autocast(setting, place))
        found = []
        # As they come, recorded, replayed; a batch of another size between writes over what is not kept.
        for one in (plain, head, head, head, head):
            whole.grad.zero_()
            losses, _ = one(BATCHES[kind], "cuda")
            losses.mean().backward()
            found.append((losses.detach().clone(), whole.grad.clone()))
            if one is head:
                other, _ = head([sample(200, at=7)], "cuda")
                other.mean().backward()
    for losses, slope in found[1:]:
        torch.testing.assert_close(losses, found[0][0], atol=0.05, rtol=0.02)
        assert torch.nn.functional.cosine_similarity(slope, found[0][1], 0) > 0.995
    for losses, slope in found[2:]:
        torch.testing.assert_close(losses, found[1][0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(slope, found[1][1], atol=1e-3, rtol=5e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_a_run_goes_the_way_of_one_that_is_not_recorded(base: Any, optim: str) -> None:
    rows = [sample(length, at=at) for at, length in enumerate([20, 31, 45, 60, 90, 130] * 4)]
    ways = []
    for record in (False, True):
        setting = config(optim=optim)
        adapted, place = on_card(base, setting)
        losses: list[float] = []
        with cuda_graphs.own_stream(place):
            if record:
                head, _ = cuda_graphs.head(adapted, setting, place)
            else:
                body = cuda_graphs.Body(
                    adapted, "cuda", autocast=load_model.autocast(setting, place), capture=False
                )
                head = LossHead(adapted, autocast=load_model.autocast(setting, place), body=body)
            runner = trainer.Loop(adapted, rows, setting, device="cuda", dtype=place.dtype, objective=head)
            runner.run(lambda state, losses=losses: losses.append(state.loss))
        ways.append(losses)
    assert ways[1] == pytest.approx(ways[0], rel=0.01)
    assert ways[0][-1] < ways[0][0]


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
def test_a_paged_optimizers_step_comes_after_what_was_begun_before_it() -> None:
    """bitsandbytes launches it on the default stream, which waits for no other by itself."""
    found, setting, objective = [], config(optim="paged_adamw_8bit"), mock.Mock()
    how = {"device": "cuda", "dtype": torch.bfloat16, "objective": objective}
    for late in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(512, 512, device="cuda")
        with cuda_graphs.own_stream(load_model.Place("cuda", torch.bfloat16, True)):
            runner = trainer.Loop(layer, [sample(20)], setting, **how)
            for slope in (1.0, -2.0, 3.0):
                if late:
                    torch.cuda._sleep(10**8)  # cycles
                for one in runner.parameters:
                    one.grad.copy_(torch.linspace(-slope, slope, one.numel(), device="cuda"))
                if not late:
                    torch.cuda.synchronize()
                runner.optimizer.step()
            found.append([one.detach().clone() for one in runner.parameters])
    for late, want in zip(*reversed(found), strict=True):
        assert torch.equal(late, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
def test_liger_is_left_out_where_its_kernels_would_be_slower_and_taken_elsewhere(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(cuda_graphs, "use_liger", lambda *given: asked.append(given))
    setting = config(enable_liger_kernel=True)
    adapted, place = on_card(base, setting)
    with cuda_graphs.own_stream(place):
        assert "in place of liger-kernel's layers" in cuda_graphs.head(adapted, setting, place)[1]
    assert not asked
    setting = dataclasses.replace(setting, neftune_noise_alpha=5.0)
    assert "padded" in cuda_graphs.head(adapted, setting, place)[1]
    assert asked == [(adapted, place)]


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
def test_dropout_is_not_recorded_and_answers_come_from_the_same_model(base: Any) -> None:
    setting = config(lora_dropout=0.1)
    adapted, place = on_card(base, setting)
    head, said = cuda_graphs.head(adapted, setting, place)
    assert "launched one by one: dropout" in said
    head(BATCHES["rows"], "cuda")[0].mean().backward()
    adapted.eval()
    ids = torch.tensor([list(sample(30).ids)], device="cuda")
    # Left padding, as batches of questions have.
    padded = torch.nn.functional.pad(ids, (6, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (6, 0))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        alone = adapted(input_ids=ids).logits[0, -1]
        beside = adapted(input_ids=padded, attention_mask=mask).logits[0, -1]
        made = adapted.generate(input_ids=padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(beside, alone, atol=0.1, rtol=0.05)
    assert made.shape == (1, 40)
    setting = dataclasses.replace(setting, neftune_noise_alpha=5.0)
    assert "neftune" in cuda_graphs.head(adapted, setting, place)[1]
