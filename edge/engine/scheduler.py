"""Which request does how much in the next step. Pure policy: no threads, no arrays, no clock of its own.

Decoding rows come first, one token each, so that running streams never stall; what is left of the step
goes to prompts, first come, first served. A prompt is read in chunks beside the decoding rows. When the
pool of KV cells runs short, idle prefixes go first, then the youngest request steps back into the queue
and is computed again later: a request that was admitted is never failed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge.engine.kv_cache import KVCache
from edge.engine.prefill_budget import Newcomers


@dataclass(slots=True, eq=False)
class Sequence:
    """A request as the scheduler sees it.

    tokens: prompt and answer so far. computed: how many of them lie in the KV cache. cached: how many of the
    prompt came from another request's cells. limit: length at which it must end.
    """

    key: int
    tokens: list[int]
    limit: int
    reuse: bool = True
    prompt: int = 0
    slot: int | None = None
    computed: int = 0
    cached: int = 0
    draft: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def decoding(self) -> bool:
        """All but the newest token are computed, and the newest is an answer's."""
        return len(self.tokens) - self.computed == 1 and len(self.tokens) > self.prompt


@dataclass(slots=True)
class Work:
    """One row of the next step: the sequence's next `n` tokens, then its draft; logits for `outputs`.

    decodes: no part of a prompt is among them.
    """

    sequence: Sequence
    n: int
    draft: list[int]
    decodes: bool = False

    @property
    def ends(self) -> bool:
        """Whether the row reaches the newest token, so that a new one can be sampled."""
        return self.sequence.computed + self.n == len(self.sequence.tokens)

    @property
    def outputs(self) -> int:
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
        """Forget a sequence in whatever phase it is; its slot is free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._give_back(sequence, keep=keep)

    def load(self) -> tuple[int, Newcomers]:
        """How many requests decode, and those that wait for their first token with a slot or a free one."""
        reading = [s for s in self.running if not s.decoding]
        if not reading and not self.waiting:
            return len(self.running), Newcomers()
        coming = [*reading, *itertools.islice(self.waiting, self._slots - len(self.running))]
        keys = [s.key for s in coming]
        tokens = sum(len(s.tokens) - s.computed for s in coming)
        new = Newcomers(len(coming), tokens, min(keys), max(keys)) if coming else Newcomers()
        return len(self.running) - len(reading), new

    def plan(self, chunk: int, draft: Callable[[Sequence, int, int], list[int]] | None = None) -> list[Work]:
        """The rows of the next step, in the order of their slots, as backends run neighbours at once.

        chunk: prompt tokens that the step may hold beside decoding rows. draft: proposes up to n tokens
        after a sequence's own (speculation), told how many tokens the step decodes so far; asked only where
        it has room.
        """
        decoding, reading = list[Sequence](), list[Sequence]()
        for sequence in self.running:
            (decoding if sequence.decoding else reading).append(sequence)
        work = [Work(sequence, 1, [], True) for sequence in decoding]
        room = self._batch - len(work)
        if draft is not None:
            spare, drafted = self._outputs - self._slots, 0
            for item in work:
                most = min(room, spare, item.sequence.limit - len(item.sequence.tokens) - 1)
                if most > 0:
                    item.draft = draft(item.sequence, most, len(work) + drafted)[:most]
                    drafted += len(item.draft)
                    room -= len(item.draft)
                    spare -= len(item.draft)
        whole = min(room, chunk)
        # What the step can hold beyond that.
        beyond, room = room - whole, whole
        for sequence in reading:
            if not (n := self._chunk(sequence, room, whole, beyond)):
                break
            room -= n
            work.append(Work(sequence, n, []))
        while room > 0 and self.waiting and len(self.running) < self._slots:
            sequence = self.waiting[0]
            taken = self._cache.acquire(sequence.tokens, reuse=sequence.reuse)
            if taken is None:
                break
            sequence.slot, sequence.computed = taken
            n = self._chunk(sequence, room, whole, beyond)
            if not n or not self._fits(sequence):
                self._give_back(sequence, keep=True)
                break
            self.waiting.popleft()
            if len(sequence.tokens) == sequence.prompt:
                sequence.cached = sequence.computed
            self.running.append(sequence)
            room -= n
            work.append(Work(sequence, n, []))
        return sorted(self._fit(work), key=lambda item: item.sequence.slot or 0)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the pool holds the whole sequence beside those that run, one step of theirs included.

        Without this a request would be let in, computed in part, and preempted, again and again.
        """
        available = self._cache.available_cells()
        if available is None or not self.running:
            return True
        return len(sequence.tokens) - sequence.computed + len(self.running) < available

    def _chunk(self, sequence: Sequence, room: int, whole: int, beyond: int) -> int:
        """How many of a prompt's tokens go into a step that had room for `whole` and has it for `room`.

        Pieces cost a pass each: what would fit into the next step is not cut, nor what is half as long again
        as the room, as far as the step can hold `beyond` it.
        """
        left = len(sequence.tokens) - sequence.computed
        if room <= 0:
            return 0
        return left if left <= room + min(beyond, room // 2) else 0 if left <= whole else room

    def _fit(self, work: list[Work]) -> list[Work]:
        """Make the rows fit into the free cells: drafts, idle prefixes, then the youngest request go."""
        free = self._cache.free_cells()
        if free is None:
            return work
        while sum(item.n + len(item.draft) for item in work) > free:
            if any(item.draft for item in work):
                for item in work:
                    item.draft = []
            elif not self._cache.evict_idle():
                # The last one always fits: a context is never larger than the pool.
                assert len(self.running) > 1
                youngest = max(self.running, key=lambda s: s.key)
                self.running.remove(youngest)
                self._give_back(youngest, keep=False)
                self._requeue(youngest)
                work = [item for item in work if item.sequence is not youngest]
            free = self._cache.free_cells() or 0
        return work

    def _requeue(self, sequence: Sequence) -> None:
        at = next((i for i, s in enumerate(self.waiting) if s.key > sequence.key), len(self.waiting))
        self.waiting.insert(at, sequence)

    def _give_back(self, sequence: Sequence, *, keep: bool) -> None:
        if sequence.slot is not None:
            self._cache.release(sequence.slot, keep=keep)
            sequence.slot, sequence.computed = None, 0
