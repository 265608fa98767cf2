"""What training will take: counted from the real batches, refused where it does not fit."""

import json
from array import array

import pytest
import torch
from rich.console import Console

from convert import data, memory, model
from convert.encode import Sample
from convert.prepare import Prepared
from edge.config import parse
from edge.errors import EdgeError
from tests.toy import make_model

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
    return Prepared(items, [], data.Report(), rows=len(items))


def estimated(base, made, *, four_bit=False, eager=False, **changes):
    place = model.Place("cpu", torch.float32, four_bit)
    return memory.estimate(base, config(base, **changes), made, place, eager=eager)


def test_weights_and_what_is_trained(base):
    """By hand: two layers of 64, an embedding of 384 x 64 that is the head too."""
    layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128
    rest = 384 * 64 + 5 * 64
    whole = estimated(base, rows(20, 30))
    assert whole.weights == 4 * (2 * layer + rest)
    lora = 8 * 2 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert whole.trained == 4 * lora * 4
    small = estimated(base, rows(20, 30), four_bit=True)
    assert small.weights == pytest.approx(4 * rest + 2 * layer * (1 / 2 + (1 + 4 / 256) / 64), abs=64)
    assert estimated(base, rows(20), finetuning_type="full").trained == 16 * (2 * layer + rest)


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
    place = model.Place("cpu", torch.float32, False)
    need = estimated(base, made, **changes).total
    less = estimated(base, made, disable_gradient_checkpointing=False, per_device_train_batch_size=4).total
    monkeypatch.setattr(memory, "free", lambda _: less + 1)
    assert less < need
    with pytest.raises(EdgeError) as caught:
        memory.check(base, config(base, **changes), made, place, eager=False, console=Console(quiet=True))
    said = str(caught.value)
    assert f"needs about {need / 2**30:.2f} GiB" in said and "disable_gradient_checkpointing: false" in said
    said = Console(record=True, width=200)
    memory.check(base, config(base, ignore_memory=True, **changes), made, place, eager=False, console=said)
    assert "GiB free" in said.export_text()
    monkeypatch.setattr(memory, "free", lambda _: 1000)
    with pytest.raises(EdgeError, match="take a smaller model"):
        memory.check(
            base, config(base, quantization_bit=4), made, place, eager=False, console=Console(quiet=True)
        )


def test_the_count_is_that_of_tensors_that_live():
    with memory.Peak() as counted:
        kept = torch.empty(1000, device="meta")
        torch.empty(500, device="meta")
        more = kept.view(10, 100) + 1
        del kept
        last = torch.empty(100, device="meta")
    assert counted.peak == 8000 and counted.live == 4400
    assert json.dumps([more.numel(), last.numel()]) == "[1000, 100]"
