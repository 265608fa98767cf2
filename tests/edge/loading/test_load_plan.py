"""Which artefact is served, and how it is loaded: what fits the memory, on which device."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge.artefact import find
from edge.artefact.find import Artefact
from edge.backends import linux_memory, llamacpp, onnx
from edge.errors import InputError, UnavailableError, UsageError
from edge.loading import gpu_offload, load_plan
from edge.loading.load_plan import Options
from edge.machine import build_llamacpp, hardware
from edge.machine.hardware import GPU, Memory
from tests.support import tiny_llama

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnx", "tokenizers")),
    reason="needs the packages for ONNX",
)


# An interpreter that loads llama.cpp: one for all plans.
PROBE = functools.cache(build_llamacpp.probe)


@pytest.fixture(autouse=True)
def _probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_llamacpp, "probe", PROBE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return find.resolve(tiny_llama.publish(tmp_path_factory.mktemp("运行 run")))


def memory(monkeypatch: pytest.MonkeyPatch, mib: float) -> None:
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, int(mib * 2**20)))


def test_s12_what_does_not_fit_is_refused_with_the_largest_that_does(
    tiny: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = load_plan.estimate(tiny, kv_type="f16", slots=1)
    assert need.cell == 2 * 2 * (16 + 16) * 2
    memory(monkeypatch, (need.total(400) + 100) / 2**20)
    assert load_plan.plan(tiny, Options(context=384, slots=1)).settings.context == 384
    with pytest.raises(InputError, match="MiB are free") as caught:
        load_plan.plan(tiny, Options(context=512, slots=1))
    assert "--ctx 256" in str(caught.value)
    limited = Memory(2**30, need.total(100), 2**30, Path("memory.max"))
    monkeypatch.setattr(hardware, "memory", lambda: limited)
    with pytest.raises(
        InputError, match=r"free within the limit of 1\.0 GiB \(memory\.max\)\n  raise the"
    ) as caught:
        load_plan.plan(tiny, Options(context=512, slots=1))
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**30, need.total(256) + 100))
    assert f"{need.total(256) / 2**20:,.0f} MiB hold it with --ctx 256" in str(caught.value)
    assert load_plan.plan(tiny, Options(context=256, slots=1)).settings.context == 256


def test_replicas_share_cores_and_memory_but_not_the_file(
    tiny: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_threads", lambda: 5)
    need = load_plan.estimate(tiny, kv_type="f16", slots=1)
    alone = need.total(400) - need.weights + load_plan.REPLICA_BYTES
    both = need.weights + load_plan.RAY_BYTES + 2 * alone
    memory(monkeypatch, (both + 200) / 2**20)
    options = Options(context=384, slots=1, replicas=2)
    assert load_plan.plan(tiny, options).settings.threads == 2
    with pytest.raises(InputError, match="MiB are free for each of 3 replicas") as caught:
        load_plan.plan(tiny, replace(options, replicas=3))
    assert "fewer --replicas" in str(caught.value)
    with pytest.raises(UsageError, match="each engine needs a core, this process may use 5"):
        load_plan.plan(tiny, replace(options, replicas=6))
    memory(monkeypatch, 2**20)
    assert load_plan.plan(tiny, replace(options, replicas=6, threads=1)).settings.threads == 1


def test_s12_a_huge_context_is_refused_at_once(tiny: Artefact) -> None:
    with pytest.raises(UsageError, match="trained for 512"):
        load_plan.plan(tiny, Options(context=10_000_000))


@pytest.mark.parametrize(
    "options", [Options(slots=0), Options(slots=999), Options(context=1), Options(threads=0)]
)
def test_options_out_of_range_are_named(tiny: Artefact, options: Options) -> None:
    with pytest.raises(UsageError, match="--"):
        load_plan.plan(tiny, options)


def test_the_kv_cache_shrinks_to_the_memory_before_the_context_does(
    tiny: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_plan.plan(tiny, Options(slots=16)).settings.capacity == 8192
    assert load_plan.plan(tiny, Options(slots=32)).settings.capacity == 8192
    assert load_plan.plan(tiny, Options(slots=32, context=512)).settings.capacity == 32 * 512
    need = load_plan.estimate(tiny, kv_type="f16", slots=16)
    memory(monkeypatch, (need.total(1000) + 100) / 2**20)
    planned = load_plan.plan(tiny, Options(slots=16)).settings
    assert planned.context == 512
    assert 990 <= planned.capacity <= 1000


def test_a_whole_context_for_each_slot_takes_a_part_of_the_memory(
    tiny: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = load_plan.estimate(tiny, kv_type="f16", slots=32)
    whole = 32 * 512
    rest = need.total(0)
    monkeypatch.setattr(linux_memory, "AVAILABLE", True)
    memory(monkeypatch, (rest + 3.1 * whole * need.cell) / 2**20)
    planned = load_plan.plan(tiny, Options(slots=32))
    assert planned.settings.per_slot_fits and planned.settings.capacity == 8192
    assert planned.bytes == need.total(whole)
    memory(monkeypatch, (rest + 2.9 * whole * need.cell) / 2**20)
    planned = load_plan.plan(tiny, Options(slots=32))
    assert not planned.settings.per_slot_fits and planned.bytes == need.total(8192)
    memory(monkeypatch, 2**20)
    assert load_plan.plan(tiny, Options(slots=32)).settings.per_slot_fits
    # Where cleared memory is not returned, or clearing it takes long.
    for module, name, value in (
        (linux_memory, "AVAILABLE", False),
        (load_plan, "_MOST_CLEARED", need.cell * (whole - 1)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert not load_plan.plan(tiny, Options(slots=32)).settings.per_slot_fits


def test_a_device_that_is_not_there_is_an_error_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: [])
    problem = build_llamacpp.Probe("", "built without GPU support (make install CUDA=1)")
    monkeypatch.setattr(build_llamacpp, "probe", lambda: problem)
    device, layers, why = load_plan.choose_device("auto")
    assert (device, layers) == ("cpu", 0)
    assert "no NVIDIA GPU" in why
    with pytest.raises(UnavailableError, match="CUDA=1"):
        load_plan.choose_device("cuda")
    assert load_plan.choose_device("cpu") == ("cpu", 0, "asked for")


def test_a_mac_takes_its_gpu_once_it_has_decoded(tiny: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: [])
    monkeypatch.setattr(hardware, "apple_gpu", lambda: "Apple M4")
    monkeypatch.setattr(build_llamacpp, "probe", build_llamacpp.Probe)
    monkeypatch.setattr(build_llamacpp, "build_info", lambda: {"gpu": False})
    assert load_plan.choose_device("auto")[:2] == ("cpu", 0)
    monkeypatch.setattr(build_llamacpp, "build_info", lambda: {"gpu": True})
    settings = load_plan.plan(tiny, Options()).settings
    assert (settings.device, settings.gpu_layers) == ("metal: Apple M4", -1)
    assert load_plan.choose_device("cpu") == ("cpu", 0, "asked for")


# -- ONNX and the choice ----------------------------------------------------------------------------------


@needs_onnx
def test_the_backend_is_chosen_by_what_there_is_and_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import tiny_onnx

    tiny_onnx.publish(tmp_path)
    found = find.candidates(tiny_llama.publish(tmp_path))
    assert [one.kind for one in found] == ["llamacpp", "onnx"]
    missing: set[str] = set()
    monkeypatch.setattr(
        load_plan.importlib.util, "find_spec", lambda name: None if name in missing else object()
    )

    def choose(asked: str | None = None, slots: int | None = None, **speeds: Any) -> tuple[str, str]:
        one, why = load_plan.choose_backend(found, asked, lambda one: speeds.get(one.kind), slots)
        return one.kind, why

    assert choose()[0] == "llamacpp"
    assert "edge tune RUN --backend onnx" in choose()[1]
    assert choose("onnx") == ("onnx", "asked for")
    fast, slow = (0.01, 0.02, 0.001), (0.02, 0.03, 0.001)
    kind, why = choose(onnx=fast, llamacpp=slow)
    assert (kind, why) == ("onnx", "the faster one here: llamacpp 50, onnx 100 tok/s for one stream")
    assert choose(onnx=slow, llamacpp=fast)[0] == "llamacpp"
    # One is faster alone, the other with many: the streams that were asked for decide.
    alone, many = (0.010, 0.040, 0.001), (0.011, 0.020, 0.001)
    assert choose(slots=1, onnx=many, llamacpp=alone)[0] == "llamacpp"
    assert choose(slots=32, onnx=many, llamacpp=alone) == (
        "onnx", "the faster one here: llamacpp 200, onnx 400 tok/s for eight streams",
    )  # fmt: skip
    assert choose(slots=4, onnx=many, llamacpp=alone) == choose(onnx=many, llamacpp=alone)
    by_measurement = found
    found = [
        replace(one, made_from=f"sha256:{one.kind}", created=f"2026-11-30T0{i}:00:00Z")
        for i, one in enumerate(found)
    ]
    assert choose(onnx=slow, llamacpp=fast) == (
        "onnx",
        "the newest export; the other one was made from another model",
    )
    found = by_measurement
    missing.add("llama_cpp")
    assert choose() == ("onnx", "llama_cpp is not installed")
    missing.add("onnxruntime")
    with pytest.raises(UnavailableError, match="llama_cpp"):
        choose()
    with pytest.raises(InputError, match="edge export gguf"):
        load_plan.choose_backend(found[1:], "llamacpp", lambda one: None)


@pytest.mark.parametrize(("free", "slots"), [(1000, 128), (3 * 20, 20), (3 * 16 - 1, 16), (1, 16)])
def test_a_gguf_on_a_gpu_has_slots_by_its_memory(
    tiny: Artefact, monkeypatch: pytest.MonkeyPatch, free: int, slots: int
) -> None:
    """free: whole contexts that fit beside the weights. Per-slot KV buffers stay possible on a large GPU."""
    need = load_plan.estimate(tiny, kv_type="f16", slots=128, batch=load_plan.GPU_BATCH)
    space = need.total(free * tiny.header.context_length) + gpu_offload.RESERVE
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, 2**40))
    monkeypatch.setattr(hardware, "gpus", lambda: [GPU(0, "a GPU", space, space, "1", "9.0", "13.0")])
    monkeypatch.setattr(build_llamacpp, "probe", build_llamacpp.Probe)
    # What is cleared there takes no time worth a bound.
    monkeypatch.setattr(load_plan, "_MOST_CLEARED", 0)
    settings = load_plan.plan(tiny, Options()).settings
    assert isinstance(settings, llamacpp.Settings)
    assert (settings.slots, settings.gpu_layers) == (slots, gpu_offload.ALL)
    assert settings.per_slot_fits or free < 3 * slots
    assert load_plan.plan(tiny, Options(slots=3)).settings.slots == 3


@needs_onnx
@pytest.mark.parametrize(("dtype", "provider", "free", "slots"), [
    ("float16", "CUDAExecutionProvider", 2**40, 128),
    ("float16", "CUDAExecutionProvider", 40, 20),
    ("float16", "CUDAExecutionProvider", 20, 16),
    ("float32", "CUDAExecutionProvider", 2**40, 16),
    ("float16", "CPUExecutionProvider", 2**40, 16),
])  # fmt: skip
def test_a_gpu_has_slots_by_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, provider: str, free: int, slots: int
) -> None:
    """free: whole contexts that fit beside the weights, where it is small."""
    import onnxruntime

    from tests.support import tiny_onnx

    tiny = find.resolve(tiny_onnx.write(tmp_path, dtype=dtype))
    need = load_plan.estimate(tiny, kv_type="f16", slots=128, batch=load_plan.GPU_BATCH)
    memory = need.total(free * 512) if free < 100 else free
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, 2**40))
    monkeypatch.setattr(hardware, "gpus", lambda: [GPU(0, "a GPU", memory, memory, "1", "9.0", "13.0")])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider])
    assert load_plan.plan(tiny, Options()).settings.slots == slots
    assert load_plan.plan(tiny, Options(slots=3)).settings.slots == 3


@needs_onnx
def test_s12_slots_shrink_to_the_memory_and_what_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import tiny_onnx

    tiny = find.resolve(tiny_onnx.publish(tmp_path))
    need = load_plan.estimate(tiny, kv_type="f16", slots=16)
    assert need.cell == 2 * 2 * (16 + 16) * 4
    available = need.total(5 * 512 + 100)
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, available))
    planned = load_plan.plan(tiny, Options()).settings
    assert isinstance(planned, onnx.Settings)
    assert (planned.slots, planned.context) == (5, 512)
    with pytest.raises(InputError, match="--slots 5"):
        load_plan.plan(tiny, Options(slots=16))
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, need.total(300)))
    with pytest.raises(InputError, match="--ctx 256"):
        load_plan.plan(tiny, Options())
    with pytest.raises(UsageError, match="trained for 512"):
        load_plan.plan(tiny, Options(context=10_000_000))
    with pytest.raises(UsageError, match=r"is for llama\.cpp"):
        monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, 2**40))
        load_plan.plan(tiny, Options(kv_type="q8_0"))


def test_other_devices_are_for_onnx() -> None:
    with pytest.raises(UnavailableError, match="is for ONNX"):
        load_plan.choose_device("dml")


def test_prefixes_in_ram_take_a_share_of_what_is_free(
    tiny: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(cache_ram: int | None) -> load_plan.LoadPlan:
        return load_plan.plan(tiny, Options(slots=2, device="cpu", cache_ram=cache_ram))

    memory(monkeypatch, 1024)
    without = planned(0)
    assert without.cache_ram == 0
    share = planned(None)
    assert share.cache_ram == (2**30 - without.bytes) // 4
    assert share.bytes == without.bytes + share.cache_ram
    assert planned(100).bytes == without.bytes + 100 * 2**20
    memory(monkeypatch, 2**20)
    assert planned(None).cache_ram == load_plan.MOST_CACHE_RAM
    need = load_plan.estimate(tiny, kv_type="f16", slots=2).total(520)
    memory(monkeypatch, need / 2**20 + 100)
    assert planned(100).settings.capacity < without.settings.capacity
    with pytest.raises(InputError, match="are free"):
        planned(1000)
    with pytest.raises(UsageError, match="--cache-ram -1"):
        planned(-1)


def test_on_a_gpu_prefixes_are_kept_in_ram_where_that_is_asked_for(
    tiny: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_plan, "choose_device", lambda _: ("cuda: a GPU", -1, "asked for"))
    memory(monkeypatch, 2**20)
    assert load_plan.plan(tiny, Options(cache_ram=None)).cache_ram == 0
    assert load_plan.plan(tiny, Options(cache_ram=7)).cache_ram == 7 * 2**20
