"""How much memory training will take, from the real batches, before the first weight is loaded.

The model is built without storage (torch's meta device) and taken through forward and backward passes of the
largest batches that will come; every tensor that would live is counted, so that the peak follows from the
architecture, the adapter, checkpointing and the vocabulary, and not from a rule of thumb.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from convert.encode import Pair, Sample
from convert.loop import batches
from convert.losses import LossHead
from convert.model import Place, add_adapter, no_advice, unfreeze
from convert.prepare import Prepared
from edge import hardware
from edge.config import TrainConfig
from edge.errors import EdgeError

# What a process holds beside tensors. On a CPU: torch and its friends, and what the C allocator keeps of
# freed pieces, which grows with the tokens of a batch (fitted to measured peaks, see docs/NOTES.md). On a
# card: workspaces of the matrix library.
CPU_PROCESS, CPU_TOKEN, CUDA_WORKSPACE = 560 * 2**20, 420_000, 40 * 2**20
_BLOCK, _DOUBLE = 64, 256


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak. weights: as they lie on the device. trained: parameters that are trained, with
    gradients and optimizer. passes: activations and what is computed with. other: the process itself."""

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
    """Counts the bytes of all storages that operations make, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

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
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Quantized.apply(x, self.weight, self.bias).clone()


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


def _fused(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def estimate(
    base: Path, config: TrainConfig, made: Prepared, place: Place, *, eager: bool, model: Any = None
) -> Estimate:
    """The peak of training `made` as `config` says, in bytes. model: what `skeleton` gave, to use again."""
    full = config.finetuning_type == "full"
    model = model if model is not None else skeleton(base, config, place, eager=eager)
    weights = trained = 0
    seen: set[int] = set()
    for module in model.modules():
        for name, one in module.named_parameters(recurse=False):
            if id(one) in seen:  # the output head may be the embeddings
                continue
            seen.add(id(one))
            if one.requires_grad:
                trained += one.numel() * one.element_size()
            elif isinstance(module, _Layer) and name == "weight":
                scale = 1 + 4 / _DOUBLE if config.double_quantization else 4
                weights += int(one.numel() / 2 + one.numel() / _BLOCK * scale)
            else:
                weights += one.numel() * one.element_size()
    # A gradient, and Adam's two numbers in float32 or in eight bits.
    each = 4 + (2 if config.optim == "paged_adamw_8bit" else 8)
    kept = trained + trained // 4 * each
    autocast = place.dtype if full and place.dtype != torch.float32 else None
    largest = _largest(config, made)
    passes = max(_passes(model, batch, autocast) for batch in largest)
    other = CUDA_WORKSPACE
    if place.device == "cpu":
        other = CPU_PROCESS + CPU_TOKEN * max(map(_padded, largest))
    return Estimate(weights, kept, passes, other)


def skeleton(base: Path, config: TrainConfig, place: Place, *, eager: bool) -> Any:
    """The model that is to be trained, without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    no_advice()
    ALL_ATTENTION_FUNCTIONS.register("edge_fused", _fused)
    full = config.finetuning_type == "full"
    shape = AutoConfig.from_pretrained(base, local_files_only=True)
    shape._attn_implementation = "eager" if eager else "edge_fused"
    quiet = dataclasses.replace(config, pissa_init=False)
    # The real model's start must find the random numbers as they were.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(
            shape,
            dtype=torch.float32 if full else place.dtype,
            attn_implementation=shape._attn_implementation,
        )
        if full:
            return unfreeze(model, config)
        if place.four_bit:
            head = model.get_output_embeddings()
            for module in model.modules():
                if type(module) is nn.Linear and module is not head:
                    module.__class__ = _Layer
        return add_adapter(model, quiet)


def _largest(config: TrainConfig, made: Prepared) -> list[list[Any]]:
    """The batches that may need most: by padded tokens, by tokens with loss, by the square of the length."""
    kinds = (_padded, _learnt, _square)
    best: list[list[Any]] = []
    shuffle = None if config.disable_shuffling else random.Random(config.seed)
    for _ in range(min(10, math.ceil(config.num_train_epochs)) if shuffle else 1):
        many = batches(made.train, config.per_device_train_batch_size, shuffle)
        best = [max([*many, *best[at : at + 1]], key=weigh) for at, weigh in enumerate(kinds)]
    return list({id(batch): batch for batch in best}.values())


def _padded(batch: list[Any]) -> int:
    return len(batch) * max(item.size for item in batch)


def _learnt(batch: list[Any]) -> int:
    return sum(item.learnt for item in batch)


def _square(batch: list[Any]) -> int:
    return len(batch) * max(item.size for item in batch) ** 2


def _passes(model: Any, batch: list[Any], autocast: torch.dtype | None) -> int:
    """Bytes at the peak of one forward and backward pass, without what is there before it."""
    samples: list[Sample] = [
        one for item in batch for one in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))
    ]
    model.train()
    for one in model.parameters():
        one.grad = None
    longest = max(len(one.ids) for one in samples)
    keep = sum(one.learnt for one in samples)
    head = model.get_output_embeddings()
    # The positions that are learnt cannot be looked up without storage: any as many will do.
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].reshape(-1, args[0].shape[-1])[:keep],))
    counted = Peak()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), counted:
            warnings.simplefilter("ignore")
            ids = torch.zeros(len(samples), longest, dtype=torch.long, device="meta")
            targets = torch.zeros(keep, dtype=torch.long, device="meta")
            # Given whole: transformers would look into the positions to make it.
            side = longest if model.config._attn_implementation == "eager" else 1
            mask = torch.zeros(len(samples), 1, side, side, dtype=model.dtype, device="meta")
            with LossHead(model, autocast=autocast)._computing("cpu"):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            nn.functional.cross_entropy(logits.float(), targets, reduction="none").sum().backward()
            del logits
    finally:
        hook.remove()
        grads = sum(
            one.grad.numel() * one.grad.element_size() for one in model.parameters() if one.grad is not None
        )
        for one in model.parameters():
            one.grad = None
    return max(0, counted.peak - grads)


def free(place: Place) -> int:
    """Bytes that training may take on its device; 0 where it is not known."""
    if place.device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    found = hardware.memory()
    return found.available if place.device == "cpu" else int(found.total * 0.75)


def check(
    base: Path, config: TrainConfig, made: Prepared, place: Place, *, eager: bool, console: Console
) -> Estimate:
    """Say what training will take. Raises EdgeError, with settings that fit, where less is free."""
    model = skeleton(base, config, place, eager=eager)
    found = estimate(base, config, made, place, eager=eager, model=model)
    room = free(place)
    console.print(f"memory: {found} at the peak, {room / 2**30:.2f} GiB free")
    if found.total <= room or config.ignore_memory:
        return found
    raise EdgeError(
        f"training needs about {found.total / 2**30:.2f} GiB, {place.device} has {room / 2**30:.2f} GiB free",
        _proposal(base, config, made, place, room) + "; or ignore_memory: true to try",
    )


def _proposal(base: Path, config: TrainConfig, made: Prepared, place: Place, room: int) -> str:
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
        if _fits(base, trial, made, place, room):
            break
    for key in (
        "disable_gradient_checkpointing",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ):
        if getattr(trial, key) != getattr(config, key):
            said.append(f"{key}: {str(getattr(trial, key)).lower()}")
    if _fits(base, trial, made, place, room):
        return "this fits: " + ", ".join(said)
    cut = trial.cutoff_len
    while cut > 64:
        cut //= 2
        if _fits(base, trial, _shortened(made, cut), place, room):
            return "this fits: " + ", ".join([*said, f"cutoff_len: {cut}"])
    if config.quantization_bit is None and config.finetuning_type == "lora":
        return "quantization_bit: 4 needs a quarter of the memory for weights"
    return "even the shortest rows do not fit: take a smaller model, or free some memory"


def _fits(base: Path, config: TrainConfig, made: Prepared, place: Place, room: int) -> bool:
    eager = place.device == "cpu" and made.longest <= 512
    return estimate(base, config, made, place, eager=eager).total <= room


def _shortened(made: Prepared, cut: int) -> Prepared:
    def short(sample: Sample) -> Sample:
        spans = tuple((start, min(end, cut)) for start, end in sample.spans if start < cut)
        return dataclasses.replace(sample, ids=sample.ids[:cut], spans=spans or ((1, min(2, cut)),))

    def item(one: Any) -> Any:
        if isinstance(one, Pair):
            return dataclasses.replace(one, chosen=short(one.chosen), rejected=short(one.rejected))
        return short(one)

    return dataclasses.replace(made, train=[item(one) for one in made.train])
