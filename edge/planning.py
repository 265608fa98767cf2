"""How an artefact is loaded on this machine: device, threads, context and slots that fit into its memory.

The estimate counts weights, KV cells and compute buffers before anything is loaded; what does not fit is
refused with the largest context that does.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge import hardware, native
from edge.artefact import Artefact
from edge.backends.llamacpp import KV_BYTES, Settings
from edge.errors import InputError, UnavailableError, UsageError

DEFAULT_CONTEXT = 4096
DEFAULT_SLOTS = 16
# Cells that all requests share where nobody says how many there shall be: enough for two whole contexts, or
# sixteen short ones. A request that finds none free is computed later, never failed.
DEFAULT_POOL = 8192
BATCH = 512
# What Python, the tokenizer and llama.cpp's graphs take beside the counted buffers.
_OVERHEAD = 200 * 2**20


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


def estimate(artefact: Artefact, *, kv_type: str, slots: int) -> Estimate:
    """Weights from the file, a KV cell from the header, buffers from batch, width and vocabulary.

    A cell holds, for each block, key and value of every KV head: block_count x head_count_kv x
    (key_length + value_length) elements.
    """
    header = artefact.header
    cell = header.block_count * header.head_count_kv * (header.key_length + header.value_length)
    outputs = min(BATCH, slots + 64)
    # Activations of a batch (a few copies of the widest layer) and the logits of its outputs, twice.
    buffers = 4 * (BATCH * header.embedding_length * 24 + 2 * outputs * header.vocab_size)
    return Estimate(header.weights_bytes, cell * KV_BYTES[kv_type], buffers)


def plan(artefact: Artefact, options: Options) -> Settings:
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
    memory = hardware.memory().available
    fits = need.cells(memory)
    if fits < context:
        raise InputError(
            f"a context of {context} tokens needs {need.total(context) / 2**20:,.0f} MiB, "
            f"{memory / 2**20:,.0f} MiB are free",
            f"serve with --ctx {fits // 256 * 256}, the largest that fits"
            if fits >= 256
            else "free some memory",
        )
    asked_for_all = options.slots is not None and options.context is not None
    pool = max(context, min(slots * context, fits, slots * context if asked_for_all else DEFAULT_POOL))
    device, gpu_layers, why = choose_device(options.device)
    threads = options.threads or hardware.cpu_threads()
    return Settings(
        slots=slots,
        context=context,
        capacity=pool,
        batch=BATCH,
        threads=threads,
        threads_batch=threads,
        kv_type=options.kv_type,
        flash_attention=options.kv_type != "f16",
        gpu_layers=gpu_layers,
        extra_buffers=bool(native.build_info().get("use_extra_bufts", True)),
        device=device,
        why=why,
    )


def choose_device(asked: str) -> tuple[str, int, str]:
    """(device, layers on it, why). Raises UnavailableError for an explicit device that is not there."""
    if asked == "cpu":
        return "cpu", 0, "asked for"
    built = native.gpu_offload()
    cards = hardware.gpus()
    missing = []
    if not cards:
        missing.append("no NVIDIA card was found")
    if not built:
        missing.append("llama-cpp-python was built without GPU support (make install CUDA=1 builds it)")
    if not missing:
        return f"cuda: {cards[0].name}", -1, "asked for" if asked == "cuda" else "a card was found"
    if asked == "cuda":
        raise UnavailableError("--device cuda: " + "; ".join(missing), "serve with --device cpu or auto")
    return "cpu", 0, "; ".join(missing)
