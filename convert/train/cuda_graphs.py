"""Training passes over padding-free rows, on a CUDA GPU replayed as CUDA graphs.

A batch becomes one sequence, so that no product is computed for padding. On a GPU a small model's step is
bound by launching its ten thousand kernels, not by what they compute: there the sequence is padded to one of
few sizes; the passes through the decoder at a size are captured once, forward and backward, and replayed for
every later batch of that size. Embeddings and the loss stay outside: they are few kernels, and depend on the
batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
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
# Graphs at most, for each holds its buffers; further sizes run as they come.
_MOST = 48


def register() -> None:
    """Make ATTENTION known to transformers; rows with padding are computed as `sdpa` would."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
) -> Any:
    """Causal attention within each row of a padding-free sequence, or transformers' sdpa for padded rows.

    query: (1, heads, tokens, width); key and value may have fewer heads. Returns (1, tokens, heads, width)
    and None, for transformers' attention weights.
    """
    bounds = more.get("cu_seq_lens_q")
    if bounds is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, mask, **more)
    # The rotary embedding may have changed the type.
    query, key, value = (part.to(value.dtype).transpose(1, 2)[0] for part in (query, key, value))
    if not query.is_cuda:
        return _attention_by_rows(query, key, value, bounds.tolist(), more), None
    longest = more["max_length_q"]
    # With a sliding window: tokens before its own that a token sees.
    reach = more["sliding_window"] - 1 if more.get("sliding_window") else None
    # torch's own flash attention over rows of unequal length; it takes grouped heads as they are.
    out = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False,
        scale=more.get("scaling"), window_size_left=reach, window_size_right=None if reach is None else 0,
    )[0]  # fmt: skip
    return out[None], None


def _attention_by_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], more: dict[str, Any]
) -> torch.Tensor:
    """As `attention`, of (tokens, heads, width), with a call of torch's own for each row."""
    window = more.get("sliding_window")
    lengths = [end - start for start, end in pairwise(bounds)]
    rows = []
    # Split at once: slices would each add a gradient of the whole length.
    for length, *parts in zip(lengths, *(part.split(lengths) for part in (query, key, value)), strict=True):
        mask = None
        if window and length > window:
            mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        rows.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=more.get("scaling"), enable_gqa=True
            )[0].transpose(0, 1)
        )
    return torch.cat(rows)[None]


def attention_name(config: TrainConfig, place: Place, *, longest: int) -> str:
    """The attention that a model is loaded with, to be trained on rows of at most `longest` tokens."""
    if config.flash_attn == "disabled":
        return "eager"
    if place.device == "cuda" or likely(config, place):
        register()
        return ATTENTION
    eager = place.device == "cpu" and config.flash_attn == "auto" and longest <= _EAGER_LONGEST
    return "eager" if eager else "sdpa"


def decoder(model: Any) -> Any:
    """The part of a causal model, with or without an adapter, below its output head."""
    whole = getattr(model, "get_base_model", lambda: model)()
    return getattr(whole, whole.base_model_prefix)


def likely(config: TrainConfig, place: Place) -> bool:
    """Whether rows will be padding-free, as far as that is known before the model is loaded."""
    return place.device in ("cuda", "cpu") and not config.whole and not _refused(config, place)


def _refused(config: TrainConfig, place: Place) -> str:
    """Why the settings need padded rows ("" if they do not)."""
    if place.device == "cuda" and place.dtype == torch.float32:
        return "float32 has no flash attention"
    if config.flash_attn == "disabled":
        return "flash_attn is disabled"
    if config.quantization_bit == 8:
        return "8-bit layers take the large values of a batch apart"
    if config.neftune_noise_alpha:
        return "neftune_noise_alpha scales its noise by the length of a row"
    return ""


def usable(model: Any, config: TrainConfig, place: Place) -> str:
    """Why the model, with its adapter, cannot be trained on padding-free rows ("" if it can)."""
    if why := _refused(config, place):
        return why
    shape = model.config.get_text_config()
    if place.device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU has no flash attention"
    if getattr(shape, "attn_logit_softcapping", None):
        return "its attention caps its logits"
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    if place.device == "cuda" and width > 256:
        return "its heads are wider than flash attention takes"
    return head_is_more(model)


def capturable(model: Any) -> str:
    """Why the passes cannot be captured as CUDA graphs ("" if they can)."""
    shape = model.config.get_text_config()
    if drops(model):
        return "dropout draws random numbers in every pass"
    if getattr(shape, "num_experts", None) or getattr(shape, "num_local_experts", None):
        return "which experts compute depends on the tokens"
    return ""


def head(
    model: Any,
    config: TrainConfig,
    place: Place,
    *,
    passes: int = 0,
    sharded: bool = False,
    keep: bool = False,
) -> tuple[LossHead, str]:
    """The losses of a model to be trained, and on a CUDA GPU a line that says how they are computed.

    passes: bytes that a forward and backward pass needs; a graph keeps them, beside those of a batch of a new
    size. sharded: the weights are, see `convert.train.fsdp`. keep: on a CPU, weights in 4 bits are
    dequantised once. The model has the attention `attention_name`.
    On a GPU an adapted model's embeddings go to the system's memory if they can, and this and all passes are
    called within `own_stream`.
    """
    half = autocast(config, place)
    if place.device != "cuda" or config.whole:
        if config.enable_liger_kernel:
            use_liger(model, place)
        if place.dtype == torch.float32 and likely(config, place) and not sharded:
            # In 16 bits an adapter computes in float32 on a CPU, which the fused layer does not.
            fuse(model, keep=keep)
        if place.device == "mps" or config.whole or usable(model, config, place):
            return LossHead(model, autocast=half), ""
        return LossHead(model, autocast=half, body=Body(model, place.device, autocast=half)), ""
    if keeps_embeddings_off(model, place):
        keep_embeddings_off(model)
    if why := usable(model, config, place):
        if config.enable_liger_kernel:
            use_liger(model, place)
        how = f"rows are padded to the longest of their batch, kernels are launched one by one: {why}"
        return LossHead(model, autocast=half), how
    if not sharded:
        fuse(model)
    torch.cuda.empty_cache()
    why = "its weights are sharded over processes" if sharded else capturable(model)
    if not why and torch.cuda.mem_get_info()[0] < 2 * passes:
        why = f"CUDA graphs need {2 * passes / 2**30:.2f} GiB free"
    body = Body(model, place.device, autocast=half, capture=not why)
    how = f"kernels are launched one by one: {why}" if why else "passes are captured as CUDA graphs"
    if config.enable_liger_kernel:
        # Its gates read out of bounds over padding-free rows (seen on an H100).
        how += "; in place of liger-kernel's layers, which gain less"
    return LossHead(model, autocast=half, body=body), f"rows are padding-free, {how}"


@contextlib.contextmanager
def own_stream(place: Place) -> Iterator[None]:
    """Training's own stream of a CUDA GPU, for the time of the block; elsewhere nothing.

    All of training is on one stream, for each keeps its workspaces; and the default one cannot be captured.
    Models are loaded before: bitsandbytes quantises on the default stream, whichever is current, without
    waiting for the copy of what it quantises.
    """
    if place.device != "cuda":
        yield
        return
    own, before = torch.cuda.Stream(), torch.cuda.current_stream()
    own.wait_stream(before)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        before.wait_stream(own)


def size(tokens: int) -> int:
    """The size that a batch of `tokens` is padded to: multiples of 32, then eight or more sizes an octave."""
    step = max(32, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


@dataclass
class _Graphs:
    """Buffers of one size, and the captured passes that read and write them."""

    embedded: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    hidden: torch.Tensor
    gradient: torch.Tensor
    forward: Any
    backward: Any


class _Replay(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, graphs: _Graphs) -> torch.Tensor:
        ctx.graphs = graphs
        graphs.forward.replay()
        return graphs.hidden.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        # The captured pass adds the parameters' gradients itself.
        ctx.graphs.gradient.copy_(gradients[0])
        ctx.graphs.backward.replay()
        return None, None


class Body:
    """The decoder of a causal model, over padding-free rows in one sequence.

    device: cuda or cpu. autocast: the type to compute in where parameters have another. capture: whether to
    replay passes as CUDA graphs; gradients must then be buffers that stay in place, and the stream not the
    default one. A pass is captured when its size comes for the second time: what is set up at first use is
    there by then.
    """

    def __init__(
        self, model: Any, device: str, *, autocast: torch.dtype | None, capture: bool = False
    ) -> None:
        self._decoder = decoder(model)
        self._embeddings = model.get_input_embeddings()
        self._autocast, self._capture, self._model, self._device = autocast, capture, model, device
        # With a mask of four axes transformers makes none of its own.
        self._mask = torch.zeros(1, 1, 1, 1, device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._seen: set[tuple[int, int]] = set()
        self._graphs: dict[tuple[int, int], _Graphs] = {}
        if capture:
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """(tokens, width): the last hidden state of each of `ids` (tokens,), rows of `lengths`."""
        tokens = len(ids)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in lengths])
        if self._device == "cpu":
            return self._pass(self._embeddings(ids[None]), positions[None], starts)[0]
        whole = size(tokens) if self._model.training else tokens
        # Empty rows fill up the number of rows to a power of two, and one more takes the padding.
        rows = max(8, 1 << len(lengths).bit_length())
        bounds = functional.pad(starts, (0, rows + 1 - len(starts)), value=whole).int()
        ids, positions = (functional.pad(part, (0, whole - tokens))[None] for part in (ids, positions))
        embedded = self._embeddings(ids if self._embeddings.weight.device.type == "cpu" else _to_gpu(ids))
        inputs = (embedded, _to_gpu(positions), _to_gpu(bounds))
        key, graphs = (whole, rows), None
        if self._capture and self._model.training and torch.is_grad_enabled():
            if key in self._seen and key not in self._graphs and len(self._graphs) < _MOST:
                self._graphs[key] = self._captured(*inputs)
            self._seen.add(key)
            graphs = self._graphs.get(key)
        if graphs is None:
            return self._pass(*inputs)[0, :tokens]
        for buffer, value in zip((graphs.embedded, graphs.positions, graphs.bounds), inputs, strict=True):
            buffer.copy_(value)
        return _Replay.apply(self._anchor, graphs)[0, :tokens]

    def _pass(self, embedded: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        longest = embedded.shape[1]
        # Without a cache: a cast kept from one pass would be missing in the graph of another.
        on = self._autocast is not None
        with torch.autocast(self._device, self._autocast, enabled=on, cache_enabled=False):
            return self._decoder(
                inputs_embeds=embedded,
                position_ids=positions,
                attention_mask=self._mask,
                use_cache=False,
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=longest,
                max_length_k=longest,
            ).last_hidden_state

    def _captured(self, *inputs: torch.Tensor) -> _Graphs:
        embedded, positions, bounds = (tensor.detach().clone() for tensor in inputs)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how = {
            "pool": self._pool,
            "stream": torch.cuda.current_stream(),
            "capture_error_mode": "thread_local",
        }
        with torch.cuda.graph(forward, **how):
            hidden = self._pass(embedded, positions, bounds)
        gradient = torch.zeros_like(hidden)
        with torch.cuda.graph(backward, **how):
            hidden.backward(gradient)
        return _Graphs(embedded, positions, bounds, hidden.detach(), gradient, forward, backward)


def _to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the GPU, without waiting for it."""
    return tensor.pin_memory().cuda(non_blocking=True)
