"""Which request does how much in the next step. Pure policy: no threads, no arrays, no clock of its own.

Decoding rows come first, one token each, so that running streams never stall. What is left of the step goes
to prompts, first come, first served, in chunks. When the unified KV cache runs short of cells, idle prefixes
go first; then the youngest request steps back into the queue and is computed again later. A request that was
admitted never fails.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge.engine.kv_cache import KVCache
from edge.engine.prefill_budget import Newcomers

# (sequence, n, rows): at most n tokens that may follow `sequence`, in a step that decodes `rows` tokens so
# far.
Draft = Callable[["Sequence", int, int], list[int]]
_NOBODY = Newcomers()


@dataclass(slots=True, eq=False)
class Sequence:
    """A request as the scheduler sees it.

    tokens: prompt and answer so far. limit: the length at which it must end. prompt: the prompt's length.
    computed: how many tokens lie in the KV cache. cached: how many of the prompt were there already.
    """

    key: int
    tokens: list[int]
    limit: int
    reuse: bool = True
    prompt: int = field(init=False)
    slot: int | None = None
    computed: int = 0
    cached: int = 0

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """All but the newest token are computed, and the newest is an answer's."""
        return len(self.tokens) - self.computed == 1 and len(self.tokens) > self.prompt


@dataclass(slots=True)
class Work:
    """One row of the next step: the sequence's next `n` tokens, then its draft.

    decodes: none of them is a prompt's.
    """

    sequence: Sequence
    n: int
    draft: list[int] = field(default_factory=list)
    decodes: bool = False

    @property
    def ends(self) -> bool:
        """Whether the row reaches the newest token, so that a new one can be sampled."""
        return self.sequence.computed + self.n == len(self.sequence.tokens)

    @property
    def outputs(self) -> int:
        """How many of the row's last tokens need logits."""
        return 1 + len(self.draft) if self.ends else 0


class Scheduler:
    """Keeps the queue and the running set. `plan` decides a step; the engine carries it out."""

    def __init__(self, cache: KVCache, *, slots: int, batch: int, outputs: int) -> None:
        assert min(batch, outputs) >= slots, "every slot must be able to decode in one step"
        self._cache = cache
        self._slots = slots
        self._batch = batch
        self._outputs = outputs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Forget a sequence in whatever phase it is; its slot is free at once. keep: its prefix may be
        reused."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence, keep=keep)

    def load(self) -> tuple[int, Newcomers]:
        """How many requests decode, and those that wait for their first token with a slot or a free one."""
        reading = [s for s in self.running if not s.decoding]
        decoding = len(self.running) - len(reading)
        new = [*reading, *itertools.islice(self.waiting, self._slots - len(self.running))]
        if not new:
            return decoding, _NOBODY
        keys = [s.key for s in new]
        return decoding, Newcomers(len(new), sum(s.left for s in new), min(keys), max(keys))

    def plan(self, chunk: int, draft: Draft | None = None) -> list[Work]:
        """The rows of the next step, in the order of their slots, as backends run neighbours at once.

        chunk: prompt tokens that the step may hold beside decoding rows. draft: asked for a proposal where
        the step has room for one.
        """
        work, reading = list[Work](), list[Sequence]()
        for sequence in self.running:
            if sequence.decoding:
                work.append(Work(sequence, 1, decodes=True))
            else:
                reading.append(sequence)
        room = self._batch - len(work)
        if draft is not None:
            room -= self._add_drafts(work, room, draft)
        whole = min(room, chunk)
        # What the step can hold beyond the chunk.
        beyond, room = room - whole, whole
        for sequence in reading:
            if not (n := self._chunk(sequence, room, whole, beyond)):
                break
            room -= n
            work.append(Work(sequence, n))
        while room > 0 and self.waiting and len(self.running) < self._slots:
            sequence = self.waiting[0]
            slot = self._cache.acquire(sequence.tokens, reuse=sequence.reuse)
            if slot is None:
                break
            sequence.slot, sequence.computed = slot
            n = self._chunk(sequence, room, whole, beyond)
            if not n or not self._fits(sequence):
                self._release(sequence, keep=True)
                break
            self.waiting.popleft()
            if len(sequence.tokens) == sequence.prompt:
                sequence.cached = sequence.computed
            self.running.append(sequence)
            room -= n
            work.append(Work(sequence, n))
        return sorted(self._fit(work), key=lambda row: row.sequence.slot or 0)

    def _add_drafts(self, work: list[Work], room: int, draft: Draft) -> int:
        """Ask for drafts; how many tokens they have, `room` at most."""
        # Every slot's own output comes before any draft's.
        room = min(room, self._outputs - self._slots)
        drafted = 0
        for row in work:
            most = min(room - drafted, row.sequence.limit - len(row.sequence.tokens) - 1)
            if most > 0:
                row.draft = draft(row.sequence, most, len(work) + drafted)[:most]
                drafted += len(row.draft)
        return drafted

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the unified KV cache holds the whole sequence beside those that run, and a step of theirs.

        Without this a request would be let in, computed in part, and preempted, again and again.
        """
        available = self._cache.available_cells()
        return available is None or not self.running or sequence.left + len(self.running) < available

    def _chunk(self, sequence: Sequence, room: int, whole: int, beyond: int) -> int:
        """How many of a prompt's tokens go into a step that had room for `whole` and has it for `room`.

        Each chunk costs a pass of its own: a prompt that would fit into the next step whole is not cut, nor
        one that is up to half as long again as the room, as far as the step can hold `beyond` it.
        """
        if room <= 0:
            return 0
        if sequence.left <= room + min(beyond, room // 2):
            return sequence.left
        return 0 if sequence.left <= whole else room

    def _fit(self, work: list[Work]) -> list[Work]:
        """Make the rows fit into the free cells: drafts, idle prefixes, then the youngest request go."""
        while (free := self._cache.free_cells()) is not None:
            if sum(row.n + len(row.draft) for row in work) <= free:
                break
            if any(row.draft for row in work):
                for row in work:
                    row.draft = []
            elif not self._cache.evict_idle():
                # The last one always fits: a context is never larger than the cache.
                assert len(self.running) > 1
                youngest = max(self.running, key=lambda s: s.key)
                self.running.remove(youngest)
                self._release(youngest, keep=False)
                place = (i for i, s in enumerate(self.waiting) if s.key > youngest.key)
                self.waiting.insert(next(place, len(self.waiting)), youngest)
                work = [row for row in work if row.sequence is not youngest]
        return work

    def _release(self, sequence: Sequence, *, keep: bool) -> None:
        if sequence.slot is not None:
            self._cache.release(sequence.slot, keep=keep)
            sequence.slot, sequence.computed = None, 0
