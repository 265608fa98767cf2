"""Where and how a model is loaded: the device, its types, and layers that are never swapped in silence."""

import importlib.util
import sys
import types

import pytest
import torch

from convert.model import quiet_bitsandbytes
from convert.train import finetune, load_model
from edge.errors import EdgeError
from tests.support.runs import configure


@pytest.fixture
def made(tmp_path, base):
    """Configurations over the toy."""
    return configure(tmp_path, base, quantization_bit=4)


@pytest.mark.slow
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


def test_place(tmp_path, monkeypatch):
    made = configure(tmp_path, tmp_path / "none", quantization_bit=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    place = load_model.choose_place(made(use_cpu=False))
    assert place.device == "mps" and not place.four_bit
    assert "in 4 bits was tried on MPS and failed (" in place.notes[0]
    monkeypatch.setattr(load_model, "tried", lambda device, dtype, bits: "")
    place = load_model.choose_place(made(use_cpu=False))
    assert place.four_bit and place.notes == [
        "a layer of bitsandbytes in 4 bits was tried on MPS and computed what it should"
    ]
    eight = load_model.choose_place(made(use_cpu=False, quantization_bit=8))
    assert eight.eight_bit and not eight.four_bit
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    place = load_model.choose_place(made(bf16=True))
    assert (place.device, place.dtype, place.four_bit) == ("cpu", torch.float32, True)
    assert "bf16 is slow on this CPU" in place.notes[0]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert load_model.choose_place(made(bf16=True)) == load_model.Place("cpu", torch.bfloat16, True)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_is_tried_before_it_is_trusted(bits, monkeypatch, caplog):
    """On the CPU, where it works; with a product that is wrong, and with an operation that is missing."""
    from bitsandbytes import nn

    assert load_model.tried("cpu", torch.float32, bits) == "" and not caplog.records
    kind = nn.Linear4bit if bits == 4 else nn.Linear8bitLt
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: real(self, x) * 1.5)
    assert load_model.tried("cpu", torch.float32, bits) in {f"its output is wrong by {n}%" for n in (50, 51)}

    def missing(self, x):
        raise NotImplementedError("no such operation\n...")

    monkeypatch.setattr(kind, "forward", missing)
    assert load_model.tried("cpu", torch.float32, bits) == "no such operation"


def test_no_kernel_is_fetched_from_a_hub(monkeypatch):
    """The package `kernels` is not imported, though it be installed."""
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    quiet_bitsandbytes.alone()
    assert importlib.util.find_spec("kernels") is None
    with pytest.raises(ImportError):
        import kernels  # noqa: F401
