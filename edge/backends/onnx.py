"""ONNX Runtime, one step at a time: keys and values are written in place, one row of the batch for each slot.

A run of the session is either one token of every decoding slot, or a chunk of a prompt: GroupQueryAttention
takes nothing else. Rows that differ in length are padded on the right by the mask; a padded row writes only
behind its own end. Only the logits that are asked for are computed. Where the graph gives candidates and no
row of a run needs more, only these are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.find import read_template
from edge.artefact.onnx_header import OUTPUT_POSITIONS, read_onnx
from edge.backends import base, onnx_providers
from edge.backends.base import (
    FULL,
    Backend,
    BackendInfo,
    Cells,
    Row,
    StepInterrupted,
    StepOutputs,
    check_rows,
)
from edge.backends.onnx_cuda_graphs import GRAPH, CudaGraph, CudaGraphs, Source
from edge.backends.onnx_embedding import Embedder
from edge.backends.onnx_io_binding import Binding, Buffer, Mask, zeros
from edge.backends.onnx_kv_cache import HostKVCache, KVCache
from edge.backends.onnx_kv_cache_cuda import DeviceKVCache
from edge.backends.onnx_logits import Outputs
from edge.backends.onnx_tokenizer import Vocabulary
from edge.errors import EdgeError, InputError

# Windows of rows whose tensors are kept bound; the oldest is dropped first.
_BINDINGS = 64
# Prompts that are begun in one run, on the CPU and on a GPU.
_TOGETHER, _TOGETHER_ON_GPU = 8, 32
# How many times the tokens of such a run may be computed, padding included.
_PADDED = 1.25
# Tokens of a run on a GPU, padding included. The first run of each size takes 50 ms on an H200, the next 5:
# so there are few sizes, and each is run once when the model is loaded.
_WIDTHS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
# Lengths that differ in such a run: each of its rows outputs the last position of every one of them.
_LASTS = 8


@dataclass(frozen=True, slots=True)
class Settings(base.Settings):
    """How an ONNX model is loaded.

    device: auto, cpu, cuda or another provider's short name (onnx_providers.NAMES). spin: threads wait for
    work by spinning, which is faster where no other program wants their cores. cuda_graphs: decode steps are
    captured as CUDA graphs where the device can.
    """

    device: str = "auto"
    spin: bool = True
    cuda_graphs: bool = True


class Model:
    """An exported model's files, checked. Sessions with different settings may be opened over it.

    Raises UnavailableError without the packages, InputError for files that cannot be served.
    """

    def __init__(self, path: Path) -> None:
        self.runtime = onnx_providers.library()
        self.path = path
        self.header = read_onnx(path)
        if not self.header.selects:
            raise InputError(
                f"{path} computes the logits of every position, which is slow: `edge export` did not make it",
                "export the model: edge export onnx RUN",
            )
        self.vocabulary = Vocabulary(path.parent, self.header.vocab_size)
        self.template = read_template(path.parent)

    def new_cache(self, opened: onnx_providers.Opened, slots: int, room: int) -> KVCache:
        """A KV cache where the session's provider computes: `room` tokens for each slot."""
        header = self.header
        shape: dict[str, Any] = {
            "layers": header.block_count,
            "slots": slots,
            "heads": header.head_count_kv,
            "room": room,
            "width": header.key_length,
            "dtype": header.cache_type,
        }
        if opened.memory == "cpu":
            return HostKVCache(**shape)
        return DeviceKVCache(self.runtime, opened.provider, opened.memory, **shape)

    def run_options(self) -> Any:
        """Options of a run without a CUDA graph. Where they do not say so, onnxruntime's own look-up throws a
        C++ exception in each run, which is a percent of a small model's step.
        """
        options = self.runtime.RunOptions()
        options.add_run_config_entry(GRAPH, "-1")
        return options


@dataclass(frozen=True, slots=True)
class _Run:
    """`width` ids of each of the rows from `first` on, which then hold `totals` tokens.

    The outputs of the first `wanted` positions in `picks` of each row go to the buffers from `out` on.
    few: as candidates.
    """

    first: int
    width: int
    totals: list[int]
    picks: Buffer
    wanted: int
    out: int
    few: bool


class Onnx(Backend):
    """A session over a model, as a Backend. Raises InputError, UnavailableError where it cannot be opened."""

    def __init__(
        self, model: Model, settings: Settings, *, extra_stop_ids: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(settings.slots)
        header = model.header
        self._model = model
        self._settings = settings
        opened = onnx_providers.open_session(
            model.runtime,
            model.path,
            settings.device,
            threads=settings.threads,
            spin=settings.spin,
            cache_type=header.cache_type,
        )
        self._session: Any = opened.session
        self._cache = model.new_cache(opened, settings.slots, settings.context)
        self._options = model.run_options()
        self._embedder = Embedder(
            opened.session, model.run_options(), header, lambda room: model.new_cache(opened, 1, room)
        )
        self._graphs: CudaGraphs | None = None
        if settings.cuda_graphs and not opened.no_graphs and isinstance(self._cache, DeviceKVCache):
            source = Source(model.runtime, opened.session, self._cache, header)
            self._graphs = CudaGraphs(source, slots=settings.slots, context=settings.context)
        # The inputs of a run. A window may hold idle rows.
        self._ids = zeros(max(int(_PADDED * settings.batch), settings.slots))
        self._mask = Mask(settings.slots, settings.context)
        self._picks = zeros(settings.batch)
        on_gpu = opened.memory != "cpu"
        # What stays bound on a GPU would lie in memory that CUDA graphs use too.
        self._first = Buffer(np.zeros(1, np.int64), constant=not on_gpu)
        # Among them outputs that nobody reads: of chunks of prompts, of idle rows, and of a run over several
        # prompts, which gives the last position of each for all of them.
        self._outputs = Outputs(header, rows=(1 + _LASTS) * settings.slots + settings.outputs)
        self._together = _TOGETHER_ON_GPU if on_gpu else _TOGETHER
        self._copied = on_gpu
        self._bindings: dict[tuple[int, int, bool], Binding] = {}
        self._widths: tuple[int, ...] = ()
        self.info = self._describe(opened, extra_stop_ids)
        if on_gpu:
            self._widths = tuple(width for width in _WIDTHS if width <= min(settings.batch, settings.context))
            self._run_each_width()

    def _describe(self, opened: onnx_providers.Opened, extra_stop_ids: frozenset[int]) -> BackendInfo:
        settings, header, vocabulary = self._settings, self._model.header, self._model.vocabulary
        graphs = "decode steps" if self._graphs else f"none: {opened.no_graphs or 'switched off'}"
        return BackendInfo(
            kind="onnx",
            name=self._model.path.name,
            device=opened.device,
            why=opened.why,
            slots=settings.slots,
            context=settings.context,
            capacity=settings.slots * settings.context,
            batch=settings.batch,
            outputs=settings.outputs,
            vocab=header.vocab_size,
            stop_ids=extra_stop_ids | vocabulary.ends,
            draft_streams=1,
            bos_id=vocabulary.bos_id,
            add_bos=vocabulary.add_bos,
            bos_text=vocabulary.bos_text,
            eos_text=vocabulary.eos_text,
            embedding=header.hidden,
            token_bytes=vocabulary.token_bytes,
            strips=vocabulary.strips,
            added=vocabulary.added,
            candidates=header.candidates,
            chat_template=self._model.template,
            settings={
                "threads": str(settings.threads),
                "spin": "on" if settings.spin else "off",
                "kv": "per slot",
                "kv_type": header.cache_type,
                "batch": str(settings.batch),
                "tuned": settings.tuned,
                "provider": opened.provider,
                "cuda_graphs": graphs,
                "matrices": ", ".join(f"{n} of {width} bits" for width, n in header.matrices.items()),
                "build": f"onnxruntime {self._model.runtime.__version__}",
            },
        )

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._model.vocabulary.encode(text, special=special)

    def marks(self, *, special: bool) -> tuple[str, ...]:
        return self._model.vocabulary.marks if special else self._model.vocabulary.parsed_always

    def decode(self, token: int) -> bytes:
        return self._model.vocabulary.decode(token)

    def step(self, rows: Sequence[Row]) -> StepOutputs:
        check_rows(rows, self.info, self._lengths)
        self._interrupted = False
        self._options.terminate = False
        # Where in the buffers each slot's outputs begin, and whether they are candidates.
        begin: dict[int, tuple[int, bool]] = {}
        # First, because an idle row writes one KV cell where a chunk of its slot may have to lie.
        out = self._decode([row for row in rows if len(row.tokens) == 1], begin)
        for group in self._groups([row for row in rows if len(row.tokens) > 1]):
            out += self._prefill(group, out, begin)
        places = []
        for row in rows:
            self._lengths[row.slot] += len(row.tokens)
            if row.outputs:
                first, few = begin[row.slot]
                places += [(first + i, few) for i in range(row.outputs)]
        return self._outputs.read(places)

    def _few(self, rows: Sequence[Row]) -> bool:
        """Whether candidates are enough for all of `rows`."""
        return self.info.candidates > 0 and all(row.few or not row.outputs for row in rows)

    def _decode(self, rows: Sequence[Row], begin: dict[int, tuple[int, bool]]) -> int:
        """One token of each row in one run; returns the outputs written, one for each row of the window."""
        if not rows:
            return 0
        few = self._few(rows)
        first, count = self._cache.window([row.slot for row in rows], self._lengths)
        graph = self._graphs.find(first, count, few, self._totals) if self._graphs else None
        if graph is not None:
            first, count = graph.shape.first, graph.shape.count
        ids = self._ids.flat
        for place in range(count):
            ids[place] = 0
        for row in rows:
            place = self._cache.row(row.slot) - first
            ids[place] = row.tokens[0]
            begin[row.slot] = place, few
        totals = self._totals(first, count)
        if graph is None or not self._replay(graph, self._ids.array[:count], totals):
            self._run(_Run(first, 1, totals, self._first, 1, 0, few))
        return count

    def _replay(self, graph: CudaGraph, ids: NDArray[np.int64], totals: list[int]) -> bool:
        """Run a CUDA graph. False where it could not be captured: none is captured from then on."""
        captured = graph.captured
        try:
            self._outputs.take(graph.run(ids, totals), few=graph.shape.few)
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            if captured:
                raise _failed(len(ids), error) from error
            self._graphs = None
            note = f"none: {' '.join(str(error).split())[:200]}"
            self.info = replace(self.info, settings={**self.info.settings, "cuda_graphs": note})
            return False
        return True

    def _totals(self, first: int, count: int) -> list[int]:
        """Tokens of each of the `count` rows from `first` on, with one more."""
        totals = [0] * count
        for slot, length in enumerate(self._lengths):
            if 0 <= (place := self._cache.row(slot) - first) < count:
                totals[place] = length + 1
        return totals

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that are run at once: beginnings of prompts, neighbours in the KV cache, of about one length.

        What lies behind the shorter ones is computed for nothing, and overwritten later.
        """
        groups: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: self._cache.row(row.slot)):
            group = [*groups[-1], row] if groups else [row]
            first = self._cache.row(group[0].slot)
            lengths = [len(member.tokens) for member in group]
            if (
                1 < len(group) <= self._together
                and len(set(lengths)) <= _LASTS
                and self._cache.row(row.slot) == first + len(group) - 1
                and all(member.pos == 0 and member.outputs <= 1 for member in group)
                and max(lengths) * len(group) <= _PADDED * sum(lengths)
            ):
                groups[-1] = group
            else:
                groups.append([row])
        return groups

    def _prefill(self, group: Sequence[Row], out: int, begin: dict[int, tuple[int, bool]]) -> int:
        """A chunk of a prompt, a draft, or beginnings of prompts; returns how many outputs were written."""
        few, width = self._few(group), self._width(group)
        grid = self._ids.array[: len(group) * width].reshape(len(group), width)
        grid[:] = 0
        picks: set[int] = set()
        for ids, row in zip(grid, group, strict=True):
            end = len(row.tokens)
            ids[:end] = row.tokens
            picks.update(range(end - row.outputs, end))
        wanted = sorted(picks) or [0]
        self._picks.array[: len(wanted)] = wanted
        for i, row in enumerate(group):
            if row.outputs:
                first = wanted.index(len(row.tokens) - row.outputs)
                begin[row.slot] = out + i * len(wanted) + first, few
        # Padding is computed as tokens that follow: nothing before them sees it, and it is overwritten.
        totals = [row.pos + (width if self._widths else len(row.tokens)) for row in group]
        first_row = self._cache.row(group[0].slot)
        self._run(_Run(first_row, width, totals, self._picks, len(wanted), out, few))
        return len(group) * len(wanted)

    def _width(self, group: Sequence[Row]) -> int:
        """Tokens of each row in a run over `group`: the next of `_WIDTHS` on a GPU, where there is room."""
        longest = max(len(row.tokens) for row in group)
        width = next((width for width in self._widths if width >= longest), longest)
        fits = max(row.pos for row in group) + width <= self.info.context
        return width if fits and len(group) * width <= len(self._ids.flat) else longest

    def _run_each_width(self) -> None:
        """Let the GPU's libraries choose their kernels, and take the memory for the longest run."""
        for width in self._widths:
            self._prefill([Row(0, 0, [0] * width, 1, True)], 0, {})

    def _run(self, run: _Run) -> None:
        """Run the session over what is in `_ids`. Raises StepInterrupted."""
        if self._interrupted:
            raise StepInterrupted
        count = len(run.totals)
        # The width of the mask tells a chunk of a prompt from a beginning. On a GPU it is bound anew anyway.
        shape = self._mask.set(run.totals, exact=run.width > 1 or self._copied)
        binding = self._binding(run.first, count, run.few)
        binding.read("input_ids", self._ids, (count, run.width))
        binding.read("attention_mask", self._mask.buffer, shape)
        binding.read(OUTPUT_POSITIONS, run.picks, (run.wanted,))
        self._outputs.bind(binding, run.out, count, run.wanted, few=run.few)
        try:
            self._session.run_with_iobinding(binding.native, self._options)
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            if self._interrupted:
                raise StepInterrupted from None
            raise _failed(count * run.width, error) from error

    def _binding(self, first: int, count: int, few: bool) -> Binding:
        """A binding of the KV cells in `count` rows from `first` on, kept for the next run over them."""
        # What was bound stays bound: candidates and logits need a binding each.
        key = first, count, few
        if key not in self._bindings:
            if len(self._bindings) >= _BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            self._bindings[key] = Binding(self._session.io_binding(), copied=self._copied)
            self._cache.bind(self._bindings[key].native, first, count)
        return self._bindings[key]

    def save(self, slot: int) -> bytes:
        """The KV cells of a slot [2 x layers, heads, tokens, width], in the cache's own type."""
        return self._cache.save(slot, self._lengths[slot])

    def interrupt(self) -> None:
        super().interrupt()
        self._options.terminate = True

    def close(self) -> None:
        self._bindings.clear()
        self._graphs = None
        self._embedder.close()
        self._session = None
        self._cache.close()

    def _copy(self, src: int, dst: int, n: int) -> None:
        self._cache.copy(src, dst, n)

    def _truncate(self, slot: int, n: int) -> None:
        """Nothing to do: the length alone tells what a row holds."""

    def _restore(self, slot: int, cells: Cells, length: int) -> bool:
        return self._cache.restore(slot, cells, length)


def _failed(tokens: int, error: Exception) -> EdgeError:
    return EdgeError(f"onnxruntime failed in a step of {tokens} tokens: {error}", FULL)
