"""The step loop: inbox -> schedule -> step -> sample -> per-request events.

One thread runs `Engine.run` and owns the backend. Other threads only `submit` and `cancel`. A request's
text, stop strings and finish are decided here, so that a stream ends at the very step that ends it.
"""

from __future__ import annotations

import functools
import itertools
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.backends.base import Backend, Candidates, Embeds, Logits, Row, StepInterrupted, StepOutputs
from edge.engine import protocol as msg
from edge.engine.grammar import Grammars
from edge.engine.kv_cache import KVCache
from edge.engine.prefill_budget import PrefillBudget, StepTimes
from edge.engine.prefix_store import PrefixStore
from edge.engine.request import Job, admit, prompt_tokens
from edge.engine.sampling import Choice, Sampler
from edge.engine.scheduler import Scheduler, Sequence, Work
from edge.errors import EdgeError, RequestError

Emit = Callable[[list[msg.Event]], None]
Mask = NDArray[np.bool_]

# So many logits in a step take long enough to sample that rows of a card's step are sampled side by side.
_WIDE = 2**20
_SAMPLERS = 4
# Tokens that come faster than an eye reads share an event; the first one never waits.
FLUSH_S = 0.04
STATS_S = 0.25


@dataclass(slots=True)
class _Cancelled:
    key: int


@dataclass(slots=True)
class _Drain:
    until: float


@dataclass(slots=True)
class _Embed:
    key: int
    tokens: list[int]


def _chosen(job: Job, found: Logits | Candidates, mask: Mask | None = None) -> Choice:
    """What is sampled from an output."""
    if isinstance(found, Candidates):
        return job.sampler.pick_among(found)
    return job.sampler.pick(found, mask)


def _argmax(logits: NDArray[np.float32], pool: ThreadPoolExecutor | None) -> list[int]:
    """The id of each row's largest logit."""
    if pool is None:
        return list(logits.argmax(axis=1).tolist())
    parts = pool.map(lambda part: part.argmax(axis=1).tolist(), np.array_split(logits, _SAMPLERS))
    return list(itertools.chain.from_iterable(parts))


class Engine:
    """Runs requests on a backend. emit: called with the events of a step; must be thread-safe."""

    def __init__(
        self,
        backend: Backend,
        emit: Emit,
        *,
        max_queue: int = 256,
        speculate: bool = True,
        store: PrefixStore | None = None,
        flush_s: float = FLUSH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        info = backend.info
        self._backend = backend
        self._emit = emit
        self._max_queue = max_queue
        self._speculate = speculate
        self._flush_s = flush_s
        self._clock = clock
        self.cache = KVCache(backend, store)
        self._scheduler = Scheduler(self.cache, slots=info.slots, batch=info.batch, outputs=info.outputs)
        self._prefill_budget = PrefillBudget(info.batch)
        # What drafts cost; apart from the pace, which must not forget how long a crowd's steps are.
        self._costs = StepTimes(fade=0.998)
        self._grammars = Grammars(backend)
        # Masks are computed beside the model's step; llguidance lets go of the GIL.
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="mask")
        # Where the model runs on a card, the processor has cores to spare when a step ends.
        self._samplers = None if info.device == "cpu" else ThreadPoolExecutor(_SAMPLERS, "sample")
        self._inbox: queue.SimpleQueue[Job | _Cancelled | _Drain | _Embed] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._embeds: deque[_Embed] = deque()
        self._of: dict[Sequence, Job] = {}
        self._events: list[msg.Event] = []
        self._flushed = clock()
        self._stats_at = 0.0
        self._steps = 0
        self._step_tokens = 0
        self._step_s = 0.0
        self._began = clock()
        self._service_s = 1.0
        self._draining: float | None = None
        self._prefilling: frozenset[int] = frozenset()
        # Tokens whose text is still to be made, and the rows of a step that are still to be booked.
        self._unsaid: list[tuple[Job, int]] = []
        self._unbooked: list[tuple[Work, Row]] = []
        self._urgent = False
        self._took = 0.0
        if info.overlaps:
            backend.meanwhile = self._meanwhile

    # -- from any thread ------------------------------------------------------------------------------

    def submit(self, request: msg.Submit) -> None:
        """Take a request in; one that cannot be served is answered with Refused at once."""
        try:
            job = admit(
                request,
                self._backend,
                self._grammars,
                speculate=self._speculate,
                arrived=self._clock(),
            )
            self._inbox.put(job)
        except RequestError as error:
            self._refuse(request.key, error)

    def embed(self, request: msg.Embed) -> None:
        """Take in a text to be turned into a vector, between steps; answered with Embedded or Refused."""
        try:
            if not isinstance(self._backend, Embeds) or not self._backend.info.embedding:
                raise RequestError("this backend gives no embeddings", code="unsupported", param="model")
            self._inbox.put(_Embed(request.key, prompt_tokens(self._backend, request.prompt)))
        except RequestError as error:
            self._refuse(request.key, error)

    def cancel(self, key: int) -> None:
        """End a request in whatever phase it is; a long step that reads its prompt is cut short."""
        self._inbox.put(_Cancelled(key))
        if key in self._prefilling:
            self._backend.interrupt()

    def drain(self, seconds: float) -> None:
        """Admit nothing more and let `run` return when all is done, or after `seconds`."""
        self._inbox.put(_Drain(self._clock() + seconds))

    def _refuse(self, key: int, error: RequestError) -> None:
        event = msg.Refused(key, error.status, error.code, str(error), error.param, error.retry_after)
        self._emit([event])

    # -- the engine's own thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `drain` was asked and everything has ended; then keep prefixes on disk, if asked."""
        while self.turn(wait=True):
            pass
        self.cache.keep_on_disk()

    def turn(self, *, wait: bool = False) -> bool:
        """One round: take in what has come, run one step, send events. False when drained."""
        idle = not self._jobs and not self._embeds
        if idle:
            self._report(force=True)
        self._receive(block=wait and idle and self._draining is None)
        self._expire()
        if self._draining is not None and not self._jobs:
            self._report(force=True)
            return False
        if self._embeds:
            self._embed_one(self._embeds.popleft())
        decoding, newcomers = self._scheduler.load()
        chunk = self._prefill_budget.chunk(decoding, newcomers)
        drafts = self._speculate and decoding <= self._backend.info.draft_streams
        plan = self._scheduler.plan(chunk, self._draft if drafts else None)
        if plan:
            self._step(plan, decoding)
        else:
            self._settle()
        self._report()
        return True

    def _receive(self, *, block: bool) -> None:
        while block or not self._inbox.empty():
            item = self._inbox.get()
            block = False
            if isinstance(item, Job):
                self._enqueue(item)
            elif isinstance(item, _Cancelled):
                job = self._jobs.get(item.key)
                if job is not None:
                    self._finish(job, "cancelled")
            elif isinstance(item, _Embed):
                self._embeds.append(item)
            else:
                self._draining = item.until

    def _enqueue(self, job: Job) -> None:
        waiting = len(self._scheduler.waiting)
        if self._draining is not None:
            error = RequestError("the server is shutting down", status=503, code="shutting_down")
            self._refuse(job.request.key, error)
        elif waiting >= self._max_queue + self._backend.info.slots - len(self._scheduler.running):
            seconds = max(1.0, self._service_s * waiting / self._backend.info.slots)
            error = RequestError(
                f"the queue is full: {waiting} requests wait",
                status=429,
                code="queue_full",
                retry_after=seconds,
            )
            self._refuse(job.request.key, error)
        else:
            self._jobs[job.request.key] = job
            self._of[job.sequence] = job
            self._scheduler.add(job.sequence)

    def _expire(self) -> None:
        now = self._clock()
        if self._draining is not None and now >= self._draining:
            for job in list(self._jobs.values()):
                self._finish(job, "cancelled")
        for job in list(self._jobs.values()):
            if job.request.timeout_s is not None and now - job.arrived >= job.request.timeout_s:
                self._finish(job, "timeout")

    def _embed_one(self, item: _Embed) -> None:
        assert isinstance(self._backend, Embeds)
        try:
            vector = self._backend.embed(item.tokens)
        except EdgeError as error:
            self._refuse(item.key, RequestError(str(error), status=503, code="embedding_failed"))
            return
        self._emit([msg.Embedded(item.key, vector.astype("<f4").tobytes(), len(item.tokens))])

    def _draft(self, sequence: Sequence, most: int, rows: int) -> list[int]:
        lookup = self._of[sequence].lookup
        if lookup is None:
            return []
        return lookup.draft(most, rows, functools.partial(self._costs.longer, rows))

    def _step(self, plan: list[Work], decoding: int) -> None:
        rows = [self._row(work) for work in plan]
        prefill = [work for work in plan if not work.decodes]
        self._prefilling = frozenset(work.sequence.key for work in prefill)
        before = self._clock()
        for work in prefill:
            job = self._of[work.sequence]
            job.started = job.started or before
        masks = {
            work.sequence: self._masks.submit(matcher.mask)
            for work in plan
            if (matcher := self._of[work.sequence].matcher) is not None and work.ends
        }
        # A step without prompts is never interrupted: it can be booked before its end.
        self._unbooked = [] if prefill else list(zip(plan, rows, strict=True))
        try:
            outputs = self._backend.step(rows)
        except StepInterrupted:
            self._unbooked = []
            for row in rows:
                self.cache.restore(row.slot)
            return
        finally:
            self._prefilling = frozenset()
        now = self._clock()
        self._steps += 1
        self._step_tokens += sum(len(row.tokens) for row in rows)
        self._took = now - before
        self._step_s += self._took
        drafted = sum(len(work.draft) for work in plan)
        if not drafted:
            self._prefill_budget.learn(decoding, sum(work.n for work in prefill), self._took)
        if self._speculate and not prefill:
            self._costs.learn(decoding + drafted, self._took)
        if prefill:
            self._unbooked = list(zip(plan, rows, strict=True))
        self._book()
        ends: list[tuple[Job, Work, int]] = []
        at = 0
        for work, row in zip(plan, rows, strict=True):
            if row.outputs:
                ends.append((self._of[work.sequence], work, at))
                at += row.outputs
        picked = self._picked(ends, outputs)
        for job, work, at in ends:
            choice = picked.get(at)
            if job.plain and job.first and not work.draft:
                token = (choice or _chosen(job, outputs[at])).token
                if (reason := job.count(token)) != "stop":
                    self._unsaid.append((job, token))
                if reason is not None:
                    self._finish(job, reason)
                continue
            masked = masks.get(work.sequence)
            found = outputs[at : at + 1 + len(work.draft)]
            self._urgent |= self._advance(job, work, found, masked, choice, now)
        if not self._backend.info.overlaps:
            self._settle()

    def _meanwhile(self) -> None:
        """What is left of the last step, and what is known of this one, while this one is computed."""
        self._book()
        self._settle()

    def _book(self) -> None:
        """Tell the cache of the rows that were, or are sure to be, computed."""
        for work, row in self._unbooked:
            self.cache.extend(row.slot, row.tokens)
            work.sequence.computed += work.n
        self._unbooked = []

    def _say(self) -> None:
        """Make the text of the tokens that were booked without it."""
        for job, token in self._unsaid:
            job.say(token, self._backend)
        self._unsaid = []

    def _settle(self) -> None:
        """Say what is unsaid, and send it where that is due."""
        self._say()
        now = self._clock()
        # Now, unless the next step will end nearer to when it is due.
        if self._urgent or now - self._flushed >= self._flush_s - self._took / 2:
            self._flush(now)

    def _row(self, work: Work) -> Row:
        sequence = work.sequence
        assert sequence.slot is not None
        start = sequence.computed
        tokens = sequence.tokens[start : start + work.n]
        if work.draft:
            tokens += work.draft
        job = self._of[sequence]
        few = job.free and job.sampler.reach <= self._backend.info.candidates
        return Row(sequence.slot, start, tokens, work.outputs, few)

    def _picked(self, ends: list[tuple[Job, Work, int]], outputs: StepOutputs) -> dict[int, Choice]:
        """Output -> what is sampled there, for rows that wait for nothing, where it pays to do so at once."""
        if len(ends) < 2 or not isinstance(outputs, np.ndarray):
            return {}
        if not (free := [(job.sampler, at) for job, _, at in ends if job.free]):
            return {}
        pool = self._samplers if outputs.size >= _WIDE else None
        if all(sampler.plain for sampler, _ in free):
            best = _argmax(outputs, pool)
            return {at: sampler.pick_best(best[at], outputs[at]) for sampler, at in free}
        if pool is None:
            return {}

        def pick(part: list[tuple[Sampler, int]]) -> list[tuple[int, Choice]]:
            return [(at, sampler.pick(outputs[at])) for sampler, at in part]

        parts = [free[start::_SAMPLERS] for start in range(_SAMPLERS)]
        return dict(itertools.chain.from_iterable(pool.map(pick, parts)))

    def _advance(
        self,
        job: Job,
        work: Work,
        outputs: StepOutputs,
        masked: Future[Mask] | None,
        first: Choice | None,
        now: float,
    ) -> bool:
        """Sample after each output as long as the draft was right. True for an event that may not wait.

        first: what was sampled after the first output already.
        """
        sequence = job.sequence
        mask = None
        if masked is not None:
            try:
                mask = masked.result()
            except RequestError as error:
                self._fail(job, error)
                return True
        elif job.thinking_budget is not None:
            mask = job.thinking_budget.mask()
        urgent = False
        right = 0
        reason: str | None = None
        if not job.first:
            job.first = now
            urgent = True
        for i in range(len(work.draft) + 1):
            found = outputs[i]
            choice = first if i == 0 and first is not None else _chosen(job, found, mask)
            try:
                reason = job.take(choice, self._backend)
            except RequestError as error:
                self._fail(job, error)
                return True
            drafted = i < len(work.draft) and choice.token == work.draft[i]
            if drafted:
                right += 1
            if reason is not None or not drafted:
                break
        if work.draft:
            job.drafted += len(work.draft)
            job.accepted += right
            if job.lookup is not None:
                job.lookup.learn(len(work.draft), right)
            sequence.computed += right
            assert sequence.slot is not None
            self.cache.truncate(sequence.slot, sequence.computed)
        if reason is not None:
            self._finish(job, reason)
            return True
        return urgent

    def _forget(self, job: Job) -> None:
        self._scheduler.remove(job.sequence, keep=job.request.reuse)
        del self._jobs[job.request.key], self._of[job.sequence]

    def _fail(self, job: Job, error: RequestError) -> None:
        self._forget(job)
        self._refuse(job.request.key, error)

    def _finish(self, job: Job, reason: str) -> None:
        self._say()
        self._urgent = True
        now = self._clock()
        self._events.append(job.done(reason, now))
        self._forget(job)
        # A slot that is free is told at once.
        self._stats_at = 0.0
        self._service_s = 0.9 * self._service_s + 0.1 * (now - (job.started or now))

    def _flush(self, now: float) -> None:
        for key, job in self._jobs.items():
            if job.pending or job.pending_tokens:
                self._events.append(msg.Delta(key, job.pending, job.pending_tokens, job.logprobs or None))
                job.pending, job.pending_tokens, job.logprobs = "", 0, []
        self._flushed, self._urgent = now, False
        self._send()

    def _send(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._emit(events)

    def _report(self, *, force: bool = False) -> None:
        """Send what is left, and the gauges now and then."""
        now = self._clock()
        if force or now - self._stats_at >= STATS_S:
            self._stats_at = now
            self._events.append(
                msg.Stats(
                    running=len(self._scheduler.running),
                    waiting=len(self._scheduler.waiting),
                    busy_slots=self.cache.busy,
                    kv_tokens=sum(self.cache.lengths),
                    steps=self._steps,
                    step_tokens=self._step_tokens,
                    step_s=self._step_s,
                    up_s=now - self._began,
                )
            )
        if self._events and (force or not self._jobs or any(isinstance(e, msg.Done) for e in self._events)):
            self._send()
