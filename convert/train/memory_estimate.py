"""How much memory training will take, from the real batches, before the first weight is loaded.

The model is built without storage (torch's meta device) and taken through forward and backward passes of the
largest batches that will come; every tensor that would live is counted, so that the peak follows from the
architecture, the adapter, checkpointing and the vocabulary, and not from a rule of thumb.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from convert.config import TrainConfig
from convert.data.encode import Pair, Sample
from convert.data.prepare import Prepared
from convert.train import cuda_graphs, fsdp, malloc_trim
from convert.train.fused_kernels import fuse
from convert.train.load_model import Place, add_adapter, autocast, keeps_embeddings_off, no_advice, unfreeze
from convert.train.losses import TokenLoss, by_length, head_is_more
from convert.train.trainer import batches, total_steps
from edge.errors import EdgeError
from edge.machine import hardware

# What a process holds beside tensors. On a CPU: torch and its friends; freed pieces that the C allocator
# keeps, as a share of what passes need, and bytes for each token, layer and unit of width (fitted to three
# measured peaks, see docs/decisions.md), where it is not made to give them back (`convert.train.malloc_trim`). On a card:
# workspaces of the matrix library.
CPU_PROCESS, CPU_KEPT, CPU_TOKEN = 520 * 2**20, 0.22, 15
CUDA_WORKSPACE = 40 * 2**20
_BLOCK, _DOUBLE = 64, 256
# In place of a layer's number: weights that every process has.
_EVERYWHERE = -1


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak. weights: as they lie on the device. trained: parameters that are trained, and what
    the optimizer knows of them. passes: gradients, activations and what is computed with. other: the process
    itself. While the weights are read the files' pages are in memory too; those the system takes back."""

    weights: int
    trained: int
    passes: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.passes + self.other

    def __str__(self) -> str:
        parts = ("weights", "trained", "passes", "other")
        shown = ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in parts)
        return f"{self.total / 2**30:.2f} GiB ({shown})"


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, and the most that lived at once.

    there: tensors that were there before and are not counted, nor are their views.
    """

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {one.untyped_storage()._cdata: one for one in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_iter(made):
            if isinstance(one, torch.Tensor):
                self._see(one.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class _Quantized(torch.autograd.Function):
    """What a 4-bit layer does with memory: its weight is unpacked for each product, and kept for none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.shape, ctx.dtype = weight.shape, x.dtype
        whole = torch.empty(weight.shape, dtype=x.dtype, device="meta")
        return nn.functional.linear(x, whole, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        whole = torch.empty(ctx.shape, dtype=ctx.dtype, device="meta")
        return gradients[0] @ whole, None, None


class _Layer(nn.Linear):
    def unpacked(self) -> torch.Tensor:
        return torch.empty_like(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Quantized.apply(x, self.weight, self.bias).clone()


class _Norm(torch.autograd.Function):
    """What a norm in one kernel does with memory: it keeps its input, and a number for each token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(gradients[0])


class _Attention(torch.autograd.Function):
    """What fused attention does with memory: nothing that grows with the square of the length."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Gated(torch.autograd.Function):
    """liger-kernel's silu(gate) * up: keeps both inputs, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(ctx.saved_tensors)


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))


def _fused(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def estimate(
    base: Path,
    config: TrainConfig,
    made: Prepared,
    place: Place,
    *,
    eager: bool,
    model: Any = None,
    joined: bool = False,
    shards: int = 1,
) -> Estimate:
    """The peak of training `made` as `config` says, in bytes.

    model: what `skeleton` gave, to use again. joined: rows lie behind one another, see `convert.train.cuda_graphs`.
    shards: processes that the layers' frozen weights are spread over, see `convert.train.fsdp`.
    """
    model = model if model is not None else skeleton(base, config, place, eager=eager, joined=joined)
    weights = trained = 0
    seen: set[int] = (
        {id(model.get_input_embeddings().weight)} if keeps_embeddings_off(model, place) else set()
    )
    layer_of = {id(one): at for at, layer in enumerate(fsdp.layers(model) if shards > 1 else ())
                for one in layer.parameters()}  # fmt: skip
    gathered: Counter[int] = Counter()
    for module in model.modules():
        for name, one in module.named_parameters(recurse=False):
            if id(one) in seen:  # the output head may be the embeddings
                continue
            seen.add(id(one))
            if one.requires_grad:
                trained += one.numel() * 4
            elif isinstance(module, _Layer) and name == "weight":
                scale = 1 + 4 / _DOUBLE if config.double_quantization else 4
                weights += int(one.numel() / _BLOCK * scale)
                gathered[layer_of.get(id(one), _EVERYWHERE)] += one.numel() // 2
            else:
                gathered[layer_of.get(id(one), _EVERYWHERE)] += one.numel() * one.element_size()
    weights += gathered.pop(_EVERYWHERE, 0)
    if gathered:
        # A part of each layer, and the one that computes as a whole.
        weights += gathered.total() // shards + max(gathered.values())
    paged = config.optim == "paged_adamw_8bit"
    # Adam's two numbers in float32. Paged ones lie in the system's memory when the card's is needed.
    kept = trained + (0 if paged else trained * 2)
    largest = _largest(config, made)
    pieces = joined or not head_is_more(model, attention_mask=_mask(model, 1, 8))
    passes = max(_passes(model, batch, config, joined=joined, pieces=pieces) for batch in largest)
    for batch in list(by_length(made.held, config.per_device_eval_batch_size))[-1:]:
        passes = max(passes, _passes(model, batch, config, learn=False, joined=joined, pieces=pieces))
    if autocast(config, place) is not None:
        passes += trained  # copies in 16 bits, and gradients twice as large as they were counted
    if not paged:
        # At the step: every gradient, and what the update computes with: of all at once on a card.
        each = [one.numel() * 4 for one in model.parameters() if one.requires_grad]
        passes = max(passes, trained + (trained if place.device != "cpu" else 3 * max(each)))
    if place.device != "cpu":
        return Estimate(weights, kept, passes, CUDA_WORKSPACE)
    shape = model.config.get_text_config()
    tokens = max(map(_padded, largest)) * shape.num_hidden_layers * shape.hidden_size
    freed = int(CPU_KEPT * passes) + CPU_TOKEN * tokens
    if malloc_trim.giver() and not config.disable_gradient_checkpointing:
        # Eleven runs came within 10 % of it, from 0.98 to 1.11 GiB where this counts 1.07.
        freed = min(freed, malloc_trim.SLACK * 4 // 5)
    return Estimate(weights, kept, passes, CPU_PROCESS + freed)


def skeleton(base: Path, config: TrainConfig, place: Place, *, eager: bool, joined: bool = False) -> Any:
    """The model that is to be trained, without storage. joined: as `convert.train.cuda_graphs` trains it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    no_advice()
    ALL_ATTENTION_FUNCTIONS.register("edge_fused", _fused)
    full, half = config.finetuning_type == "full", autocast(config, place)
    shape = AutoConfig.from_pretrained(base, local_files_only=True)
    shape._attn_implementation = "eager" if eager else "edge_fused"
    quiet = dataclasses.replace(config, pissa_init=False)
    # The real model's start must find the random numbers as they were.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(
            shape,
            dtype=(half or torch.float32) if full else place.dtype,
            attn_implementation=shape._attn_implementation,
        )
        if config.enable_liger_kernel and not joined:
            for module in model.modules():
                if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
                    module.forward = functools.partial(_gated, module)
        if full:
            return unfreeze(model, config)
        if place.four_bit:
            head = model.get_output_embeddings()
            for module in model.modules():
                if type(module) is nn.Linear and module is not head:
                    module.__class__ = _Layer
        adapted = add_adapter(model, quiet)
        for one in adapted.parameters():
            if one.requires_grad and half is not None:
                one.data = one.data.to(half)
        if joined:
            fuse(adapted)
            for module in adapted.modules():
                if hasattr(module, "variance_epsilon"):
                    module.forward = _Norm.apply
        return adapted


def _largest(config: TrainConfig, made: Prepared) -> list[list[Any]]:
    """The batches that may need most of those that will come: by padded tokens, by tokens with loss, by the
    square of the length."""
    best: list[list[Any]] = []
    shuffle = None if config.disable_shuffling else random.Random(config.seed)
    left = total_steps(config, len(made.train)) * config.gradient_accumulation_steps
    for _ in range(10 if shuffle else 1):
        many = batches(made.train, config.per_device_train_batch_size, shuffle)[:left]
        best = [max([*many, *best[at : at + 1]], key=weigh) for at, weigh in enumerate(_KINDS)]
        left -= len(many)
        if left <= 0:
            break
    return list({id(batch): batch for batch in best}.values())


def _padded(batch: list[Any]) -> int:
    return len(batch) * max(item.size for item in batch)


def _learnt(batch: list[Any]) -> int:
    return sum(item.learnt for item in batch)


def _square(batch: list[Any]) -> int:
    return len(batch) * max(item.size for item in batch) ** 2


_KINDS = (_padded, _learnt, _square)


def _passes(
    model: Any, batch: list[Any], config: TrainConfig, *, learn: bool = True, joined: bool, pieces: bool
) -> int:
    """Bytes at the peak of one forward and backward pass (or an evaluation), beside the parameters."""
    samples: list[Sample] = [
        one for item in batch for one in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))
    ]
    model.train(learn)
    keep = sum(one.learnt for one in samples)
    shape = len(samples), max(len(one.ids) for one in samples)
    if joined:
        shape = 1, cuda_graphs.size(sum(len(one.ids) for one in samples))
    counted = Peak(itertools.chain(model.parameters(), model.buffers()))
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.set_grad_enabled(learn),
            counted,
        ):
            warnings.simplefilter("ignore")
            for one in model.parameters():
                # They stay where they are from step to step.
                one.grad = torch.empty_like(one) if learn and one.requires_grad else None
            losses = _losses(model, shape, keep, pieces=pieces)
            if learn:
                losses.sum().backward()
            del losses
    finally:
        for one in model.parameters():
            one.grad = None
    return counted.peak


def _mask(model: Any, rows: int, length: int) -> torch.Tensor:
    """A mask, given whole: transformers would look into the positions to make it."""
    side = length if model.config._attn_implementation == "eager" else 1
    return torch.zeros(rows, 1, side, side, dtype=model.dtype, device="meta")


def _losses(model: Any, shape: tuple[int, int], keep: int, *, pieces: bool) -> torch.Tensor:
    """Losses of `keep` tokens of a batch of `shape`. The positions that are learnt cannot be looked up
    without storage: any as many will do."""
    head = model.get_output_embeddings()
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    targets = torch.zeros(keep, dtype=torch.long, device="meta")
    given = {"input_ids": ids, "attention_mask": _mask(model, *shape), "use_cache": False}
    if pieces:
        hidden = cuda_graphs.decoder(model)(**given).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1])[:keep].clone()
        found: torch.Tensor = TokenLoss.apply(chosen, head.weight, targets)
        return found
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].reshape(-1, args[0].shape[-1])[:keep],))
    try:
        logits = model(**given).logits
    finally:
        hook.remove()
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def free(place: Place) -> int:
    """Bytes that training may take on its device; 0 where it is not known."""
    if place.device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    found = hardware.memory()
    return found.available if place.device == "cpu" else int(found.total * 0.75)


def check(
    base: Path,
    config: TrainConfig,
    made: Prepared,
    place: Place,
    *,
    eager: bool,
    console: Console,
    shards: int = 1,
) -> Estimate:
    """Say what training will take. Raises EdgeError, with settings that fit, where less is free."""
    joined = cuda_graphs.likely(config, place)
    model = skeleton(base, config, place, eager=eager, joined=joined)
    found = estimate(base, config, made, place, eager=eager, model=model, joined=joined, shards=shards)
    room = free(place)
    console.print(f"memory: {found} at the peak, {room / 2**30:.2f} GiB free")
    if found.total <= room or config.ignore_memory:
        return found
    raise EdgeError(
        f"training needs about {found.total / 2**30:.2f} GiB, {place.device} has {room / 2**30:.2f} GiB free",
        _proposal(base, config, made, place, room, shards) + "; or ignore_memory: true to try",
    )


def _proposal(base: Path, config: TrainConfig, made: Prepared, place: Place, room: int, shards: int) -> str:
    """The mildest change of settings that fits into `room` bytes, in words."""
    trial, said = config, []
    while True:
        size = trial.per_device_train_batch_size
        if not trial.disable_gradient_checkpointing and size == 1:
            break
        if trial.disable_gradient_checkpointing:
            trial = dataclasses.replace(trial, disable_gradient_checkpointing=False)
        else:
            more = trial.gradient_accumulation_steps * 2
            trial = dataclasses.replace(
                trial, per_device_train_batch_size=size // 2, gradient_accumulation_steps=more
            )
        if _fits(base, trial, made, place, room, shards):
            break
    for key in (
        "disable_gradient_checkpointing",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ):
        if getattr(trial, key) != getattr(config, key):
            said.append(f"{key}: {str(getattr(trial, key)).lower()}")
    if _fits(base, trial, made, place, room, shards):
        return "this fits: " + ", ".join(said)
    cut = trial.cutoff_len
    while cut > 64:
        cut //= 2
        if _fits(base, trial, _shortened(made, cut), place, room, shards):
            return "this fits: " + ", ".join([*said, f"cutoff_len: {cut}"])
    if config.quantization_bit is None and config.finetuning_type == "lora":
        return "quantization_bit: 4 needs a quarter of the memory for weights"
    return (
        "even the shortest rows do not fit: take a smaller model, free some memory, or spread the weights "
        "over several cards (fsdp: full_shard)"
    )


def _fits(base: Path, config: TrainConfig, made: Prepared, place: Place, room: int, shards: int) -> bool:
    eager = place.device == "cpu" and made.longest <= 512
    joined = cuda_graphs.likely(config, place)
    return estimate(base, config, made, place, eager=eager, joined=joined, shards=shards).total <= room


def _shortened(made: Prepared, cut: int) -> Prepared:
    def short(sample: Sample) -> Sample:
        spans = tuple((start, min(end, cut)) for start, end in sample.spans if start < cut)
        return dataclasses.replace(sample, ids=sample.ids[:cut], spans=spans or ((1, min(2, cut)),))

    def item(one: Any) -> Any:
        if isinstance(one, Pair):
            return dataclasses.replace(one, chosen=short(one.chosen), rejected=short(one.rejected))
        return short(one)

    return dataclasses.replace(made, train=[item(one) for one in made.train])
