"""The weights that training saw, and shards: made some rows at a time, the same as made at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convert.model import dequantized_base, safetensors_io
from convert.model.dequantized_base import DTYPES, DequantizedBase, spans
from convert.model.hf_folder import check_folder, check_safetensors
from convert.model.safetensors_io import Part
from convert.train.load_model import Place, load_model, quantized_layers
from tests.support.toy import make_model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
def test_rows_are_what_bitsandbytes_gives(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, double: bool
) -> None:
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

    monkeypatch.setattr(dequantized_base, "CHUNK", 5000)
    settings = {"quantized": ["l.*.q"], "compute_dtype": str(dtype)[6:], "double_quantization": double}
    model = DequantizedBase(settings)
    torch.manual_seed(0)
    weight = (torch.randn(300, 192) * torch.logspace(-6, 1, 300)[:, None]).to(dtype)
    weight[3] = 0
    # Values on the very bounds between two codes.
    code = get_4bit_type("nf4", device="cpu")
    weight[4, :15] = ((code[:-1] + code[1:]) / 2).to(dtype)
    weight[4, 15] = 1
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    whole = dequantize_4bit(packed, state)
    assert torch.equal(model("l.7.q.weight", weight), whole)
    rows = model.rows("l.7.q.weight", weight)
    assert torch.equal(rows(17, 40), whole[17:40]) and rows(17, 40).dtype == dtype
    assert len(list(spans(weight.shape))) == 12
    # Rows that are no multiple of a block, and what was not held in 4 bits.
    narrow = weight[:, :96].contiguous()
    packed, state = quantize_4bit(narrow, blocksize=64, compress_statistics=double, quant_type="nf4")
    assert torch.equal(model.rows("l.7.q.weight", narrow)(5, 9), dequantize_4bit(packed, state)[5:9])
    assert torch.equal(model("l.7.k.weight", weight), weight)


def test_shards_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 3).to(torch.bfloat16),
        "长": torch.randn(7).half(),
        "c.weight": torch.randn(4, 6),
        "ids": torch.arange(3),
        "none": torch.zeros(0, 4),
    }
    parts = [Part(name, tuple(one.shape), one.dtype) for name, one in tensors.items()]

    def write(folder: Path, **how: int) -> dict[str, torch.Tensor]:
        folder.mkdir()
        safetensors_io.write(folder, parts, lambda part: (row[None] for row in tensors[part.name]), **how)
        found = {}
        for path in folder.glob("*.safetensors"):
            check_safetensors(path)
            found |= load_file(path)
        return found

    whole = write(tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    split = write(tmp_path / "several", largest=50)
    for found in (whole, split):
        assert found.keys() == tensors.keys()
        assert all(
            torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in tensors.items()
        )
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "several" / name).write_text('{"model_type": "x"}', encoding="utf-8")
    names = [path.name for path in check_folder(tmp_path / "several").weights]
    assert names == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_a_tensor_that_is_not_whole_is_never_published(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="more or fewer rows"):
        safetensors_io.write(tmp_path, [Part("a", (2, 2), torch.float32)], lambda _: [torch.zeros(1, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_are_those_of_the_layers_that_training_saw(tmp_path: Path, dtype: str) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    base = make_model(tmp_path / "m")
    kind = DTYPES[dtype]
    model = load_model(base, Place("cpu", kind, False, eight_bit=True))
    names = quantized_layers(model)
    assert len(names) == 7 and all("*" in name for name in names)
    dequantised = DequantizedBase({"compute_dtype": dtype, "quantized": names, "quantization_bit": 8})
    stored = load_file(base / "model.safetensors")
    changed = 0
    for name, weight in stored.items():
        mine = dequantised(name, weight)
        assert mine.dtype == kind
        if dequantised.holds(name):
            data = model.get_parameter(name)
            theirs = int8_vectorwise_dequant(data.data, data.SCB).to(kind)
            assert torch.equal(mine, theirs), name
            changed += not torch.equal(mine, weight.to(kind))
        else:
            assert torch.equal(mine, weight.to(kind))
    assert changed == 14
