"""How an artefact is loaded on this machine: backend, device, threads, context and slots that fit its memory.

The estimate counts weights, KV cells and compute buffers before anything is loaded; what does not fit is
refused with the largest context that does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge.artefact.find import SUFFIXES, Artefact, candidates
from edge.artefact.onnx_header import OnnxHeader
from edge.backends import linux_pages, onnx
from edge.backends.llamacpp import KV_BYTES, Settings
from edge.backends.onnx_providers import DEVICES
from edge.errors import EdgeError, InputError, UnavailableError, UsageError
from edge.loading import gpu_offload
from edge.machine import build_llamacpp, doctor, hardware

DEFAULT_CONTEXT = 4096
DEFAULT_SLOTS = 16
# Cells that all requests share where nobody says how many there shall be: enough for two whole contexts, or
# sixteen short ones. A request that finds none free is computed later, never failed.
DEFAULT_POOL = 8192
# A whole context for each slot, which is faster, may take one part in so many of the memory for cells.
_SHARE = 3
# llama.cpp clears it first, a second for each gibibyte.
_MOST_CLEARED = 2**31
BATCH = 512
# Where a card's memory allows: it reads so many tokens hardly slower than fewer.
CARD_BATCH = 2048
# What Python, the tokenizer and llama.cpp's graphs take beside the counted buffers.
_OVERHEAD = 200 * 2**20
# The packages that a backend imports, and how they are got.
_PACKAGES = {
    "llamacpp": (("llama_cpp",), "python -m edge.machine.build_llamacpp"),
    "onnx": (("onnxruntime", "tokenizers"), "pip install -c constraints.txt '.[serve,onnx]'"),
}

# How fast a backend was measured to be here: seconds of a step of one row, of eight, and of a prompt token.
Speed = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may say about loading; None lets the machine decide."""

    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    device: str = "auto"
    kv_type: str = "f16"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a loaded model takes."""

    weights: int
    cell: float
    buffers: int

    def total(self, cells: int) -> int:
        return int(self.weights + self.cell * cells + self.buffers + _OVERHEAD)

    def cells(self, memory: int) -> int:
        """KV cells that fit into `memory` bytes beside everything else."""
        return max(0, int((memory - self.weights - self.buffers - _OVERHEAD) / self.cell))


def pick(given: Path, asked: str | None, options: Options) -> tuple[Artefact, str]:
    """The artefact behind `given` to serve, and why; as `choose_backend`, with what was measured here."""

    def measured(found: Artefact) -> Speed | None:
        # Imported late: tuning loads what it measures.
        from edge.loading import tune

        try:
            return tune.speed(found, plan(found, options))
        except EdgeError:
            # What cannot be loaded so is said when it is taken.
            return None

    return choose_backend(candidates(given), asked, measured)


def choose_backend(
    found: list[Artefact], asked: str | None, measured: Callable[[Artefact], Speed | None]
) -> tuple[Artefact, str]:
    """Which of a run's artefacts to serve, and why.

    asked: a backend by name, or None. measured: tells what `edge tune` found of an artefact. Raises
    InputError where there is no artefact for what is asked, UnavailableError where none can be served here.
    """
    lacks = {one.kind: _lacks(one.kind) for one in found}
    usable = [one for one in found if not lacks[one.kind]]
    if asked is not None:
        one = next((one for one in found if one.kind == asked), None)
        if one is None:
            raise InputError(
                f"--backend {asked}: there is no {SUFFIXES[asked].upper()} file",
                f"edge export {SUFFIXES[asked]} RUN",
            )
        return one, "asked for"
    if not usable:
        kind = found[0].kind
        raise UnavailableError(
            f"{found[0].path} needs {lacks[kind]}, which is not installed", _PACKAGES[kind][1]
        )
    if len(found) == 1:
        return usable[0], "the only artefact there is"
    if len(usable) == 1:
        other = next(kind for kind, name in lacks.items() if name)
        return usable[0], f"{lacks[other]} is not installed"
    speeds = {one.kind: speed for one in usable if (speed := measured(one)) is not None}
    if len(speeds) == len(usable):
        best = min(usable, key=lambda one: _score(speeds[one.kind], list(speeds.values())))
        rates = ", ".join(f"{one.kind} {1 / speeds[one.kind][0]:.0f}" for one in usable)
        return best, f"the faster one here: {rates} tok/s for one stream"
    return usable[
        0
    ], f"`edge tune RUN --backend {usable[1].kind}` measures whether {usable[1].kind} is faster"


def _lacks(kind: str) -> str:
    """The first package that the backend needs and that is not installed, or ""."""
    return next((name for name in _PACKAGES[kind][0] if importlib.util.find_spec(name) is None), "")


def _score(speed: Speed, all_speeds: list[Speed]) -> float:
    """As edge.loading.tune weighs it: one reader's latency is the main thing."""
    best = [min(one[i] for one in all_speeds) for i in range(3)]
    return sum(w * t / b for w, t, b in zip((0.5, 0.3, 0.2), speed, best, strict=True))


def estimate(artefact: Artefact, *, kv_type: str, slots: int, batch: int = BATCH) -> Estimate:
    """Weights from the file, a KV cell from the header, buffers from batch, width and vocabulary.

    A cell holds, for each block, key and value of every KV head: block_count x head_count_kv x
    (key_length + value_length) elements.
    """
    header = artefact.header
    cell = header.block_count * header.head_count_kv * (header.key_length + header.value_length)
    outputs = min(batch, slots + 64)
    # Activations of a batch (a few copies of the widest layer) and the logits of its outputs, twice.
    buffers = 4 * (batch * header.embedding_length * 24 + 2 * outputs * header.vocab_size)
    if isinstance(header, OnnxHeader):
        size = {"float32": 4, "float16": 2}[header.cache_type]
        # Attention keeps a score for each head, position of the batch and cell of the longest slot.
        buffers += 4 * batch * header.head_count * min(DEFAULT_CONTEXT, header.context_length)
        # Prepacked weights take the place of those in the file, which are mapped and let go of.
        return Estimate(header.weights_bytes, cell * size, buffers)
    return Estimate(header.weights_bytes, cell * KV_BYTES[kv_type], buffers)


def cells(settings: Settings | onnx.Settings) -> int:
    """KV cells that may be taken in all."""
    if isinstance(settings, Settings) and not settings.parts:
        return settings.capacity
    return settings.slots * settings.context


def plan(artefact: Artefact, options: Options) -> Settings | onnx.Settings:
    """Settings for this artefact on this machine.

    Raises UsageError for impossible options, InputError where the memory does not suffice,
    UnavailableError where a device was asked for that is not there.
    """
    slots = DEFAULT_SLOTS if options.slots is None else options.slots
    trained = artefact.header.context_length
    context = min(DEFAULT_CONTEXT, trained) if options.context is None else options.context
    for name, value, least, most in (
        ("--slots", slots, 1, 256),
        ("--ctx", context, 16, trained),
        ("--threads", 1 if options.threads is None else options.threads, 1, 512),
    ):
        if not least <= value <= most:
            why = f"; the model was trained for {trained} tokens" if name == "--ctx" else ""
            raise UsageError(f"{name} {value} is not within {least}..{most}{why}")
    need = estimate(artefact, kv_type=options.kv_type, slots=slots)
    wide = estimate(artefact, kv_type=options.kv_type, slots=slots, batch=CARD_BATCH)
    batch = BATCH
    memory = hardware.memory().available
    if artefact.kind == "onnx" and options.device in ("auto", "cuda") and (cards := hardware.gpus()):
        # Its cells may come to lie there.
        memory = min(memory, cards[0].memory_free)
        if wide.cells(memory) >= slots * context:
            batch = CARD_BATCH
    device, gpu_layers, why = "cpu", 0, ""
    used: list[hardware.GPU] = []
    if not isinstance(artefact.header, OnnxHeader):
        device, gpu_layers, why = choose_device(options.device)
        if gpu_layers:
            # Layers that find no room on a card stay in the system's memory.
            used = hardware.gpus()
            memory += gpu_offload.room(used)
    fits = need.cells(memory)
    if fits < context:
        raise InputError(
            f"a context of {context} tokens needs {need.total(context) / 2**20:,.0f} MiB, "
            f"{memory / 2**20:,.0f} MiB are free",
            f"serve with --ctx {fits // 256 * 256}, the largest that fits"
            if fits >= 256
            else "free some memory",
        )
    threads = options.threads or hardware.cpu_threads()
    if artefact.kind == "onnx":
        return _plan_onnx(options, slots=slots, context=context, threads=threads, fits=fits, batch=batch)
    # Cells that nothing is written to take no memory where that can be, but they may all be written to.
    whole = slots * context
    parts = whole <= min(fits / _SHARE, _MOST_CLEARED / need.cell) and (linux_pages.WORKS or bool(used))
    asked_for_all = options.slots is not None and options.context is not None
    pool = max(context, min(whole, fits, whole if asked_for_all else DEFAULT_POOL))
    if used and not isinstance(artefact.header, OnnxHeader):
        gpu_layers, said = gpu_offload.layers(artefact.header, pool, need.cell, need.buffers, used)
        if not gpu_layers and options.device == "cuda":
            raise UnavailableError(
                f"--device cuda: {said}", "free some of the card's memory, or lower --ctx and --slots"
            )
        device, why = device if gpu_layers else "cpu", f"{why}; {said}"
        if gpu_offload.layers(artefact.header, pool, wide.cell, wide.buffers, used)[0] == gpu_offload.ALL:
            batch = CARD_BATCH
        there = gpu_offload.layers(artefact.header, _SHARE * whole, need.cell, need.buffers, used)[0]
        parts = parts and there == gpu_offload.ALL
    return Settings(
        slots=slots,
        context=context,
        capacity=pool,
        parts=parts or pool >= whole,
        batch=batch,
        threads=threads,
        threads_batch=threads,
        kv_type=options.kv_type,
        flash_attention=options.kv_type != "f16",
        gpu_layers=gpu_layers,
        extra_buffers=bool(build_llamacpp.build_info().get("use_extra_bufts", True)),
        device=device,
        why=why,
    )


def _plan_onnx(
    options: Options, *, slots: int, context: int, threads: int, fits: int, batch: int
) -> onnx.Settings:
    """Each slot has room for a whole context of its own: where memory is short there are fewer slots."""
    if options.kv_type != "f16":
        raise UsageError(f"--kv-type {options.kv_type} is llama.cpp's", "an ONNX cache has the export's type")
    room = fits // context
    if room < slots and options.slots is not None:
        raise InputError(
            f"{slots} slots of {context} tokens do not fit into the memory that is free",
            f"serve with --slots {room}, or a smaller --ctx",
        )
    return onnx.Settings(
        slots=min(slots, room),
        context=context,
        batch=max(batch, slots),
        threads=threads,
        device=options.device,
    )


def choose_device(asked: str) -> tuple[str, int, str]:
    """(device, layers on it, why). Raises UnavailableError for an explicit device that is not there."""
    if asked == "cpu":
        return "cpu", 0, "asked for"
    if asked in DEVICES and asked not in ("auto", "cuda"):
        raise UnavailableError(f"--device {asked} is for ONNX", "serve with --backend onnx, or --device auto")
    lacks = build_llamacpp.no_card()
    cards = hardware.gpus()
    missing = [*([] if cards else ["no NVIDIA card was found"]), *filter(None, [lacks])]
    if not missing:
        return (
            f"cuda: {cards[0].name}",
            gpu_offload.ALL,
            "asked for" if asked == "cuda" else "a card was found",
        )
    if asked == "cuda":
        todo = doctor.card_todo(lacks, cards) or "serve with --device cpu or auto"
        raise UnavailableError("--device cuda: " + "; ".join(missing), todo)
    return "cpu", 0, "; ".join(missing)
