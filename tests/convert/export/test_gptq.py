"""GPTQ: where codes lie in a file, what is chosen, and families whose files come out closer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from convert.export import gguf, gptq
from edge.artefact import manifest
from edge.artefact.gguf_header import read_header
from edge.errors import InputError, UsageError
from tests.convert.model.test_families import quiet
from tests.support.families import make_family, make_run
from tests.support.matrix import few


def random_blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Blocks of a type with codes and scales at random; halves that are scales lie in front."""
    layout = gptq.LAYOUTS[kind]
    chance = np.random.default_rng(len(kind) * layout.size)
    data = chance.integers(0, 256, (rows, columns // layout.block, layout.size), np.uint8)
    halves = 1 if kind.endswith("_0") else 2
    scales = chance.uniform(0.01, 0.1, (*data.shape[:2], halves)).astype(np.float16)
    data[..., : 2 * halves] = scales.view(np.uint8)
    if layout.block > 32:
        data[..., 4:16] |= 1  # no scale is 0
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", gptq.LAYOUTS)
def test_codes_lie_where_llama_cpp_has_them(kind: str) -> None:
    data = random_blocks(kind, 3, 512)
    tensor = gptq._Tensor(data.copy(), kind, np.array([1, 2, 0]))
    scale, lowest = tensor.grid()
    assert scale.shape == lowest.shape == (3, 16)
    top = gptq.LAYOUTS[kind].top
    codes = torch.from_numpy(np.random.default_rng(1).integers(0, top + 1, (3, 512), np.uint8))
    tensor.write(codes)
    assert torch.allclose(tensor.values(), values(codes, scale, lowest), rtol=1e-5, atol=1e-5)
    # In the file a row is where it was; the codes that were there, read back, give the same bytes.
    there = dequantize(tensor._file, GGMLQuantizationType[kind])
    assert np.array_equal(there, tensor.values().numpy()[[1, 2, 0]])
    own = dequantize(data, GGMLQuantizationType[kind])
    back = np.rint(
        (own - np.repeat(lowest.numpy()[[1, 2, 0]], 32, 1)) / np.repeat(scale.numpy()[[1, 2, 0]], 32, 1)
    )
    assert np.array_equal(gptq.LAYOUTS[kind].put(back.astype(np.uint8), data), data)


def grid_of(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = weights.view(len(weights), -1, 32)
    lowest, highest = blocks.amin(2), blocks.amax(2)
    return (highest - lowest) / 15, lowest, torch.full((len(weights),), 15)


def values(codes: torch.Tensor, scale: torch.Tensor, lowest: torch.Tensor) -> torch.Tensor:
    return lowest.repeat_interleave(32, 1) + scale.repeat_interleave(32, 1) * codes


@pytest.mark.slow
def test_columns_that_go_together_make_up_for_one_another() -> None:
    chance = torch.Generator().manual_seed(0)
    weights = torch.randn(24, 96, generator=chance)
    mix = torch.randn(8, 96, generator=chance)
    inputs, others = (torch.randn(400, 8, generator=chance) @ mix for _ in range(2))
    scale, lowest, top = grid_of(weights)
    nearest = ((weights.view(24, 3, 32) - lowest[..., None]) / scale[..., None]).round().view(24, 96)
    chosen = gptq.choose(weights, scale, lowest, top, inputs, inputs)
    assert chosen.dtype == torch.uint8 and chosen.max() <= 15

    def lost(codes: torch.Tensor) -> float:
        """On inputs of the same kind that were not seen."""
        return float(((values(codes, scale, lowest) - weights) @ others.T).square().mean())

    assert lost(chosen) < 0.2 * lost(nearest)
    # Columns that have nothing to do with one another: nothing can be made up for, the nearest is the best.
    alone = torch.eye(96).repeat(4, 1) * 96**0.5
    assert torch.equal(gptq.choose(weights, scale, lowest, top, alone, alone), nearest.to(torch.uint8))


def test_what_earlier_layers_lost_is_made_up_for() -> None:
    chance = torch.Generator().manual_seed(1)
    weights = torch.randn(16, 64, generator=chance)
    wanted = torch.randn(500, 8, generator=chance) @ torch.randn(8, 64, generator=chance)
    # The layers before made everything smaller.
    inputs = 0.8 * wanted
    scale, lowest, top = grid_of(weights)
    asked, unasked = (
        gptq.choose(weights, scale * 1.5, lowest * 1.5, top, inputs, to) for to in (wanted, inputs)
    )

    def lost(codes: torch.Tensor) -> float:
        made = values(codes, scale * 1.5, lowest * 1.5) @ inputs.T
        return float((made - weights @ wanted.T).square().mean())

    assert lost(asked) < 0.5 * lost(unasked)


def test_activations_with_nan_are_refused() -> None:
    weights = torch.randn(4, 32)
    bad = torch.full((10, 32), float("nan"))
    with pytest.raises(InputError, match="contain NaN or infinity"):
        gptq.choose(weights, *grid_of(weights), bad, bad)


# llama: the converter changes the order of rows. phi3: several matrices in one. gemma2: norms on both sides.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quant"), few([("llama", "Q4_K_M"), ("phi3", "Q5_1"), ("gemma2", "Q4_0")], ["llama"])
)
def test_a_file_is_closer_to_its_source(
    tmp_path: Path,
    toy_converter: None,
    converted_toy: Path,
    family: str,
    quant: str,
) -> None:
    if family == "llama":
        run = shutil.copytree(converted_toy, tmp_path / "run")
    else:
        run = make_run(tmp_path, family)
    console = quiet()
    path = gguf.run(run, quant=quant, gptq=True, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    found = manifest.read(run / "gguf").settings["gptq"]
    assert found["kept"] == "with" and found["factor"] > 1.3 and "GPTQ: mean KL" in said
    # The proof is what was measured to choose the file.
    assert manifest.read(run / "gguf").verify["logits"]["kl_mean"] == found["kl_with"]
    # Every linear layer of the two blocks that is of such a type.
    inside = [
        one
        for name, one in read_header(path).tensors.items()
        if name.startswith("blk.") and len(one.shape) > 1
    ]
    assert found["tensors"] == sum(one.type in gptq.LAYOUTS for one in inside) > 0
    assert sorted(one.name for one in path.parent.iterdir()) == sorted(["edge.json", path.name])


@pytest.mark.slow
def test_what_gptq_cannot_do_is_said(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    with pytest.raises(UsageError, match="cannot choose the codes of Q8_0"):
        gguf.run(base, quant="Q8_0", gptq=True, console=quiet())
    with pytest.raises(UsageError, match="two ways to round"):
        gguf.run(base, quant="Q4_0", gptq=True, imatrix=True, console=quiet())
    assert not (base / "gguf").exists()


@pytest.mark.slow
def test_without_a_data_set_nothing_is_exported(tmp_path: Path, converted_before: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    with pytest.raises(InputError, match="measuring needs rows of the data set"):
        gguf.run(base, quant="Q4_0", gptq=True, console=quiet())
    assert not list(base.glob("gguf/*.gguf"))
