"""ONNX Runtime, one step at a time: keys and values are written in place, one row of the batch for each slot.

A run of the session is either one token of every decoding slot, or a piece of one prompt: that is what
GroupQueryAttention takes. Rows that differ in length are padded on the right by the mask, and a padded row
writes behind its own end alone. Only the logits that are asked for are computed, and where the graph gives
candidates and no row of a run needs more, only these are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.onnx_header import OUTPUT_POSITIONS, read_onnx
from edge.backends import onnx_providers
from edge.backends.base import FULL, BackendInfo, Row, StepInterrupted, StepOutputs, check_rows, nothing
from edge.backends.onnx_cuda_graphs import GRAPH, Recorder, Recording
from edge.backends.onnx_embedding import Embedder
from edge.backends.onnx_io_binding import Binding, Buffer, Mask, zeros
from edge.backends.onnx_kv_cache import Rows
from edge.backends.onnx_kv_cache_cuda import DeviceRows
from edge.backends.onnx_logits import Outputs
from edge.backends.onnx_tokenizer import Vocabulary
from edge.errors import EdgeError, InputError

TEMPLATE = "chat_template.jinja"
# Windows of rows whose tensors are kept bound, the oldest let go first.
_BINDINGS = 64
# Texts that are begun in one run on the processor and on a card, and how much of it may be padding behind the
# shorter ones. Each of a run's texts gives the last position of every one of them: a text's share of these.
_TOGETHER, _TOGETHER_ON_CARD, _PADDED, _LASTS = 8, 32, 1.25, 8


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is loaded. context: tokens of one slot. threads: of a run.

    spin: threads wait for work by spinning, which is faster where no other program wants their cores.
    device: auto, cpu, cuda or another provider's short name (onnx_providers.NAMES). record: decoding steps
    are recorded where the device can (onnx_recorded).
    """

    slots: int = 16
    context: int = 4096
    batch: int = 512
    threads: int = 1
    spin: bool = True
    device: str = "auto"
    record: bool = True
    tuned: str = "not measured"

    @property
    def outputs(self) -> int:
        """Logits of one step: each slot's next token and room for drafts."""
        return min(self.batch, self.slots + 64)


class Model:
    """An exported model's files, checked. Sessions with different settings may be made over it.

    Raises UnavailableError without the packages, InputError for files that cannot be served.
    """

    def __init__(self, path: Path) -> None:
        self.runtime = onnx_providers.library()
        self.path = path
        self.header = read_onnx(path)
        if not self.header.selects:
            raise InputError(
                f"{path} gives the logits of every position; that is slow, and not what `edge export` makes",
                "export the model: edge export onnx RUN",
            )
        self.vocabulary = Vocabulary(path.parent, self.header.vocab_size)
        template = path.parent / TEMPLATE
        self.template = template.read_text(encoding="utf-8") if template.is_file() else None


def _rows(model: Model, opened: onnx_providers.Opened, slots: int, room: int) -> Rows | DeviceRows:
    """Cells where the session's provider computes: `room` tokens for each slot."""
    header = model.header
    shape = {
        "layers": header.block_count,
        "slots": slots,
        "heads": header.head_count_kv,
        "room": room,
        "width": header.key_length,
    }
    if opened.memory == "cpu":
        return Rows(**shape, dtype=header.cache_type)
    return DeviceRows(model.runtime, opened.provider, opened.memory, **shape, dtype=header.cache_type)


def _failed(tokens: int, error: Exception) -> EdgeError:
    return EdgeError(f"onnxruntime failed in a step of {tokens} tokens: {error}", FULL)


def _run_options(runtime: Any) -> Any:
    """Of a run that is not recorded. Where nothing is said of it the answer to who asks is a C++ exception, a
    percent of a small model's step.
    """
    options = runtime.RunOptions()
    options.add_run_config_entry(GRAPH, "-1")
    return options


class Onnx:
    """A session over a model, as a Backend. Raises InputError, UnavailableError where it cannot be made."""

    def __init__(
        self, model: Model, settings: Settings, *, extra_stop_ids: frozenset[int] = frozenset()
    ) -> None:
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
        self._rows = _rows(model, opened, settings.slots, settings.context)
        self._embedder = Embedder(
            opened.session, _run_options(model.runtime), header, lambda room: _rows(model, opened, 1, room)
        )
        self._recorder: Recorder | None = None
        if settings.record and not opened.unrecordable and isinstance(self._rows, DeviceRows):
            self._recorder = Recorder(
                model.runtime,
                opened.session,
                self._rows,
                header,
                slots=settings.slots,
                context=settings.context,
            )
        # The run's inputs. A window may hold rows that are run along.
        self._ids = zeros(max(int(_PADDED * settings.batch), settings.slots))
        self._mask = Mask(settings.slots, settings.context)
        self._picks = zeros(settings.batch)
        # What stays bound on a card lies in memory that recordings use too.
        self._first = Buffer(np.zeros(1, np.int64), constant=opened.memory == "cpu")
        # Among them rows that nobody reads: of a piece of a prompt, of rows that are run along, and of a run
        # over several texts, which gives the last position of each for all of them.
        self._outputs = Outputs(header, rows=(1 + _LASTS) * settings.slots + settings.outputs)
        self._together = _TOGETHER if opened.memory == "cpu" else _TOGETHER_ON_CARD
        self._copied = opened.memory != "cpu"
        self._bindings: dict[tuple[int, int, bool], Binding] = {}
        self._lengths = [0] * settings.slots
        self._options = _run_options(model.runtime)
        self._interrupted = False
        self.meanwhile: Callable[[], None] = nothing
        self.info = self._describe(opened, extra_stop_ids)

    def _describe(self, opened: onnx_providers.Opened, extra_stop_ids: frozenset[int]) -> BackendInfo:
        settings, header, vocabulary = self._settings, self._model.header, self._model.vocabulary
        bits = ", ".join(f"{count} of {width} bits" for width, count in header.matrices.items())
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
            candidates=header.candidates,
            chat_template=self._model.template,
            settings={
                "threads": str(settings.threads),
                "spin": "on" if settings.spin else "off",
                "kv": "a part for each slot",
                "kv_type": header.cache_type,
                "batch": str(settings.batch),
                "tuned": settings.tuned,
                "provider": opened.provider,
                "recorded": "decoding steps"
                if self._recorder
                else f"nothing: {opened.unrecordable or 'switched off'}",
                "matrices": bits,
                "build": f"onnxruntime {self._model.runtime.__version__}",
            },
        )

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._model.vocabulary.encode(text, special=special)

    def decode(self, token: int) -> bytes:
        return self._model.vocabulary.decode(token)

    def step(self, rows: Sequence[Row]) -> StepOutputs:
        check_rows(rows, self.info, self._lengths)
        self._interrupted = False
        self._options.terminate = False
        # Where in the buffers each slot's outputs begin, and whether they are candidates.
        begin: dict[int, tuple[int, bool]] = {}
        # First: a row that is run along writes one cell where another row's piece is to lie.
        at = self._decode([row for row in rows if len(row.tokens) == 1], begin)
        for group in self._groups([row for row in rows if len(row.tokens) > 1]):
            at += self._read(group, at, begin)
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
        """One token of each row in one run; the outputs that were written, one for each row of the window."""
        if not rows:
            return 0
        few = self._few(rows)
        first, count = self._rows.window([row.slot for row in rows], self._lengths)
        recording = self._recorder.find(first, count, few, self._totals) if self._recorder else None
        if recording is not None:
            first, count = recording.first, recording.count
        ids = self._ids.flat
        for place in range(count):
            ids[place] = 0
        for row in rows:
            place = self._rows.row(row.slot) - first
            ids[place] = row.tokens[0]
            begin[row.slot] = place, few
        totals = self._totals(first, count)
        if recording is None or not self._replay(recording, self._ids.array[:count], totals, few):
            self._run(first, 1, totals, self._first, 1, 0, few)
        return count

    def _replay(self, recording: Recording, ids: NDArray[np.int64], totals: list[int], few: bool) -> bool:
        """Run a recording. False where it could not be made: nothing is recorded from then on."""
        made = recording.made
        try:
            self._outputs.take(recording.run(ids, totals), few=few)
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            if made:
                raise _failed(len(ids), error) from error
            self._recorder = None
            self.info.settings["recorded"] = f"nothing: {' '.join(str(error).split())[:200]}"
            return False
        return True

    def _totals(self, first: int, count: int) -> list[int]:
        """Tokens of each of the rows from `first` on, with one more."""
        totals = [0] * count
        for slot, length in enumerate(self._lengths):
            if 0 <= (place := self._rows.row(slot) - first) < count:
                totals[place] = length + 1
        return totals

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that are run at once: beginnings of texts, neighbours in the cache and of about one length.

        What lies behind the shorter ones is computed for nothing, and overwritten later.
        """
        groups: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: self._rows.row(row.slot)):
            group = [*groups[-1], row] if groups else [row]
            place = self._rows.row(group[0].slot)
            lengths = [len(one.tokens) for one in group]
            longest, tokens = max(lengths), sum(lengths)
            if (
                1 < len(group) <= self._together
                and len(set(lengths)) <= _LASTS
                and self._rows.row(row.slot) == place + len(group) - 1
                and all(one.pos == 0 and one.outputs <= 1 for one in group)
                and longest * len(group) <= _PADDED * tokens
            ):
                groups[-1] = group
            else:
                groups.append([row])
        return groups

    def _read(self, group: Sequence[Row], at: int, begin: dict[int, tuple[int, bool]]) -> int:
        """A piece of a prompt, a draft, or beginnings of texts; the outputs written, from `at` on."""
        few, n = self._few(group), max(len(row.tokens) for row in group)
        grid = self._ids.array[: len(group) * n].reshape(len(group), n)
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
                begin[row.slot] = at + i * len(wanted) + first, few
        totals = [row.pos + len(row.tokens) for row in group]
        self._run(self._rows.row(group[0].slot), n, totals, self._picks, len(wanted), at, few)
        return len(group) * len(wanted)

    def _run(
        self, first: int, n: int, totals: list[int], picks: Buffer, wanted: int, at: int, few: bool
    ) -> None:
        """Run `n` ids of each of the rows from `first` on, which then hold `totals` tokens.

        Logits of the `wanted` positions in `picks` of each row go to the buffers from `at` on, or candidates
        of them. Raises StepInterrupted.
        """
        if self._interrupted:
            raise StepInterrupted
        count = len(totals)
        # Its width tells a piece of a prompt from a beginning; and what is copied is bound anew anyway.
        shape = self._mask.set(totals, exact=n > 1 or self._copied)
        binding = self._binding(first, count, few)
        binding.read("input_ids", self._ids, (count, n))
        binding.read("attention_mask", self._mask.buffer, shape)
        binding.read(OUTPUT_POSITIONS, picks, (wanted,))
        self._outputs.bind(binding, at, count, wanted, few=few)
        try:
            self._session.run_with_iobinding(binding.native, self._options)
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            if self._interrupted:
                raise StepInterrupted from None
            raise _failed(count * n, error) from error

    def _binding(self, first: int, count: int, few: bool) -> Binding:
        """A binding of the cells in the rows `first` to `first + count`, kept for the next run over them."""
        # What was bound stays bound: candidates and logits want a binding each.
        binding = self._bindings.get((first, count, few))
        if binding is None:
            if len(self._bindings) >= _BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            binding = Binding(self._session.io_binding(), copied=self._copied)
            self._bindings[first, count, few] = binding
            self._rows.bind(binding.native, first, count)
        return binding

    def copy(self, src: int, dst: int, n: int) -> None:
        slots = self.info.slots
        if src == dst or not (0 <= src < slots and 0 <= dst < slots) or not 0 <= n <= self._lengths[src]:
            raise ValueError(f"copy of {n} tokens from slot {src} to {dst}")
        self._rows.copy(src, dst, n)
        self._lengths[dst] = n

    def truncate(self, slot: int, n: int) -> None:
        if not 0 <= slot < self.info.slots or not 0 <= n <= self._lengths[slot]:
            raise ValueError(f"truncate slot {slot} to {n}")
        self._lengths[slot] = n

    def save(self, slot: int) -> bytes:
        """The cells of a slot: 2 x layers, heads, tokens, width, in the cache's own type."""
        return self._rows.save(slot, self._lengths[slot])

    def restore(self, slot: int, cells: bytes, length: int) -> bool:
        if self._lengths[slot] != 0 or not 0 < length <= self.info.context:
            raise ValueError(f"restore of {length} tokens into slot {slot} of {self._lengths[slot]}")
        if not self._rows.restore(slot, cells, length):
            return False
        self._lengths[slot] = length
        return True

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Embeds`. Raises EdgeError where the memory does not suffice."""
        if not 0 < len(tokens) <= self.info.context or not all(0 <= t < self.info.vocab for t in tokens):
            raise ValueError(f"cannot embed {len(tokens)} tokens")
        return self._embedder.embed(tokens)

    def interrupt(self) -> None:
        self._interrupted = True
        self._options.terminate = True

    def close(self) -> None:
        self._bindings.clear()
        self._recorder = None
        self._embedder.close()
        self._session = None
        self._rows.close()
