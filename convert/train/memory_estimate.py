"""How much memory training will take, from the real batches, before the first weight is loaded.

Weights and trained parameters are counted on a model without storage (torch's meta device). What a pass
needs follows from the widths of a decoder layer, by what its operations keep for the backward pass (the way
of Korthikanti et al. 2022, arXiv:2205.05198, section 4, here for gated layers with frozen weights): see
`Passes`. What a CPU's process and allocator keep is measured.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from convert.config import TrainConfig
from convert.data.encode import Judged, Sample
from convert.data.prepare import Prepared
from convert.model import quiet_bitsandbytes
from convert.train import cuda_graphs, fsdp, fused_kernels, malloc_trim
from convert.train.load_model import (
    NF4_BLOCK,
    Place,
    add_adapter,
    autocast,
    grow,
    keeps_embeddings_off,
    unfreeze,
)
from convert.train.losses import by_length, loss_rows
from convert.train.trainer import batches, total_steps
from edge.errors import EdgeError
from edge.machine import hardware

# Measured. A process with torch and its friends, without a model, in bytes; chunks that the allocator keeps,
# as a share of what passes need, by bytes of the computing type; workspaces of a GPU's matrix library.
CPU_PROCESS, CPU_KEPT = 520 * 2**20, {2: 0.38, 4: 0.6}
CUDA_WORKSPACE = 40 * 2**20
# glibc's largest chunk of the heap, in bytes; larger ones go back to the system when they are freed.
_HEAP_CHUNK = 32 * 2**20
# Of bitsandbytes' double quantisation: scales of blocks that share a scale of their own.
_SCALES = 256


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak. weights: as they lie on the device. trained: parameters that are trained, and what
    the optimizer keeps of them. passes: gradients, activations and what is computed with. other: the process
    itself. kept: of the weights, copies of those in 4 bits that are dequantised once. While the weights are
    read the files' pages are in memory too; those the system takes back."""

    weights: int
    trained: int
    passes: int
    other: int
    kept: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.passes + self.other

    def __str__(self) -> str:
        parts = ("weights", "trained", "passes", "other")
        shown = ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in parts)
        return f"{self.total / 2**30:.2f} GiB ({shown})"


def estimate(
    base: Path, config: TrainConfig, data: Prepared, place: Place, *, model: Any = None, shards: int = 1
) -> Estimate:
    """The peak of training `data` as `config` says, in bytes.

    model: what `skeleton` gave for the same place, to use again. shards: processes that the layers' frozen
    weights are sharded over, see `convert.train.fsdp`.
    """
    model = model if model is not None else skeleton(base, config, place)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Parameter and Adam's two moments in float32; paged ones leave a GPU that is full.
    trained = count * (4 if config.optim == "paged_adamw_8bit" else 12)
    # Gradients in float32, and beside them 16-bit copies of the parameters where autocast makes them.
    gradients = count * (6 if autocast(config, place) is not None else 4)
    needs = Passes(model, config, place, longest=data.longest)
    passes = max(needs.training(batch) for batch in _batches(config, data)) + gradients
    held = list(by_length(data.held, config.per_device_eval_batch_size))
    passes = max(passes, *(needs.evaluation(batch) + gradients for batch in held[-1:]), 0)
    weights, holes = _weights(model, config, place, shards)
    other = CUDA_WORKSPACE
    if place.device == "cpu":
        kept = int(CPU_KEPT[place.dtype.itemsize] * passes)
        if malloc_trim.malloc_trim() and not config.disable_gradient_checkpointing:
            kept = min(kept, malloc_trim.SLACK * 4 // 5)
        # In float32 each dequantised weight leaves a hole in the heap, which smaller tensors then break up.
        other = CPU_PROCESS + kept + (holes if place.dtype == torch.float32 else 0)
    return Estimate(weights, trained, passes, other)


def skeleton(base: Path, config: TrainConfig, place: Place, *, tokens: int = 0) -> Any:
    """The model that is to be trained, without storage. tokens: of its tokenizer, where they are more."""
    quiet_bitsandbytes.alone()
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(base, local_files_only=True)
    full = config.whole
    # The real model's start must find the random numbers as they were.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32 if full else place.dtype)
        if config.grows:
            grow(model, tokens, config.seed)
        return unfreeze(model, config) if full else add_adapter(model, replace(config, pissa_init=False))


def _weights(model: Any, config: TrainConfig, place: Place, shards: int) -> tuple[int, int]:
    """(bytes of the frozen weights on one device, bytes in float32 of those in 4 bits that fit into the heap)

    NF4 takes half a byte a weight and a scale for each NF4_BLOCK of them: float32, or a byte where scales are
    quantised as well (Dettmers et al. 2023, arXiv:2305.14314, section 3).
    """
    layer_of = {id(parameter): number for number, layer in enumerate(fsdp.layers(model) if shards > 1 else ())
                for parameter in layer.parameters()}  # fmt: skip
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    four_bit = {id(module.weight) for module in linear if place.four_bit}
    eight_bit = {id(module.weight): len(module.weight) for module in linear if place.eight_bit}
    scale = 1 + 4 / _SCALES if config.double_quantization else 4
    whole, heap, sharded = 0, 0, Counter[int]()
    for parameter in model.parameters():
        if parameter.requires_grad or (parameter is embeddings.weight and keeps_embeddings_off(model, place)):
            continue
        size = parameter.numel() * parameter.element_size()
        if id(parameter) in four_bit:
            size = parameter.numel() // 2
            heap += 4 * parameter.numel() if 4 * parameter.numel() <= _HEAP_CHUNK else 0
            whole += int(parameter.numel() / NF4_BLOCK * scale)
        if id(parameter) in eight_bit:
            # A byte a weight, and a scale in float32 for each row.
            size = parameter.numel() + 4 * eight_bit[id(parameter)]
        if id(parameter) in layer_of:
            sharded[layer_of[id(parameter)]] += size
        else:
            whole += size
    # A shard of each layer, and the one that computes as a whole.
    return whole + (sharded.total() // shards + max(sharded.values()) if sharded else 0), heap


class Passes:
    """Bytes that a batch's passes need, beside parameters and gradients.

    Of each token a decoder layer keeps, for the backward pass:
      its input, all that checkpointing keeps of a layer that does not compute;
      what its norms compute with: the input of the second, in 16 bits a float32 copy of both;
      attention's query, key and value, and with eager attention a row of each head's matrix of scores;
      gate, up and the activation's output;
      the inputs of its linear layers, which several share, but for adapters of another type: each makes a
      float32 copy of its own; and the adapters' inner products.
    """

    def __init__(self, model: Any, config: TrainConfig, place: Place, *, longest: int) -> None:
        shape, full = model.config.get_text_config(), config.whole
        hidden, heads = int(shape.hidden_size), int(shape.num_attention_heads)
        size = int(getattr(shape, "head_dim", None) or hidden // heads)
        query, key = heads * size, int(getattr(shape, "num_key_value_heads", None) or heads) * size
        experts = getattr(shape, "num_experts_per_tok", 0) * getattr(shape, "moe_intermediate_size", 0)
        inner = int(max(shape.intermediate_size, experts))
        half = autocast(config, place)
        item = int((half or place.dtype).itemsize)
        packed = cuda_graphs.likely(config, place)
        graphs = packed and place.device == "cuda"
        self._cutoff = config.cutoff_len
        eager = cuda_graphs.attention_name(config, place, longest=min(longest, config.cutoff_len)) == "eager"
        rank = 0 if full else config.lora_rank
        if half is None and item == 2 and not full:
            inputs = 4 * (5 * hidden + query + inner + 7 * rank)
        else:
            inputs = item * (2 * hidden + query + inner + 7 * rank)
        # The float32 copies are kept in place of the 16-bit input.
        norms = item * hidden if item == 4 or graphs else 8 * hidden - item * hidden
        # Eager attention repeats key and value for each query head.
        attention = item * (3 * query if eager else query + 2 * key)
        self._kept = inputs + norms + attention + item * 3 * inner
        # The softmax is computed in float32, and a copy in 16 bits is used.
        self._scores = heads * (4 if item == 4 else 6) if eager else 0
        self._hidden, self._inner, self._item = item * hidden, item * inner, item
        self._packed, self._graphs = packed, graphs
        self._dequantised = hidden * inner * item if place.four_bit or place.eight_bit else 0
        self._layers, self._width, self._vocabulary = (
            int(shape.num_hidden_layers),
            hidden,
            int(shape.vocab_size),
        )
        self._checkpoints = not config.disable_gradient_checkpointing
        head = model.get_output_embeddings()
        plain = type(head) is nn.Linear and not head.weight.requires_grad
        self._in_pieces = plain and not getattr(shape, "final_logit_softcapping", None)

    def training(self, batch: list[Any]) -> int:
        """Of a forward and backward pass. The peak is in the loss, or in the last layer's gradients."""
        tokens, learnt, scores = self._measure(batch)
        stream, inner = tokens * self._hidden, tokens * self._inner
        layer = tokens * self._kept + scores
        # Of one layer: gradients of two of its widest tensors, or of one and the dequantised weight; or three
        # matrices of scores, where the widest tensors have been used.
        gradients = 2 * stream + max(2 * inner, inner + self._dequantised, 2 * scores - 4 * inner)
        loss = 2 * stream + self._loss(learnt)
        if self._checkpoints:
            return self._layers * stream + max(layer + gradients, loss)
        return self._layers * (stream + layer) + max(gradients, loss)

    def evaluation(self, batch: list[Any]) -> int:
        """Of a forward pass alone."""
        tokens, learnt, scores = self._measure(batch)
        layer = 3 * tokens * self._inner + 3 * scores + self._dequantised
        return 2 * tokens * self._hidden + max(layer, self._loss(learnt))

    def _measure(self, batch: list[Any]) -> tuple[int, int, int]:
        """(tokens with padding, tokens with loss, bytes of a layer's attention scores)"""
        samples: list[Sample] = []
        for item in batch:
            # The other answers of kto get no gradient, and are gone by then.
            samples += (item.answer,) if isinstance(item, Judged) else item.parts
        # A proposal may ask for shorter rows than those that were prepared.
        lengths = [min(len(sample.ids), self._cutoff) for sample in samples]
        learnt = sum(min(sample.learnt, self._cutoff) for sample in samples)
        scores = len(lengths) * self._scores * max(lengths) ** 2
        tokens = sum(lengths) if self._packed else len(lengths) * max(lengths)
        tokens = cuda_graphs.size(tokens) if self._graphs else tokens
        return tokens, learnt, scores

    def _loss(self, learnt: int) -> int:
        """Of the tokens with loss: hidden states with their gradients, and logits, in pieces or whole."""
        if not self._in_pieces:
            # Logits, their float32 copy, log-softmax and its gradient.
            return learnt * self._vocabulary * (12 if self._item == 4 else 14)
        rows = min(learnt, loss_rows(learnt, self._width, self._vocabulary))
        # float32 logits, and as many that logsumexp computes with.
        return 2 * learnt * self._hidden + rows * self._vocabulary * 8


def dequantised_once(model: Any, config: TrainConfig, place: Place) -> int:
    """Bytes of the weights in 4 bits that a CPU may keep dequantised as well; 0 where it cannot."""
    able = place.device == "cpu" and place.four_bit and place.dtype == torch.float32
    return 4 * fused_kernels.weights(model) if able and cuda_graphs.likely(config, place) else 0


def _batches(config: TrainConfig, data: Prepared) -> Iterator[list[Any]]:
    """The batches that will come, of ten epochs at most."""
    shuffle = None if config.disable_shuffling else random.Random(config.seed)
    left = total_steps(config, len(data.train)) * config.gradient_accumulation_steps
    for _ in range(10 if shuffle else 1):
        epoch = batches(data.train, config.per_device_train_batch_size, shuffle)[:left]
        yield from epoch
        left -= len(epoch)
        if left <= 0:
            return


def free(place: Place) -> int:
    """Bytes that training may take on its device; 0 where it is not known."""
    if place.device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    memory = hardware.memory()
    return memory.available if place.device == "cpu" else int(memory.total * 0.75)


def check(
    base: Path,
    config: TrainConfig,
    data: Prepared,
    place: Place,
    *,
    console: Console,
    shards: int = 1,
    tokens: int = 0,
    alone: bool = True,
) -> Estimate:
    """Say what training will take. Raises EdgeError, with settings that fit, where less is free.

    shards: as for `estimate`; tokens: as for `skeleton`; alone: no other process trains with this one.
    """
    model = skeleton(base, config, place, tokens=tokens)
    need = estimate(base, config, data, place, model=model, shards=shards)
    room, said = free(place), ""
    copies = dequantised_once(model, config, place)
    # As much again is left to other programs.
    if copies and alone and need.total + 2 * copies <= room:
        need = replace(need, weights=need.weights + copies, kept=copies)
        said = f"; {copies / 2**30:.2f} GiB of it for weights that are dequantised once, not in every step"
    console.print(f"memory: {need} at the peak, {room / 2**30:.2f} GiB free{said}")
    if need.total <= room or config.ignore_memory:
        return need

    def fits(trial: TrainConfig) -> bool:
        return estimate(base, trial, data, place, model=model, shards=shards).total <= room

    raise EdgeError(
        f"training needs about {need.total / 2**30:.2f} GiB, {place.device} has {room / 2**30:.2f} GiB free"
        + (hardware.memory().within if place.device == "cpu" else ""),
        _proposal(config, fits) + "; or ignore_memory: true to try",
    )


def _proposal(config: TrainConfig, fits: Callable[[TrainConfig], bool]) -> str:
    """The mildest change of settings that fits, in words."""
    trial = replace(config, disable_gradient_checkpointing=False)
    while not fits(trial) and trial.per_device_train_batch_size > 1:
        trial = replace(
            trial,
            per_device_train_batch_size=trial.per_device_train_batch_size // 2,
            gradient_accumulation_steps=trial.gradient_accumulation_steps * 2,
        )
    changes = [
        f"{key}: {str(getattr(trial, key)).lower()}"
        for key in (
            "disable_gradient_checkpointing",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        )
        if getattr(trial, key) != getattr(config, key)
    ]
    if fits(trial):
        return "this fits: " + ", ".join(changes)
    while trial.cutoff_len > 64:
        trial = replace(trial, cutoff_len=trial.cutoff_len // 2)
        if fits(trial):
            return "this fits: " + ", ".join([*changes, f"cutoff_len: {trial.cutoff_len}"])
    if config.quantization_bit is None and config.finetuning_type == "lora":
        return "quantization_bit: 4 needs a quarter of the memory for weights"
    return (
        "even the shortest rows do not fit: take a smaller model, free some memory, or shard the weights "
        "over several GPUs (fsdp: full_shard)"
    )
