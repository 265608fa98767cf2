"""How an artefact is loaded on this machine: backend, device, threads, context and slots that fit its memory.

The estimate counts weights, KV cells and compute buffers before anything is loaded. What does not fit is
refused, with the largest context that does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edge.artefact.find import SUFFIXES, Artefact, candidates
from edge.artefact.gguf_header import GGUFHeader
from edge.artefact.onnx_header import OnnxHeader
from edge.backends import linux_memory, llamacpp, onnx, onnx_providers
from edge.backends.onnx_providers import DEVICES
from edge.errors import EdgeError, InputError, UnavailableError, UsageError
from edge.loading import gpu_offload, tune_results
from edge.loading.tune_trials import STREAMS, Speed, scores
from edge.machine import build_llamacpp, cuda_libraries, hardware
from edge.machine.llamacpp_source import BUILD
from edge.setup import install_command

DEFAULT_CONTEXT = 4096
DEFAULT_SLOTS = 16
# Most slots on a GPU by default: as many as fit into half of the memory beside the weights, or into the third
# that per-slot KV buffers of a GGUF may take. Many rows take a GPU hardly longer than few, and clients beyond
# the slots wait.
GPU_SLOTS = 128
# Size of a unified KV cache unless the options say otherwise: two whole contexts, or sixteen short ones. A
# request that finds no free KV cell is computed later, it never fails.
DEFAULT_CELLS = 8192
# Per-slot KV buffers, which are faster, may take one part in so many of the memory for KV cells.
_SHARE = 3
# llama.cpp clears the KV cache first, which takes a second for each GiB of the system's memory.
_MOST_CLEARED = 2**31
BATCH = 512
# Where a GPU's memory allows: it reads this many tokens hardly slower than fewer.
GPU_BATCH = 2048
# What Python, the tokenizer and llama.cpp's graphs take beside the counted buffers.
_OVERHEAD = 200 * 2**20
# Prefixes kept in RAM take one part in so many of what the plan leaves free, up to llama-server's default.
_CACHE_SHARE, MOST_CACHE_RAM = 4, 8192 * 2**20
# What Ray's own processes take, and a replica's HTTP process beside its engine.
RAY_BYTES, REPLICA_BYTES = 800 * 2**20, 150 * 2**20
# The packages that a backend imports, and how to install them.
_PACKAGES = {
    "llamacpp": (("llama_cpp",), BUILD),
    "onnx": (("onnxruntime", "tokenizers"), install_command("serve", "onnx")),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may say about loading; None lets the machine decide. cache_ram: MiB.

    replicas: engines that share this machine's cores and memory. A plan is of one of them.
    """

    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    device: str = "auto"
    kv_type: str = "f16"
    cache_ram: int | None = 0
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """settings: for the artefact's backend. bytes: what the model takes with all its KV cells in use.

    cache_ram: bytes for prefixes beside the slots; they are among `bytes`.
    """

    settings: llamacpp.Settings | onnx.Settings
    bytes: int
    cache_ram: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a loaded model takes: weights, one KV cell, compute buffers."""

    weights: int
    cell: float
    buffers: int

    def total(self, cells: int) -> int:
        return int(self.weights + self.cell * cells + self.buffers + _OVERHEAD)

    def cells(self, memory: int) -> int:
        """KV cells that fit into `memory` bytes beside everything else."""
        return max(0, int((memory - self.total(0)) / self.cell))


@dataclass(frozen=True, slots=True)
class _Size:
    """The options that every backend has, with their defaults filled in."""

    context: int
    slots: int
    threads: int


def _gpus(options: Options) -> list[hardware.GPU]:
    """The GPUs, each with the memory that one replica may take of it."""
    return [replace(gpu, memory_free=gpu.memory_free // options.replicas) for gpu in hardware.gpus()]


def _memory(artefact: Artefact, options: Options) -> int:
    """Bytes for one replica. Those of a mapped GGUF are among them, and are in memory once for all."""
    free = hardware.memory().available
    if options.replicas == 1:
        return free
    shared = artefact.header.weights_bytes if isinstance(artefact.header, GGUFHeader) else 0
    return shared + (free - shared - RAY_BYTES) // options.replicas - REPLICA_BYTES


def pick(given: Path, asked: str | None, options: Options) -> tuple[Artefact, str]:
    """The artefact behind `given` to serve, and why: `choose_backend` with what was measured here."""

    def measured(artefact: Artefact) -> Speed | None:
        try:
            return tune_results.speed(artefact.path, plan(artefact, options).settings)
        except EdgeError:
            # An artefact that cannot be loaded with these options raises again when it is chosen.
            return None

    return choose_backend(candidates(given), asked, measured, slots=options.slots)


def choose_backend(
    artefacts: list[Artefact],
    asked: str | None,
    measured: Callable[[Artefact], Speed | None],
    slots: int | None = None,
) -> tuple[Artefact, str]:
    """Which of a run's artefacts to serve, and why.

    asked: a backend by name, or None. measured: the speed that `edge tune` measured of an artefact, if any.
    slots: streams that were asked for; what is faster for one of them may be slower for many.
    Raises InputError where there is no artefact for what is asked, UnavailableError where none can be served.
    """
    if asked is not None:
        for artefact in artefacts:
            if artefact.kind == asked:
                return artefact, "asked for"
        suffix = SUFFIXES[asked]
        raise InputError(f"--backend {asked}: there is no {suffix.upper()} file", f"edge export {suffix} RUN")
    missing = {artefact.kind: _missing_package(artefact.kind) for artefact in artefacts}
    usable = [artefact for artefact in artefacts if not missing[artefact.kind]]
    if not usable:
        kind = artefacts[0].kind
        raise UnavailableError(
            f"{artefacts[0].path} needs {missing[kind]}, which is not installed", _PACKAGES[kind][1]
        )
    if len(artefacts) == 1:
        return usable[0], "the only artefact there is"
    if len(usable) == 1:
        return usable[0], f"{next(filter(None, missing.values()))} is not installed"
    sources = {artefact.made_from for artefact in usable}
    if len(sources) > 1 and "" not in sources:
        newest = max(usable, key=lambda artefact: artefact.created)
        return newest, "the newest export; the other one was made from another model"
    speeds = [speed for artefact in usable if (speed := measured(artefact)) is not None]
    if len(speeds) < len(usable):
        other = usable[1].kind
        return usable[0], f"`edge tune RUN --backend {other}` measures whether {other} is faster"
    rated = scores(speeds, slots)
    streams, which, name = (STREAMS, 1, "eight streams") if (slots or 1) >= STREAMS else (1, 0, "one stream")
    rates = ", ".join(
        f"{a.kind} {streams / speed[which]:.0f}" for a, speed in zip(usable, speeds, strict=True)
    )
    return usable[rated.index(min(rated))], f"the faster one here: {rates} tok/s for {name}"


def _missing_package(kind: str) -> str:
    """The first package that the backend needs and that is not installed, or ""."""
    return next((name for name in _PACKAGES[kind][0] if importlib.util.find_spec(name) is None), "")


def estimate(artefact: Artefact, *, kv_type: str, slots: int, batch: int = BATCH) -> Estimate:
    """Weights from the file, a KV cell from the header, buffers from batch, width and vocabulary.

    A KV cell holds, for each block, key and value of every KV head: block_count x head_count_kv x
    (key_length + value_length) elements.
    """
    header = artefact.header
    cell = header.block_count * header.head_count_kv * (header.key_length + header.value_length)
    outputs = min(batch, slots + 64)
    # Activations of a batch (a few copies of the widest layer) and the logits of its outputs, twice.
    buffers = 4 * (batch * header.embedding_length * 24 + 2 * outputs * header.vocab_size)
    if isinstance(header, GGUFHeader):
        return Estimate(header.weights_bytes, cell * llamacpp.KV_BYTES[kv_type], buffers)
    # Attention keeps a score for each head, position of the batch and KV cell of the longest slot.
    buffers += 4 * batch * header.head_count * min(DEFAULT_CONTEXT, header.context_length)
    # Prepacked weights take the place of those in the file, which is mapped and released.
    size = {"float32": 4, "float16": 2}[header.cache_type]
    return Estimate(header.weights_bytes, cell * size, buffers)


def plan(artefact: Artefact, options: Options) -> LoadPlan:
    """Settings for this artefact on this machine.

    Raises UsageError for impossible options, InputError where the memory does not suffice,
    UnavailableError where a device was asked for that is not there.
    """
    trained = artefact.header.context_length
    asked = (options.cache_ram or 0) * 2**20
    if asked < 0:
        raise UsageError(f"--cache-ram {options.cache_ram} is less than 0")
    memory = max(0, _memory(artefact, options) - asked)
    cores = hardware.cpu_threads()
    if options.threads is None and cores < options.replicas:
        raise UsageError(
            f"--replicas {options.replicas}: each engine needs a core, this process may use {cores}",
            f"serve with --replicas {cores}, or let them share cores: --threads 1",
        )
    size = _Size(
        context=min(DEFAULT_CONTEXT, trained) if options.context is None else options.context,
        slots=DEFAULT_SLOTS if options.slots is None else options.slots,
        threads=min(512, cores // options.replicas) if options.threads is None else options.threads,
    )
    for name, value, least, most, why in (
        ("--slots", size.slots, 1, 256, ""),
        ("--ctx", size.context, 16, trained, f"; the model was trained for {trained} tokens"),
        ("--threads", size.threads, 1, 512, ""),
    ):
        if not least <= value <= most:
            raise UsageError(f"{name} {value} is not within {least}..{most}{why}")
    if isinstance(artefact.header, OnnxHeader):
        planned = _plan_onnx(artefact, options, size, memory)
    else:
        planned = _plan_llamacpp(artefact, artefact.header, options, size, memory)
    device = planned.settings.device
    if options.cache_ram is None and (device == "cpu" or (device == "auto" and not hardware.gpus())):
        asked = min(MOST_CACHE_RAM, max(0, memory - planned.bytes) // _CACHE_SHARE)
    return replace(planned, bytes=planned.bytes + asked, cache_ram=asked)


def _plan_llamacpp(
    artefact: Artefact, header: GGUFHeader, options: Options, size: _Size, memory: int
) -> LoadPlan:
    """Layers on the GPUs where there are any; a unified KV cache, per-slot buffers too where they fit."""
    device, gpu_layers, why = choose_device(options.device)
    # Layers that find no room on a GPU stay in the system's memory.
    gpus = _gpus(options) if gpu_layers else []
    if gpus and options.slots is None:
        many = estimate(artefact, kv_type=options.kv_type, slots=GPU_SLOTS, batch=GPU_BATCH)
        room = many.cells(gpu_offload.room(gpus)) // _SHARE // size.context
        size = replace(size, slots=max(size.slots, min(GPU_SLOTS, room)))
    need = estimate(artefact, kv_type=options.kv_type, slots=size.slots)
    fits = _fitting_cells(need, memory + gpu_offload.room(gpus), size.context, options.replicas)
    # KV cells that are never written to take no memory where the system allows it; but all may be written to.
    whole = size.slots * size.context
    per_slot = whole <= fits / _SHARE and (
        bool(gpus) or (linux_memory.AVAILABLE and whole <= _MOST_CLEARED / need.cell)
    )
    all_asked_for = options.slots is not None and options.context is not None
    capacity = max(size.context, min(whole, fits, whole if all_asked_for else DEFAULT_CELLS))
    batch = BATCH
    if gpus:
        gpu_layers, note = gpu_offload.layers(header, capacity, need.cell, need.buffers, gpus)
        if not gpu_layers and options.device == "cuda":
            raise UnavailableError(
                f"--device cuda: {note}", "free some of the GPU's memory, or lower --ctx and --slots"
            )
        device, why = device if gpu_layers else "cpu", f"{why}; {note}"
        wide = estimate(artefact, kv_type=options.kv_type, slots=size.slots, batch=GPU_BATCH)
        if gpu_offload.layers(header, capacity, wide.cell, wide.buffers, gpus)[0] == gpu_offload.ALL:
            batch = GPU_BATCH
        spacious = gpu_offload.layers(header, _SHARE * whole, need.cell, need.buffers, gpus)[0]
        per_slot = per_slot and spacious == gpu_offload.ALL
    settings = llamacpp.Settings(
        slots=size.slots,
        context=size.context,
        capacity=capacity,
        per_slot_fits=per_slot or capacity >= whole,
        batch=batch,
        threads=size.threads,
        kv_type=options.kv_type,
        flash_attention=options.kv_type != "f16",
        gpu_layers=gpu_layers,
        extra_buffers=bool(build_llamacpp.build_info().get("use_extra_bufts", True)),
        device=device,
        why=why,
    )
    return LoadPlan(settings, need.total(whole if settings.per_slot_fits else capacity))


def _plan_onnx(artefact: Artefact, options: Options, size: _Size, memory: int) -> LoadPlan:
    """A KV buffer for a whole context for each slot: where memory is short there are fewer slots."""
    if options.kv_type != "f16":
        raise UsageError(
            f"--kv-type {options.kv_type} is for llama.cpp",
            "an ONNX model's KV cache has the type of its export",
        )
    slots, context, batch = size.slots, size.context, BATCH
    if options.device in ("auto", "cuda") and (gpus := _gpus(options)):
        # The KV cache may come to lie there.
        memory = min(memory, gpus[0].memory_free)
        if options.slots is None and _runs_on_cuda(artefact, options.device, gpus):
            need = estimate(artefact, kv_type=options.kv_type, slots=GPU_SLOTS, batch=GPU_BATCH)
            slots = max(slots, min(GPU_SLOTS, need.cells(memory) // 2 // context))
        wide = estimate(artefact, kv_type=options.kv_type, slots=slots, batch=GPU_BATCH)
        if wide.cells(memory) >= slots * context:
            batch = GPU_BATCH
    need = estimate(artefact, kv_type=options.kv_type, slots=slots)
    room = _fitting_cells(need, memory, context, options.replicas) // context
    if room < slots and options.slots is not None:
        raise InputError(
            f"{slots} slots of {context} tokens do not fit into the memory that is free"
            f"{hardware.memory().within}",
            f"serve with --slots {room}, or a smaller --ctx",
        )
    settings = onnx.Settings(
        slots=min(slots, room),
        context=context,
        batch=max(batch, slots),
        threads=size.threads,
        device=options.device,
    )
    need = estimate(artefact, kv_type=options.kv_type, slots=settings.slots)
    return LoadPlan(settings, need.total(settings.slots * context))


def _runs_on_cuda(artefact: Artefact, device: str, gpus: list[hardware.GPU]) -> bool:
    """Whether onnxruntime will take the GPU, as far as can be told before a session is opened.

    Raises UnavailableError where --device cuda asks for what this build of onnxruntime lacks.
    """
    available = list(onnx_providers.library().get_available_providers())
    chosen, _ = onnx_providers.choose(device, available, gpus)
    return (
        chosen == "cuda"
        and isinstance(artefact.header, OnnxHeader)
        and artefact.header.cache_type == "float16"
    )


def _fitting_cells(need: Estimate, memory: int, context: int, replicas: int) -> int:
    """KV cells that fit into `memory`. Raises InputError where they do not hold one context."""
    fits = need.cells(memory)
    if fits < context:
        within = hardware.memory().within
        least = f"{need.total(256) / 2**20:,.0f} MiB hold it with --ctx 256"
        share = f" for each of {replicas} replicas" if replicas > 1 else ""
        remedy = ("serve fewer --replicas, " if share else "") + (
            "raise the limit" if within else "free some memory"
        )
        raise InputError(
            f"a context of {context} tokens needs {need.total(context) / 2**20:,.0f} MiB, "
            f"{memory / 2**20:,.0f} MiB are free{share}{within}",
            f"serve with --ctx {fits // 256 * 256}, the largest that fits"
            if fits >= 256
            else f"{remedy}, or export fewer bits: {least}",
        )
    return fits


def choose_device(asked: str) -> tuple[str, int, str]:
    """(device, layers on it, why) for llama.cpp.

    Raises UnavailableError for a device that was asked for by name and is not there.
    """
    if asked == "cpu":
        return "cpu", 0, "asked for"
    if asked in DEVICES and asked not in ("auto", "cuda"):
        raise UnavailableError(f"--device {asked} is for ONNX", "serve with --backend onnx, or --device auto")
    problem = build_llamacpp.probe().no_gpu
    if asked == "auto" and (chip := hardware.apple_gpu()) and not problem:
        if build_llamacpp.build_info().get("gpu"):
            return f"metal: {chip}", gpu_offload.ALL, "a GPU was found, and it shares the system's memory"
        return "cpu", 0, "decoding on the GPU was not checked, or failed its check: `edge doctor`"
    gpus = hardware.gpus()
    missing = [*([] if gpus else ["no NVIDIA GPU was found"]), *filter(None, [problem])]
    if not missing:
        why = "asked for" if asked == "cuda" else "a GPU was found"
        return f"cuda: {gpus[0].name}", gpu_offload.ALL, why
    if asked == "cuda":
        remedy = cuda_libraries.gpu_remedy(problem, gpus) or "serve with --device cpu or auto"
        raise UnavailableError("--device cuda: " + "; ".join(missing), remedy)
    return "cpu", 0, "; ".join(missing)
