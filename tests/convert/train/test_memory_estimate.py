"""What training will take: from the real batches, near to what was measured, refused where it cannot fit."""

from __future__ import annotations

import weakref
from array import array
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from convert.config import parse
from convert.data import dataset
from convert.data.encode import Pair, Sample
from convert.data.prepare import Prepared
from convert.train import cuda_graphs, load_model, memory_estimate
from edge.errors import EdgeError
from tests.support.matrix import few

# Seconds of models without storage: left out of the quick part.
pytestmark = pytest.mark.slow

CPU = load_model.Place("cpu", torch.float32, False)


def config(base, **changes):
    given = {"model_name_or_path": str(base), "dataset": "d", "output_dir": "o", "num_train_epochs": 1}
    return parse(
        {**given, "disable_gradient_checkpointing": True, "per_device_train_batch_size": 2, **changes}
    )


def sample(length):
    return Sample(f"r{length}", array("i", [5] * length), ((length // 2, length),))


def rows(*sizes):
    return Prepared([sample(size) for size in sizes], [], dataset.Report(), rows=len(sizes))


def estimated(base, data, *, four_bit=False, shards=1, **changes):
    place = load_model.Place("cpu", torch.float32, four_bit)
    return memory_estimate.estimate(base, config(base, **changes), data, place, shards=shards)


def test_weights_and_what_is_trained(base):
    """By hand: two layers of 64, an embedding of 384 x 64 that is the head too."""
    layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128
    rest = 384 * 64 + 5 * 64
    whole = estimated(base, rows(20, 30))
    assert whole.weights == 4 * (2 * layer + rest)
    lora = 8 * 2 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert whole.trained == 3 * lora * 4  # Adam has two numbers beside each
    small = estimated(base, rows(20, 30), four_bit=True)
    assert small.weights == pytest.approx(4 * rest + 2 * layer * (1 / 2 + (1 + 4 / 256) / 64), abs=64)
    full = estimated(base, rows(20), finetuning_type="full")
    assert (full.weights, full.trained) == (0, 12 * (2 * layer + rest))
    # Sharded over four processes: a part of both layers, with their two norms, and one that is gathered.
    sharded = estimated(base, rows(20), shards=4).weights
    assert sharded == pytest.approx(4 * (rest - 4 * 64) + (2 / 4 + 1) * 4 * (layer + 2 * 64), abs=64)


def test_passes_follow_the_longest_rows(base):
    """One long row decides, as it does when training comes to it."""
    short, one_long = rows(*[20] * 99), rows(*[20] * 99, 400)
    assert estimated(base, one_long).passes > 3 * estimated(base, short).passes
    # All weights are trained on padded rows.
    full = [estimated(base, data, finetuning_type="full").passes for data in (short, one_long)]
    assert full[1] > 8 * full[0]
    kept = estimated(base, one_long).passes
    assert estimated(base, one_long, disable_gradient_checkpointing=False).passes < 0.7 * kept
    held = Prepared(short.train, one_long.train, dataset.Report(), rows=99)
    assert estimated(base, held).passes > 2 * estimated(base, short).passes
    # All weights are trained with eager attention up to 512 tokens: squares of the length; else none.
    for how, squares in (("full", True), ("lora", False)):
        near = [estimated(base, rows(length), finetuning_type=how).passes for length in (200, 400)]
        far = [estimated(base, rows(length), finetuning_type=how).passes for length in (600, 1200)]
        assert (near[1] / near[0] > 3) == squares and far[1] / far[0] == pytest.approx(2, rel=0.1)


def test_t12_refused_before_the_first_step_with_what_fits(base, monkeypatch):
    data, changes = rows(*[20] * 99, 400), {"per_device_train_batch_size": 8}
    need = estimated(base, data, **changes).total
    less = estimated(base, data, disable_gradient_checkpointing=False, per_device_train_batch_size=4).total
    monkeypatch.setattr(memory_estimate, "free", lambda _: less + 1)
    assert less < need

    def check(console=None, **more):
        memory_estimate.check(base, config(base, **more), data, CPU, console=console or Console(quiet=True))

    with pytest.raises(EdgeError) as caught:
        check(**changes)
    message = str(caught.value)
    assert f"needs about {need / 2**30:.2f} GiB" in message
    assert "disable_gradient_checkpointing: false" in message
    assert estimated(base, data, **changes_of(message, changes)).total <= less + 1
    console = Console(record=True, width=200)
    check(console, ignore_memory=True, **changes)
    assert "GiB free" in console.export_text()
    monkeypatch.setattr(memory_estimate, "free", lambda _: 1000)
    with pytest.raises(EdgeError, match="take a smaller model"):
        check(quantization_bit=4)
    with pytest.raises(EdgeError, match="quantization_bit: 4 needs a quarter"):
        check()


def test_weights_in_4_bits_are_dequantised_once_where_that_leaves_room(base, monkeypatch):
    data, bytes_once = rows(20, 30), 4 * 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    before = estimated(base, data, four_bit=True, quantization_bit=4)

    def kept(room, *, dtype=torch.float32, alone=True, **changes):
        monkeypatch.setattr(memory_estimate, "free", lambda _: room)
        console, place = Console(record=True, width=200), load_model.Place("cpu", dtype, True)
        setting = config(base, quantization_bit=4, **changes)
        need = memory_estimate.check(base, setting, data, place, console=console, alone=alone)
        assert ("dequantised once" in console.export_text()) == (need.kept > 0)
        return need

    needs = [kept(before.total + 2 * bytes_once), kept(before.total + 2 * bytes_once - 1)]
    assert [need.kept for need in needs] == [bytes_once, 0]
    assert [need.total - before.total for need in needs] == [bytes_once, 0]
    # What is not computed with in place has no use of them; several processes share the memory.
    much = 10 * before.total
    assert kept(much).kept == bytes_once
    others = [kept(much, alone=False), kept(much, dtype=torch.bfloat16), kept(much, lora_dropout=0.5)]
    assert [need.kept for need in (*others, kept(much, flash_attn="disabled"))] == [0] * 4


def changes_of(message, changes):
    """The settings that a refusal proposes."""
    words = message.split("this fits: ")[1].split(";")[0]
    pairs = [pair.split(": ") for pair in words.split(", ")]
    return changes | {
        key: value == "true" if value in ("true", "false") else int(value) for key, value in pairs
    }


def test_shorter_rows_are_proposed_where_one_alone_is_too_much(base, monkeypatch):
    data = rows(*[20] * 3, 2000)
    changes = {"per_device_train_batch_size": 1, "disable_gradient_checkpointing": False}
    room = estimated(base, rows(20, 20, 20, 300), **changes).total
    monkeypatch.setattr(memory_estimate, "free", lambda _: room)
    with pytest.raises(EdgeError, match="this fits: cutoff_len: 256"):
        memory_estimate.check(base, config(base, **changes), data, CPU, console=Console(quiet=True))


# Measured on an H100: QLoRA of rank 16 on seven projections, checkpointing, paged AdamW in 8 bits, computing
# in bf16, each in a process of its own: (batch, length): GiB with padded rows and peft's layers, and with
# padding-free rows and fused layers.
SHAPES = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
PEAKS = [
    ("1.5B", 1, 1024, 1.54, 1.50),
    ("1.5B", 4, 1024, 2.13, 2.13),
    ("1.5B", 8, 2048, 4.67, 4.68),
    ("7B", 1, 1024, 5.09, 5.09),
    ("7B", 1, 2048, 5.53, 5.53),
    ("7B", 4, 1024, 6.42, 6.42),
]


@pytest.mark.parametrize(("shape", "batch", "length", "padded", "packed"), PEAKS)
def test_measured_peaks_of_a_gpu(tmp_path, monkeypatch, shape, batch, length, padded, packed):
    from transformers import Qwen2Config

    Qwen2Config(
        **SHAPES[shape], num_hidden_layers=28, vocab_size=151936, tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    data = rows(*[length] * batch)
    for item in data.train:
        object.__setattr__(item, "spans", ((1, length),))  # the measured rows were learnt from end to end
    changes = {
        "quantization_bit": 4, "lora_rank": 16, "optim": "paged_adamw_8bit", "max_steps": 1,
        "per_device_train_batch_size": batch, "disable_gradient_checkpointing": False,
    }  # fmt: skip
    place = load_model.Place("cuda", torch.bfloat16, True)
    monkeypatch.setattr(cuda_graphs, "register", lambda: None)
    for is_packed, measured in ((False, padded), (True, packed)):
        monkeypatch.setattr(cuda_graphs, "likely", lambda *_, answer=is_packed: answer)
        need = memory_estimate.estimate(tmp_path, config(tmp_path, **changes), data, place)
        assert need.total / 2**30 == pytest.approx(measured, rel=0.05), (is_packed, str(need))


def test_what_later_steps_bring_does_not_count(base):
    data = rows(*[20] * 8, 400)
    first = estimated(base, data, disable_shuffling=True, max_steps=1).passes
    assert estimated(base, data, disable_shuffling=True).passes > 5 * first


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and the most that lived at once."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.live = self.peak = 0
        there = (*model.parameters(), *model.buffers())
        self._known: dict[int, Any] = {one.untyped_storage()._cdata: one for one in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(8, 100), (2, 400), (4, 600)])
@pytest.mark.parametrize("kind", few(["lora", "dpo", "full"], ["lora"]))
def test_tensors_that_live_in_a_real_step(base, checkpoints, batch, length, kind):
    """Eager attention and torch's own, rows and pairs, an adapter and every weight."""
    how = {"lora": {}, "dpo": {"stage": "dpo"}, "full": {"finetuning_type": "full"}}[kind]
    setting = config(
        base, disable_gradient_checkpointing=not checkpoints, per_device_train_batch_size=batch, **how
    )
    items = [sample(length)] * batch
    if kind == "dpo":
        items = [Pair("p", one, one) for one in items]
    data = Prepared(items, [], dataset.Report(), rows=batch)
    name = cuda_graphs.attention_name(setting, CPU, longest=length)
    model = load_model.load_model(base, CPU, attention=name)
    model = (load_model.unfreeze if kind == "full" else load_model.add_adapter)(model, setting).train()
    head, _ = cuda_graphs.head(model, setting, CPU)
    with Peak(model) as counted:
        for one in model.parameters():
            one.grad = torch.zeros_like(one) if one.requires_grad else None
        samples = [
            half for one in items for half in ((one.chosen, one.rejected) if kind == "dpo" else (one,))
        ]
        head(samples, "cpu")[0].sum().backward()
    need = memory_estimate.estimate(base, setting, data, CPU)
    assert need.passes == pytest.approx(counted.peak, rel=0.15), (need.passes / counted.peak, str(need))
