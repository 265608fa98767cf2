"""The engine's loop: schedule -> run -> sample -> publish, once for each step of the model.

One thread calls `Engine.run` and owns the backend. Other threads only hand in requests (`submit`, `embed`)
and `cancel` or `drain`. Sampling, stop strings and finish reasons are decided here, so that a request ends at
the very step that ends it.
"""

from __future__ import annotations

import functools
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from edge.backends.base import Backend, Row, StepInterrupted, StepOutputs, nothing
from edge.engine import protocol as msg
from edge.engine.grammar import Grammars
from edge.engine.kv_cache import KVCache
from edge.engine.prefill_budget import PrefillBudget, StepTimes
from edge.engine.prefix_ram import PrefixRam
from edge.engine.prefix_store import PrefixStore
from edge.engine.request import Request, admit, prompt_tokens
from edge.engine.sampling import BatchSampler, Choice, Mask
from edge.engine.scheduler import Scheduler, Sequence, Work
from edge.errors import EdgeError, RequestError

Emit = Callable[[list[msg.Event]], None]

# Tokens that come faster than an eye reads share an event; a request's first one never waits.
FLUSH_S = 0.04
STATS_S = 0.25
# That a step waits for a constraint. Common ones take 25 ms over 152,000 tokens at worst, several times that
# on a machine whose cores others use; a regular expression whose text is fixed for a million characters took
# 4 s, in which every answer stood still.
SLOWEST_MASK_S = 1.0


@dataclass(slots=True)
class Step:
    """A step of the model, as scheduled: plan[i], a row of requests[i], is run as rows[i].

    decoding: streams without prompt tokens in it. prefill: the part of the plan that reads prompts.
    masks: by a request's key, what its grammar allows next; computed while the model runs.
    cached: whether `KVCache` has been told of the rows.
    """

    plan: list[Work]
    requests: list[Request]
    rows: list[Row]
    decoding: int
    prefill: list[Work]
    masks: dict[int, Future[Mask]]
    cached: bool = False


@dataclass(slots=True)
class StepResult:
    """What is left to do for a step whose tokens are sampled: to publish them.

    seconds: what the step took; the next one will take about as long. urgent: a request's first token or its
    end is among them, so they are sent when published, whether or not their time has come.
    """

    seconds: float = 0.0
    urgent: bool = False


class Engine:
    """Runs requests on a backend. emit: called with the events of a step; must be thread-safe.

    A turn of the loop:

    1. `_schedule` decides what the next step computes: a `Step`.
    2. `_run` hands its rows to the backend, and tells `KVCache` of them (`_cache_rows`).
    3. `_sample` picks the tokens, appends them to their requests and ends those that are complete. What
       remains to be done is a `StepResult`.
    4. `_publish` turns tokens into text and sends it, every `flush_s` seconds or when the result is urgent.

    Whatever need not be done before the next step starts is put off, and done while it runs:

    - A request's text is made when it is sent, where nothing else reads it (`Request.plain`). Until then the
      request keeps the token ids itself, so one that ends in between loses nothing.
    - A backend that computes elsewhere (`BackendInfo.overlaps`) calls `_meanwhile` during its step. There the
      last result is published, and the rows of the running step are entered in `KVCache`. With any other
      backend `turn` publishes at its end.
    - `Step.cached` keeps rows from being entered twice. A step that reads a prompt may still be interrupted,
      so its rows are entered after it has returned; those of an interrupted one never are.
    - A backend that was interrupted or that failed may not have called `_meanwhile`. The urgency of a result
      that was not published then passes on to the next one.
    """

    def __init__(
        self,
        backend: Backend,
        emit: Emit,
        *,
        max_queue: int = 256,
        speculate: bool = True,
        store: PrefixStore | None = None,
        ram: PrefixRam | None = None,
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
        self.cache = KVCache(backend, store, ram)
        self._scheduler = Scheduler(self.cache, slots=info.slots, batch=info.batch, outputs=info.outputs)
        self._prefill_budget = PrefillBudget(info.batch)
        # What drafts cost; apart from the budget, which must not forget how long steps of many streams are.
        self._draft_times = StepTimes(fade=0.998)
        self._grammars = Grammars(backend)
        # Masks are computed beside the model's step; llguidance lets go of the GIL.
        self._mask_thread = ThreadPoolExecutor(1, "mask")
        # Where the model runs on a GPU, the CPU has cores to spare when a step ends.
        self._sampler = BatchSampler(parallel=info.device != "cpu")
        self._inbox: queue.SimpleQueue[Request | msg.Cancel | msg.Drain | msg.Embed] = queue.SimpleQueue()
        self._requests: dict[int, Request] = {}
        self._embeds: deque[msg.Embed] = deque()
        self._running: Step | None = None
        self._result = StepResult()
        self._events: list[msg.Event] = []
        self._began = self._flushed = clock()
        self._stats = msg.Stats()
        self._stats_at = 0.0
        self._service_s = 1.0
        self._draining: float | None = None
        if info.overlaps:
            backend.meanwhile = self._meanwhile

    # -- from any thread ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request is being served or waits to be taken in."""
        return bool(self._requests) or not self._inbox.empty()

    def submit(
        self, message: msg.Submit, arrived: float | None = None, check: Callable[[], None] = nothing
    ) -> None:
        """Take a request in; one that cannot be served is answered with Refused at once.

        arrived: on the engine's clock, None for now. check: see tokenize.encode.
        """
        try:
            self._inbox.put(
                admit(
                    message,
                    self._backend,
                    self._grammars,
                    speculate=self._speculate,
                    arrived=self._clock() if arrived is None else arrived,
                    check=check,
                )
            )
        except RequestError as error:
            self._refuse(message.key, error)

    def embed(self, message: msg.Embed, check: Callable[[], None] = nothing) -> None:
        """Take in a text to be turned into a vector, between steps; answered with Embedded or Refused."""
        try:
            if not self._backend.info.embedding:
                raise RequestError("this backend gives no embeddings", code="unsupported", param="model")
            tokens = prompt_tokens(self._backend, message.prompt, check=check)
            self._inbox.put(msg.Embed(message.key, tokens))
        except RequestError as error:
            self._refuse(message.key, error)

    def cancel(self, key: int) -> None:
        """End a request in whatever phase it is; a long step that reads its prompt is cut short."""
        self._inbox.put(msg.Cancel(key))
        step = self._running
        if step is not None and any(work.sequence.key == key for work in step.prefill):
            self._backend.interrupt()

    def drain(self, seconds: float) -> None:
        """Admit nothing more and let `run` return when all is done, or after `seconds`."""
        self._inbox.put(msg.Drain(seconds))

    def _refuse(self, key: int, error: RequestError) -> None:
        self._emit([msg.Refused.of(key, error)])

    # -- the engine's own thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `drain` was asked and everything has ended; then keep prefixes on disk, if asked."""
        while self.turn(wait=True):
            pass
        self.cache.keep_on_disk()

    def turn(self, *, wait: bool = False) -> bool:
        """Take in what has come, run one step, send events. False when drained. wait: block while idle."""
        idle = not self._requests and not self._embeds
        if idle:
            self._report(force=True)
            while self._inbox.empty() and self.cache.keep_long():
                pass
        self._receive(block=wait and idle and self._draining is None)
        self._expire()
        if self._draining is not None and not self._requests:
            self._report(force=True)
            return False
        if self._embeds:
            self._embed_next()
        step = self._schedule()
        if step is not None and (outputs := self._run(step)) is not None:
            self._sample(step, outputs)
        if step is None or not self._backend.info.overlaps:
            self._publish()
        self._report()
        return True

    def _receive(self, *, block: bool) -> None:
        while block or not self._inbox.empty():
            block = False
            match self._inbox.get():
                case Request() as request:
                    self._enqueue(request)
                case msg.Cancel(key):
                    if key in self._requests:
                        self._finish(self._requests[key], "cancelled")
                case msg.Embed() as message:
                    self._embeds.append(message)
                case msg.Drain(seconds):
                    self._draining = self._clock() + seconds

    def _enqueue(self, request: Request) -> None:
        waiting, slots = len(self._scheduler.waiting), self._backend.info.slots
        if self._draining is not None:
            error = RequestError("the server is shutting down", status=503, code="shutting_down")
        elif waiting >= self._max_queue + slots - len(self._scheduler.running):
            error = RequestError(
                f"the queue is full: {waiting} requests wait",
                status=429,
                code="queue_full",
                retry_after=max(1.0, self._service_s * waiting / slots),
            )
        else:
            self._requests[request.key] = request
            self._scheduler.add(request.sequence)
            return
        self._refuse(request.key, error)

    def _expire(self) -> None:
        now = self._clock()
        drained = self._draining is not None and now >= self._draining
        for request in list(self._requests.values()):
            if drained:
                self._finish(request, "cancelled")
            elif now >= request.deadline:
                self._finish(request, "timeout")

    def _embed_next(self) -> None:
        message = self._embeds.popleft()
        assert isinstance(message.prompt, list)
        try:
            vector = self._backend.embed(message.prompt)
        except EdgeError as error:
            self._refuse(message.key, RequestError(str(error), status=503, code="embedding_failed"))
            return
        self._emit([msg.Embedded(message.key, vector.astype("<f4").tobytes(), len(message.prompt))])

    # -- schedule -------------------------------------------------------------------------------------

    def _schedule(self) -> Step | None:
        """The next step; None where there is nothing to compute."""
        decoding, newcomers = self._scheduler.load()
        chunk = self._prefill_budget.chunk(decoding, newcomers)
        drafts = self._speculate and decoding <= self._backend.info.draft_streams
        plan = self._scheduler.plan(chunk, self._draft if drafts else None)
        if not plan:
            return None
        requests = [self._requests[work.sequence.key] for work in plan]
        rows = [self._row(work, request) for work, request in zip(plan, requests, strict=True)]
        prefill = [work for work in plan if not work.decodes]
        masks = {
            request.key: self._mask_thread.submit(request.matcher.mask)
            for work, request in zip(plan, requests, strict=True)
            if request.matcher is not None and work.ends
        }
        return Step(plan, requests, rows, decoding, prefill, masks)

    def _draft(self, sequence: Sequence, most: int, rows: int) -> list[int]:
        lookup = self._requests[sequence.key].lookup
        if lookup is None:
            return []
        return lookup.draft(most, rows, functools.partial(self._draft_times.longer, rows))

    def _row(self, work: Work, request: Request) -> Row:
        sequence = work.sequence
        assert sequence.slot is not None
        start = sequence.computed
        tokens = sequence.tokens[start : start + work.n]
        if work.draft:
            tokens += work.draft
        few = request.free and request.sampler.reach <= self._backend.info.candidates
        return Row(sequence.slot, start, tokens, work.outputs, few)

    # -- run ------------------------------------------------------------------------------------------

    def _run(self, step: Step) -> StepOutputs | None:
        """Compute a step and learn from how long it took. None if it was interrupted."""
        began = self._clock()
        for work in step.prefill:
            request = self._requests[work.sequence.key]
            request.started = request.started or began
        self._running = step
        try:
            outputs = self._backend.step(step.rows)
        except StepInterrupted:
            for row in step.rows:
                self.cache.restore(row.slot)
            return None
        finally:
            self._running = None
        seconds = self._clock() - began
        self._cache_rows(step)
        self._result = StepResult(seconds, self._result.urgent)
        self._stats.steps += 1
        self._stats.step_tokens += sum(len(row.tokens) for row in step.rows)
        self._stats.step_s += seconds
        drafted = sum(len(work.draft) for work in step.plan)
        if not drafted:
            self._prefill_budget.learn(step.decoding, sum(work.n for work in step.prefill), seconds)
        if self._speculate and not step.prefill:
            self._draft_times.learn(step.decoding + drafted, seconds)
        return outputs

    def _meanwhile(self) -> None:
        """Called by a backend that overlaps, while it computes a step."""
        if self._running is not None and not self._running.prefill:
            self._cache_rows(self._running)
        self._publish()

    def _cache_rows(self, step: Step) -> None:
        """Tell the cache of rows that were, or are sure to be, computed."""
        if step.cached:
            return
        step.cached = True
        for work, row in zip(step.plan, step.rows, strict=True):
            self.cache.extend(row.slot, row.tokens)
            work.sequence.computed += work.n

    # -- sample ---------------------------------------------------------------------------------------

    def _sample(self, step: Step, outputs: StepOutputs) -> None:
        """Append the next tokens of every row that has outputs."""
        now = self._clock()
        ends: list[tuple[Request, Work, int]] = []
        index = 0
        for work, request, row in zip(step.plan, step.requests, step.rows, strict=True):
            if row.outputs:
                ends.append((request, work, index))
                index += row.outputs
        choices = {}
        if len(ends) > 1:
            free = [(request.sampler, index) for request, _, index in ends if request.free]
            choices = self._sampler.pick(outputs, free)
        for request, work, index in ends:
            if not request.first:
                request.first = now
                self._result.urgent = True
            try:
                mask = None if request.free else self._mask(request, step)
                choice = choices.get(index) or request.sampler.pick(outputs[index], mask)
                reason = request.take(choice)
                if work.draft:
                    reason = self._verify(request, work.draft, choice, reason, outputs[index + 1 :])
            except RequestError as error:
                self._forget(request)
                self._refuse(request.key, error)
            else:
                if reason is not None:
                    self._finish(request, reason)

    def _mask(self, request: Request, step: Step) -> Mask | None:
        if request.key not in step.masks:
            return request.thinking_budget.mask() if request.thinking_budget is not None else None
        assert request.matcher is not None
        mask = step.masks[request.key]
        if mask.cancelled():
            mask = self._mask_thread.submit(request.matcher.mask)
        try:
            return mask.result(SLOWEST_MASK_S)
        except TimeoutError as error:
            # Its thread is left to it: other answers and their masks go on.
            self._mask_thread.shutdown(wait=False, cancel_futures=True)
            self._mask_thread = ThreadPoolExecutor(1, "mask")
            raise RequestError(
                f"the next token of the constraint takes more than {SLOWEST_MASK_S} s to find",
                code="grammar_error",
                param="response_format",
                hint="a repetition of fixed text that is thousands of characters long is the usual reason",
            ) from error

    def _verify(
        self, request: Request, draft: list[int], choice: Choice, reason: str | None, outputs: StepOutputs
    ) -> str | None:
        """Sample on for as long as the draft was right. choice, reason: what came of the row's first output;
        outputs: those after it. Returns the reason to finish, if there is one.
        """
        accepted = 0
        while accepted < len(draft) and choice.token == draft[accepted]:
            accepted += 1
            if reason is not None:
                break
            choice = request.sampler.pick(outputs[accepted - 1])
            reason = request.take(choice)
        request.learn_draft(len(draft), accepted)
        sequence = request.sequence
        sequence.computed += accepted
        assert sequence.slot is not None
        self.cache.truncate(sequence.slot, sequence.computed)
        return reason

    def _forget(self, request: Request) -> None:
        self._result.urgent = True
        self._scheduler.remove(request.sequence, keep=request.submit.reuse)
        del self._requests[request.key]

    def _finish(self, request: Request, reason: str) -> None:
        now = self._clock()
        self._events.append(request.done(reason, now))
        self._forget(request)
        # A free slot is reported at once.
        self._stats_at = 0.0
        self._service_s = 0.9 * self._service_s + 0.1 * (now - (request.started or now))

    # -- publish --------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Send the text of all requests, where the last result is urgent or their time has come."""
        now = self._clock()
        # Now, unless the next step will end nearer to that time.
        due = now - self._flushed >= self._flush_s - self._result.seconds / 2
        if not due and not self._result.urgent:
            return
        self._events += [request.delta() for request in self._requests.values() if request.pending_tokens]
        self._flushed, self._result.urgent = now, False
        self._send()

    def _send(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._emit(events)

    def _report(self, *, force: bool = False) -> None:
        """Send the gauges now and then, and at once what ends a request."""
        now = self._clock()
        if force or now - self._stats_at >= STATS_S:
            self._stats_at = now
            stats = msgspec.structs.replace(
                self._stats,
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                busy_slots=self.cache.busy,
                kv_tokens=sum(self.cache.lengths),
                ram_bytes=self.cache.ram.bytes,
                ram_hits=self.cache.ram.hits,
                ram_evictions=self.cache.ram.evictions,
                up_s=now - self._began,
            )
            self._events.append(stats)
        if self._events and (
            force or not self._requests or any(isinstance(event, msg.Done) for event in self._events)
        ):
            self._send()
