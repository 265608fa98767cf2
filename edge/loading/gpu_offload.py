"""How many layers of a GGUF go to the GPUs: all, or as many as fit beside their part of the KV cache.

llama.cpp puts the last layers on the GPU, the output layer first. A layer's KV cells lie where the layer
does; the input embeddings always stay in the system's memory.
"""

from __future__ import annotations

from edge.artefact.gguf_header import GGUFHeader
from edge.machine.hardware import GPU

# What the driver, CUDA's libraries and their workspaces take of each GPU.
RESERVE = 512 * 2**20
ALL = -1


def room(gpus: list[GPU]) -> int:
    """Bytes that a model may take on the GPUs."""
    return sum(max(0, gpu.memory_free - RESERVE) for gpu in gpus)


def layers(header: GGUFHeader, cells: int, cell: float, buffers: int, gpus: list[GPU]) -> tuple[int, str]:
    """(layers on the GPUs, a sentence about them); ALL for every layer, 0 where not even the output fits.

    cells: KV cells, each of `cell` bytes over all layers. buffers: bytes of compute buffers.
    """
    blocks = dict.fromkeys(range(header.block_count), cells * cell / max(1, header.block_count))
    output = 0.0
    for name, tensor in header.tensors.items():
        first, number = [*name.split("."), ""][:2]
        if first == "blk" and number.isdigit() and int(number) in blocks:
            blocks[int(number)] += tensor.bytes
        elif first in ("output", "output_norm"):
            output += tensor.bytes
    if "output.weight" not in header.tensors and (tied := header.tensors.get("token_embd.weight")):
        output += tied.bytes
    whole = header.block_count + 1
    free = room(gpus) - buffers
    taken = 0
    for size in (output, *(blocks[n] for n in reversed(range(header.block_count)))):
        if size > free:
            break
        free -= int(size)
        taken += 1
    available = f"the {sum(gpu.memory_free for gpu in gpus) / 2**30:.1f} GiB that are free on the GPU"
    if taken == whole:
        return ALL, f"all {whole} layers on the GPU"
    if not taken:
        return 0, f"no layer fits into {available}"
    return taken, f"{taken} of {whole} layers fit into {available} with {cells} KV cells"
