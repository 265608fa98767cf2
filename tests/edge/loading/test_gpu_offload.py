"""How many layers go to the GPUs, from what is free there."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.artefact import find
from edge.artefact.gguf_header import GGUFHeader
from edge.backends import llamacpp
from edge.errors import InputError, UnavailableError
from edge.loading import gpu_offload, load_plan
from edge.loading.load_plan import Options
from edge.machine import build_llamacpp, hardware
from edge.machine.hardware import GPU, Memory
from tests.support import tiny_llama

MIB = 2**20


def gpus(*free: float) -> list[GPU]:
    return [GPU(n, "小卡", 8 * 2**30, int(size), "580.1", "8.6", "13.0") for n, size in enumerate(free)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> find.Artefact:
    return find.resolve(tiny_llama.write(tmp_path_factory.mktemp("卡") / "微小.gguf"))


def plan(tiny: find.Artefact, monkeypatch: pytest.MonkeyPatch, present: list[GPU], device: str = "auto"):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(build_llamacpp, "probe", build_llamacpp.Probe)
    monkeypatch.setattr(hardware, "gpus", lambda: present)
    return load_plan.plan(tiny, Options(device=device, context=64, slots=2)).settings


def test_all_layers_or_as_many_as_fit(tiny: find.Artefact) -> None:
    header = tiny.header
    assert isinstance(header, GGUFHeader)
    blocks = [
        sum(one.bytes for name, one in header.tensors.items() if name.startswith(f"blk.{n}."))
        for n in range(header.block_count)
    ]
    output = "output.weight" if "output.weight" in header.tensors else "token_embd.weight"
    head = header.tensors[output].bytes + header.tensors["output_norm.weight"].bytes
    cells, cell = 100, 8.0 * header.block_count
    each = [size + 800 for size in blocks]

    def fit(free: float) -> int:
        return gpu_offload.layers(header, cells, cell, 0, gpus(gpu_offload.RESERVE + free))[0]

    assert fit(head + sum(each)) == gpu_offload.ALL
    assert fit(head + sum(each) - 1) == header.block_count
    assert fit(head + each[-1]) == 2
    assert fit(head) == 1
    assert fit(head - 1) == 0
    _, said = gpu_offload.layers(header, cells, cell, 0, gpus(gpu_offload.RESERVE + head))
    assert f"1 of {header.block_count + 1} layers" in said and "100 KV cells" in said
    # Buffers take their part; two GPUs hold more than one.
    assert gpu_offload.layers(header, cells, cell, head, gpus(gpu_offload.RESERVE + head))[0] == 0
    half = gpu_offload.RESERVE + (head + sum(each)) / 2 + 1
    assert gpu_offload.layers(header, cells, cell, 0, gpus(half, half))[0] == gpu_offload.ALL


def test_what_lies_on_the_gpu_is_said(tiny: find.Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = plan(tiny, monkeypatch, gpus(8 * 2**30))
    assert (settings.device, settings.gpu_layers) == ("cuda: 小卡", gpu_offload.ALL)
    assert "all " in settings.why and "a GPU was found" in settings.why
    # Longer steps where there is room for what they need, no fewer layers for their sake.
    wide = load_plan.estimate(tiny, kv_type="f16", slots=2, batch=load_plan.GPU_BATCH)
    tight = plan(tiny, monkeypatch, gpus(gpu_offload.RESERVE + wide.buffers))
    assert (settings.batch, tight.batch) == (load_plan.GPU_BATCH, load_plan.BATCH)
    assert tight.gpu_layers == gpu_offload.ALL
    full = plan(tiny, monkeypatch, gpus(100 * MIB))
    assert (full.device, full.gpu_layers) == ("cpu", 0)
    assert "no layer fits into the 0.1 GiB that are free on the GPU" in full.why
    with pytest.raises(UnavailableError, match="no layer fits"):
        plan(tiny, monkeypatch, gpus(100 * MIB), "cuda")


def test_a_model_beyond_the_systems_memory_fits_with_the_gpus(
    tiny: find.Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = load_plan.estimate(tiny, kv_type="f16", slots=2).total(64)
    monkeypatch.setattr(hardware, "memory", lambda: Memory(total=need, available=need - 1000))
    with pytest.raises(InputError, match="a context of 64 tokens needs"):
        plan(tiny, monkeypatch, [])
    assert plan(tiny, monkeypatch, gpus(2**30)).gpu_layers == gpu_offload.ALL


def test_a_full_memory_is_said_as_such(
    tiny: find.Artefact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = "alloc_buffer: allocating 900.00 MiB on device 0: cudaMalloc failed: out of memory"
    error = llamacpp._no_memory(tmp_path, log)
    assert isinstance(error, UnavailableError)
    assert "the memory is full" in error.message and "--device cpu" in error.hint
    assert llamacpp._no_memory(tmp_path, "invalid magic") is None
