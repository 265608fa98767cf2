"""Training's forward pass on a CUDA card: rows behind one another without padding, replayed as CUDA graphs.

A small model's step is bound by the launches of its ten thousand kernels, not by what they compute. A batch
becomes one sequence, padded to one of few sizes; the passes through the decoder at a size are recorded once,
forward and backward, and replayed for every later batch of that size. Embeddings and the loss stay outside:
they are few kernels, and what they do depends on the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from convert.config import TrainConfig
from convert.train.fused_kernels import fuse
from convert.train.load_model import (
    Place,
    autocast,
    drops,
    keep_embeddings_off,
    keeps_embeddings_off,
    use_liger,
)
from convert.train.losses import LossHead, head_is_more

# The name under which transformers finds the attention below.
ATTENTION = "edge_packed"
# Above this, eager attention's square matrices cost more than they save on a CPU.
_EAGER_LONGEST = 512
# Sizes beyond these are not recorded but run as they come: each holds its buffers.
_MOST = 48


def register() -> None:
    """Make ATTENTION known to transformers; what is not packed is computed as `sdpa` would."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a packed sequence, or transformers' sdpa where nothing is packed.

    query: (1, heads, tokens, width); key and value may have fewer heads. Gives (1, tokens, heads, width).
    """
    bounds = more.get("cu_seq_lens_q")
    if bounds is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **more)
        return found
    # Rotation may have left the type that the rest is computed in.
    query, key, value = (one.to(value.dtype).transpose(1, 2)[0] for one in (query, key, value))
    longest = more["max_length_q"]
    # So many tokens before its own a token sees, where that is limited.
    reach = more["sliding_window"] - 1 if more.get("sliding_window") else None
    # torch's own flash attention over rows of unequal length; it takes grouped heads as they are.
    out = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False,
        scale=more.get("scaling"), window_size_left=reach, window_size_right=None if reach is None else 0,
    )[0]  # fmt: skip
    return out[None], None


def attention_name(place: Place, *, longest: int) -> str:
    """The attention that a model is loaded with, to be trained on rows of at most `longest` tokens."""
    if place.device != "cuda":
        return "eager" if place.device == "cpu" and longest <= _EAGER_LONGEST else "sdpa"
    register()
    return ATTENTION


def decoder(model: Any) -> Any:
    """The part of a causal model, with or without an adapter, below its output head."""
    whole = getattr(model, "get_base_model", lambda: model)()
    return getattr(whole, whole.base_model_prefix)


def likely(config: TrainConfig, place: Place) -> bool:
    """Whether rows will be joined, as far as that is known before the model is there."""
    return place.device == "cuda" and config.finetuning_type == "lora" and not _refused(config, place.dtype)


def _refused(config: TrainConfig, dtype: torch.dtype) -> str:
    """Why settings alone keep rows from being joined ("" if they do not)."""
    if dtype == torch.float32:
        return "float32 has no flash attention"
    if config.neftune_noise_alpha:
        return "neftune_noise_alpha scales its noise by the length of a row"
    return ""


def usable(model: Any, config: TrainConfig, dtype: torch.dtype) -> str:
    """Why the model, with its adapter, cannot be trained on joined rows ("" if it can)."""
    if why := _refused(config, dtype):
        return why
    shape = model.config.get_text_config()
    if torch.cuda.get_device_capability() < (8, 0):
        return "the card has no flash attention"
    if getattr(shape, "attn_logit_softcapping", None):
        return "its attention caps its logits"
    wide = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    if wide > 256:
        return "its heads are wider than flash attention takes"
    return head_is_more(model)


def recordable(model: Any) -> str:
    """Why the passes cannot be recorded ("" if they can)."""
    shape = model.config.get_text_config()
    if drops(model):
        return "dropout draws anew in every pass"
    if getattr(shape, "num_experts", None) or getattr(shape, "num_local_experts", None):
        return "which experts compute depends on the row"
    return ""


def head(
    model: Any, config: TrainConfig, place: Place, *, passes: int = 0, sharded: bool = False
) -> tuple[LossHead, str]:
    """The losses of a model that is trained, and on a CUDA card a line that says how they are computed.

    passes: bytes that a forward and backward pass needs; a recorded one keeps them, beside those of a batch
    of a size that comes for the first time. sharded: the weights are, see `convert.train.fsdp`. The model's
    attention must be `attention_name`'s. On a card an adapted model's embeddings go to the system's memory
    if they can.
    """
    half = autocast(config, place)
    if place.device != "cuda" or config.finetuning_type == "full":
        if config.enable_liger_kernel:
            use_liger(model, place)
        return LossHead(model, autocast=half), ""
    # All on one stream, for each keeps the workspaces that it grew; and the usual one cannot be recorded.
    torch.cuda.set_stream(torch.cuda.Stream())
    if keeps_embeddings_off(model, place):
        keep_embeddings_off(model)
    if why := usable(model, config, place.dtype):
        said = f"rows are padded to the longest of their batch, kernels launched one by one: {why}"
        if config.enable_liger_kernel:
            use_liger(model, place)
        return LossHead(model, autocast=half), said
    if not sharded:
        fuse(model)
    torch.cuda.empty_cache()
    why = "its weights are sharded over processes" if sharded else recordable(model)
    if not why and torch.cuda.mem_get_info()[0] < 2 * passes:
        why = f"a recording needs {2 * passes / 2**30:.2f} GiB free"
    body = Body(model, autocast=half, record=not why)
    how = f"kernels are launched one by one: {why}" if why else "passes are recorded as CUDA graphs"
    if config.enable_liger_kernel:
        # Its gates, launched over joined rows, read where nothing was (seen on an H100).
        how += "; in place of liger-kernel's layers, which gain less"
    return LossHead(model, autocast=half, body=body), f"rows are joined without padding, {how}"


def size(tokens: int) -> int:
    """The size that a batch of `tokens` is padded to: multiples of 32, then eight or more sizes an octave."""
    step = max(32, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


@dataclass
class _Recorded:
    """Buffers of one size, and the passes that read and write them."""

    embedded: torch.Tensor
    places: torch.Tensor
    bounds: torch.Tensor
    hidden: torch.Tensor
    gradient: torch.Tensor
    forward: Any
    backward: Any


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, one: _Recorded) -> torch.Tensor:
        ctx.one = one
        one.forward.replay()
        return one.hidden.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        # The parameters' gradients are added by the recorded pass itself.
        ctx.one.gradient.copy_(gradients[0])
        ctx.one.backward.replay()
        return None, None


class Body:
    """The decoder of a causal model, over rows that lie behind one another in one sequence.

    autocast: the type to compute in where parameters have another. record: whether to replay passes as CUDA
    graphs; gradients must then be buffers that stay where they are, and the stream not the usual one. A pass
    is recorded when its size comes for the second time, so that whatever sets itself up at first use has.
    """

    def __init__(self, model: Any, *, autocast: torch.dtype | None, record: bool) -> None:
        self._decoder = decoder(model)
        self._embeddings = model.get_input_embeddings()
        self._autocast, self._record, self._model = autocast, record, model
        # transformers makes no mask of its own where it gets one with four axes.
        self._mask = torch.zeros(1, 1, 1, 1, device="cuda")
        self._anchor = torch.zeros((), device="cuda", requires_grad=True)
        self._seen: set[tuple[int, int]] = set()
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        if record:
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """(tokens, width): the last hidden state of each of `ids` (tokens,), rows of `lengths`."""
        tokens = len(ids)
        whole = size(tokens) if self._model.training else tokens
        starts = torch.tensor([0, *lengths]).cumsum(0)
        places = torch.cat([torch.arange(length) for length in lengths])
        # Rows of no length fill up their number to a power of two, and one more takes the padding.
        many = max(8, 1 << len(lengths).bit_length())
        bounds = functional.pad(starts, (0, many + 1 - len(starts)), value=whole).int()
        ids, places = (functional.pad(one, (0, whole - tokens))[None] for one in (ids, places))
        embedded = self._embeddings(ids if self._embeddings.weight.device.type == "cpu" else _sent(ids))
        places, bounds = _sent(places), _sent(bounds)
        if not (self._record and self._model.training and torch.is_grad_enabled()):
            return self._pass(embedded, places, bounds)[0, :tokens]
        key = (whole, many)
        one = self._recorded.get(key)
        if one is None and key in self._seen and len(self._recorded) < _MOST:
            one = self._recorded[key] = self._recording(embedded, places, bounds)
        self._seen.add(key)
        if one is None:
            return self._pass(embedded, places, bounds)[0, :tokens]
        one.embedded.copy_(embedded)
        one.places.copy_(places)
        one.bounds.copy_(bounds)
        found: torch.Tensor = _Replay.apply(self._anchor, one)
        return found[0, :tokens]

    def _pass(self, embedded: torch.Tensor, places: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        longest = embedded.shape[1]
        with self._computing():
            found: torch.Tensor = self._decoder(
                inputs_embeds=embedded,
                position_ids=places,
                attention_mask=self._mask,
                use_cache=False,
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=longest,
                max_length_k=longest,
            ).last_hidden_state
        return found

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        # A cast that was kept from one pass would be missing in the recording of another.
        return torch.autocast("cuda", self._autocast, cache_enabled=False)

    def _recording(self, *like: torch.Tensor) -> _Recorded:
        embedded, places, bounds = (one.detach().clone() for one in like)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _capture(forward, self._pool):
            hidden = self._pass(embedded, places, bounds)
        gradient = torch.zeros_like(hidden)
        with _capture(backward, self._pool):
            hidden.backward(gradient)
        return _Recorded(embedded, places, bounds, hidden.detach(), gradient, forward, backward)


def _sent(one: torch.Tensor) -> torch.Tensor:
    """A tensor on the card, without waiting for it."""
    return one.pin_memory().cuda(non_blocking=True)


def _capture(graph: Any, pool: Any) -> contextlib.AbstractContextManager[None]:
    captured: Callable[..., contextlib.AbstractContextManager[None]] = torch.cuda.graph
    return captured(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local")
