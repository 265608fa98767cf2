"""What training will take: counted from the real batches, refused where it does not fit."""

import json
from array import array

import pytest
import torch
from rich.console import Console

from convert.config import parse
from convert.data import dataset
from convert.data.encode import Sample
from convert.data.prepare import Prepared
from convert.train import load_model, memory_estimate
from edge.errors import EdgeError
from tests.support.toy import make_model

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "m")


def config(base, **changes):
    given = {"model_name_or_path": str(base), "dataset": "d", "output_dir": "o", "num_train_epochs": 1}
    return parse(
        {**given, "disable_gradient_checkpointing": True, "per_device_train_batch_size": 2, **changes}
    )


def rows(*sizes):
    items = [Sample(f"r{n}", array("i", [5] * n), ((n // 2, n),)) for n in sizes]
    return Prepared(items, [], dataset.Report(), rows=len(items))


def estimated(base, made, *, four_bit=False, eager=False, shards=1, **changes):
    place = load_model.Place("cpu", torch.float32, four_bit)
    return memory_estimate.estimate(base, config(base, **changes), made, place, eager=eager, shards=shards)


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
    assert estimated(base, rows(20), finetuning_type="full").trained == 12 * (2 * layer + rest)
    # Spread over four processes: a part of both layers, with their two norms, and one that is gathered.
    spread = estimated(base, rows(20), shards=4).weights
    assert spread == pytest.approx(4 * (rest - 4 * 64) + (2 / 4 + 1) * 4 * (layer + 2 * 64), abs=64)


def test_passes_follow_the_longest_rows(base):
    """One long row decides, as it does when training comes to it."""
    short, one_long = rows(*[20] * 99), rows(*[20] * 99, 400)
    assert estimated(base, one_long).passes > 8 * estimated(base, short).passes
    kept = estimated(base, one_long).passes
    assert estimated(base, one_long, disable_gradient_checkpointing=False).passes < 0.7 * kept
    eager = [estimated(base, rows(n), eager=True).passes for n in (200, 400)]
    fused = [estimated(base, rows(n)).passes for n in (200, 400)]
    assert eager[1] / eager[0] > 3 and fused[1] / fused[0] == pytest.approx(2, rel=0.1)


def test_t12_refused_before_the_first_step_with_what_fits(base, monkeypatch):
    made, changes = rows(*[20] * 99, 400), {"per_device_train_batch_size": 8}
    place = load_model.Place("cpu", torch.float32, False)
    need = estimated(base, made, **changes).total
    less = estimated(base, made, disable_gradient_checkpointing=False, per_device_train_batch_size=4).total
    monkeypatch.setattr(memory_estimate, "free", lambda _: less + 1)
    assert less < need
    with pytest.raises(EdgeError) as caught:
        memory_estimate.check(
            base, config(base, **changes), made, place, eager=False, console=Console(quiet=True)
        )
    said = str(caught.value)
    assert f"needs about {need / 2**30:.2f} GiB" in said and "disable_gradient_checkpointing: false" in said
    said = Console(record=True, width=200)
    memory_estimate.check(
        base, config(base, ignore_memory=True, **changes), made, place, eager=False, console=said
    )
    assert "GiB free" in said.export_text()
    monkeypatch.setattr(memory_estimate, "free", lambda _: 1000)
    with pytest.raises(EdgeError, match="take a smaller model"):
        memory_estimate.check(
            base, config(base, quantization_bit=4), made, place, eager=False, console=Console(quiet=True)
        )


# Measured on an H100: QLoRA of rank 16 on seven projections, checkpointing, paged AdamW in 8 bits, computing
# in bf16, each in a process of its own: (batch, length): GiB with padded rows and peft's layers, and with
# rows joined by `convert.train.cuda_graphs`.
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


@pytest.mark.parametrize(("shape", "batch", "length", "padded", "joined"), PEAKS)
def test_measured_peaks_of_a_card(tmp_path, shape, batch, length, padded, joined):
    from transformers import Qwen2Config

    Qwen2Config(
        **SHAPES[shape], num_hidden_layers=28, vocab_size=151936, tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    made = rows(*[length] * batch)
    for item in made.train:
        object.__setattr__(item, "spans", ((1, length),))  # the measured rows were learnt from end to end
    changes = {
        "quantization_bit": 4, "lora_rank": 16, "optim": "paged_adamw_8bit", "max_steps": 1,
        "per_device_train_batch_size": batch, "disable_gradient_checkpointing": False,
    }  # fmt: skip
    place = load_model.Place("cuda", torch.bfloat16, True)
    for how, want in ((False, padded), (True, joined)):
        found = memory_estimate.estimate(
            tmp_path, config(tmp_path, **changes), made, place, eager=False, joined=how
        )
        assert found.total / 2**30 == pytest.approx(want, rel=0.03), (how, str(found))


def test_what_later_steps_bring_does_not_count(base):
    made = rows(*[20] * 8, 400)
    first = estimated(base, made, disable_shuffling=True, max_steps=1).passes
    assert estimated(base, made, disable_shuffling=True).passes > 5 * first


def test_a_view_of_what_was_there_is_not_counted():
    there = torch.empty(1000, device="meta")
    with memory_estimate.Peak([there]) as counted:
        there.t()
        there.view(10, 100).t() + 1
    assert counted.peak == 4000


def test_the_count_is_that_of_tensors_that_live():
    with memory_estimate.Peak() as counted:
        kept = torch.empty(1000, device="meta")
        torch.empty(500, device="meta")
        more = kept.view(10, 100) + 1
        del kept
        last = torch.empty(100, device="meta")
    assert counted.peak == 8000 and counted.live == 4400
    assert json.dumps([more.numel(), last.numel()]) == "[1000, 100]"
