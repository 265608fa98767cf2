"""What a backend is. Backends run one step at a time, so that batching, prefix reuse, speculation,
sampling and cancellation are written once and serve llama.cpp, ONNX Runtime and the tests' fake.

One thread owns a backend. A step runs rows of several sequences at once: chunks of prompts, single tokens to
decode, drafts to verify. Sizes, slots, positions and token ids that native code would crash on are refused in
Python first: by `check_rows`, and by `Backend` for what changes a slot outside a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.prompt import AddedTokens

Logits = NDArray[np.float32]
# Saved KV cells, in a backend's own format.
Cells = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Candidates:
    """Only the most probable tokens: ids and float32 logits, the largest logit first, equal ones by id."""

    ids: NDArray[np.int64]
    logits: Logits


# One entry for each output that was asked for: a 2-D array of logits, or a list of logits and candidates.
StepOutputs = Logits | list[Logits | Candidates]


# A hint for a step that failed.
FULL = "where its memory was full: lower --slots or --ctx, or free some of it"


def nothing() -> None:
    """The initial `Backend.meanwhile`."""


class StepInterrupted(Exception):
    """A step was ended early by `interrupt`. Every slot that had a row in it is as before the step."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a loaded model is and where it runs.

    slots: sequences that can be held at once. context: tokens that one sequence may hold.
    capacity: KV cells in all; with `shared` the KV cache is unified: slots draw on it, `copy` costs no cells.
    batch, outputs: tokens and logits of one step at most. device: what is really in use; why: how it was
    chosen. stop_ids: every id that ends a turn. bos_id: prepended to a text unless `add_bos` is false.
    embedding: length of the vectors that `Backend.embed` gives; 0 where the model has none.
    candidates: how many of the most probable tokens suffice to let a row be `few`; 0: no row may be.
    draft_streams: a step may verify drafts while no more streams than this decode; beyond that, drafts cost
    more than they save. overlaps: a step is computed asynchronously, and calls `Backend.meanwhile` meanwhile.
    token_bytes: how many UTF-8 bytes of a text one token stands for at most; 0 where that is not known.
    strips: spaces beside some special tokens are no part of that. added: tokens found before others.
    """

    kind: str
    name: str
    device: str
    why: str
    slots: int
    context: int
    capacity: int
    batch: int
    outputs: int
    vocab: int
    stop_ids: frozenset[int]
    shared: bool = False
    bos_id: int | None = None
    draft_streams: int = 2**31
    add_bos: bool = False
    bos_text: str = ""
    eos_text: str = ""
    embedding: int = 0
    candidates: int = 0
    chat_template: str | None = None
    overlaps: bool = False
    token_bytes: int = 0
    strips: bool = False
    added: AddedTokens = field(default_factory=AddedTokens)
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """How every backend loads a model. context: tokens of one slot. batch: tokens of one step at most.

    device: as in `edge serve --device`, or what was chosen. tuned: when this was measured, or why not.
    """

    slots: int = 16
    context: int = 4096
    batch: int = 512
    threads: int = 1
    device: str = "cpu"
    tuned: str = "not measured"

    @property
    def outputs(self) -> int:
        """Logits of one step at most: each slot's next token, and room for drafts."""
        return min(self.batch, self.slots + 64)


@dataclass(slots=True)
class Row:
    """One sequence's part of a step: `tokens` go to `slot` at positions `pos`, `pos + 1`, ...

    outputs: logits are wanted for the last `outputs` of them (0: none).
    few: only the `BackendInfo.candidates` largest logits matter, so the backend may give Candidates.
    """

    slot: int
    pos: int
    tokens: Sequence[int]
    outputs: int
    few: bool = False


class Backend(ABC):
    """A model with a KV cache. Not thread-safe, except for `encode`, `marks`, `decode` and `interrupt`.

    meanwhile: work for the time in which a step is computed, set by whoever calls `step`; see `overlaps`.
    Subclasses set `info` and, where they embed, `_embedder`; `_lengths` has the tokens that each slot holds.
    What changes a slot outside a step is checked here: what a subclass implements may rely on its arguments.
    """

    info: BackendInfo
    _embedder: Any

    def __init__(self, slots: int) -> None:
        self.meanwhile: Callable[[], None] = nothing
        self._lengths = [0] * slots
        self._interrupted = False

    @abstractmethod
    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`, without a begin-of-text token. special: control tokens are parsed."""

    def marks(self, *, special: bool) -> tuple[str, ...]:
        """Texts of the tokens that `encode` finds before all others: a text may be cut before each.

        Always the same object, as what is made of it is kept.
        """
        return ()

    @abstractmethod
    def decode(self, token: int) -> bytes:
        """The bytes that `token` stands for, maybe a part of a character; none for a control token."""

    @abstractmethod
    def step(self, rows: Sequence[Row]) -> StepOutputs:
        """Run the rows; float32 logits [vocab] of each output in row order, valid until the next step.

        The caller may write into them. Raises StepInterrupted, ValueError from `check_rows`, EdgeError where
        the device fails.
        """

    def copy(self, src: int, dst: int, n: int) -> None:
        """Make `dst` hold the first `n` tokens of `src` and nothing else."""
        slots = range(self.info.slots)
        if src == dst or src not in slots or dst not in slots or not 0 <= n <= self._lengths[src]:
            raise ValueError(f"copy of {n} tokens from slot {src} to {dst}")
        self._copy(src, dst, n)
        self._lengths[dst] = n

    def truncate(self, slot: int, n: int) -> None:
        """Keep the first `n` tokens of `slot`; 0 empties it."""
        if slot not in range(self.info.slots) or not 0 <= n <= self._lengths[slot]:
            raise ValueError(f"truncate slot {slot} to {n}")
        self._truncate(slot, n)
        self._lengths[slot] = n

    @abstractmethod
    def save(self, slot: int) -> Cells:
        """A copy of a slot's KV cells in the backend's own format."""

    def restore(self, slot: int, cells: Cells, length: int) -> bool:
        """Fill an empty slot with cells that `save` gave for `length` tokens. False where they do not fit."""
        if self._lengths[slot] != 0 or not 0 < length <= self.info.context:
            raise ValueError(f"restore of {length} tokens into slot {slot} of {self._lengths[slot]}")
        if not self._restore(slot, cells, length):
            return False
        self._lengths[slot] = length
        return True

    def interrupt(self) -> None:
        """Ask the running step to end early. From any thread; no effect where no long step runs."""
        self._interrupted = True

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The mean of the last hidden states of `tokens` (1 to context), of length 1. [embedding]

        Only where `BackendInfo.embedding` is not 0. Raises EdgeError where the memory does not suffice.
        """
        if not 0 < len(tokens) <= self.info.context or not all(0 <= t < self.info.vocab for t in tokens):
            raise ValueError(f"cannot embed {len(tokens)} tokens")
        vector: NDArray[np.float32] = self._embedder.embed(tokens)
        return vector

    @abstractmethod
    def close(self) -> None:
        """Free what the model takes."""

    @abstractmethod
    def _copy(self, src: int, dst: int, n: int) -> None:
        """See copy."""

    @abstractmethod
    def _truncate(self, slot: int, n: int) -> None:
        """See truncate."""

    @abstractmethod
    def _restore(self, slot: int, cells: Cells, length: int) -> bool:
        """See restore."""


def check_rows(rows: Sequence[Row], info: BackendInfo, lengths: Sequence[int]) -> int:
    """Raise ValueError unless `rows` can be run; returns the number of tokens.

    lengths: tokens that each slot holds now. A row must continue its slot without a gap.
    """
    total = outputs = 0
    seen = set()
    for row in rows:
        n = len(row.tokens)
        if not 0 <= row.slot < info.slots or row.slot in seen:
            raise ValueError(f"slot {row.slot} is out of range or twice in one step")
        seen.add(row.slot)
        if n == 0 or not 0 <= row.outputs <= n:
            raise ValueError(f"row of {n} tokens with {row.outputs} outputs")
        if row.pos != lengths[row.slot] or row.pos + n > info.context:
            raise ValueError(f"positions {row.pos}..{row.pos + n} do not fit slot {row.slot}")
        if min(row.tokens) < 0 or max(row.tokens) >= info.vocab:
            raise ValueError(f"token id outside 0..{info.vocab - 1}")
        total += n
        outputs += row.outputs
    if outputs > info.outputs:
        raise ValueError(f"a step with {outputs} outputs; the limit is {info.outputs}")
    if not 0 < total <= info.batch:
        raise ValueError(f"a step of {total} tokens; the limit is {info.batch}")
    return total
