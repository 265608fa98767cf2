"""How many layers of a GGUF go to graphics cards: all, or as many as fit beside the cells of their KV cache.

llama.cpp takes the last layers to the card, the output layer first; a layer's KV cells lie where the layer
does, the input embeddings always in the system's memory.
"""

from __future__ import annotations

from edge.artefact.gguf_header import GGUFHeader
from edge.machine.hardware import GPU

# What the driver, CUDA's libraries and their workspaces take of each card.
RESERVE = 512 * 2**20
ALL = -1


def room(cards: list[GPU]) -> int:
    """Bytes that a model may take on the cards."""
    return sum(max(0, card.memory_free - RESERVE) for card in cards)


def layers(header: GGUFHeader, cells: int, cell: float, buffers: int, cards: list[GPU]) -> tuple[int, str]:
    """(layers for the cards, what to say of it); ALL for every one, 0 where not even the output fits.

    cells: of the KV cache, each of `cell` bytes over all layers; buffers: bytes to compute with.
    """
    sizes = dict.fromkeys(range(header.block_count), cells * cell / max(1, header.block_count))
    output = 0.0
    for name, tensor in header.tensors.items():
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if first == "blk" and number.isdigit() and int(number) in sizes:
            sizes[int(number)] += tensor.bytes
        elif first in ("output", "output_norm"):
            output += tensor.bytes
    if "output.weight" not in header.tensors and (tied := header.tensors.get("token_embd.weight")):
        output += tied.bytes
    whole = header.block_count + 1
    free = room(cards) - buffers
    taken = 0
    for size in (output, *(sizes[n] for n in reversed(range(header.block_count)))):
        if size > free:
            break
        free -= int(size)
        taken += 1
    there = f"the {sum(card.memory_free for card in cards) / 2**30:.1f} GiB free there"
    if taken == whole:
        return ALL, f"all {whole} layers"
    if not taken:
        return 0, f"no layer fits into {there}"
    return taken, f"{taken} of {whole} layers fit into {there} with {cells} cells"
