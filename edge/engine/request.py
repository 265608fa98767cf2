"""A request in the engine: what becomes of it, and what was made for it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge.backends.base import Backend
from edge.engine import protocol as msg
from edge.engine.detokenizer import TextStream
from edge.engine.grammar import Grammars, Matcher
from edge.engine.prompt_lookup import Lookup
from edge.engine.sampling import Choice, Sampler
from edge.engine.scheduler import Sequence
from edge.engine.thinking_budget import ThinkingBudget
from edge.errors import RequestError
from edge.reasoning import ReasoningCounter


@dataclass(slots=True, eq=False)
class Job:
    """A request in the engine: what was asked, and everything made for it so far.

    free: its next token depends on nothing but the logits. plain: nor does anything depend on the text of its
    tokens, which may be made later.
    """

    request: msg.Submit
    sequence: Sequence
    sampler: Sampler
    text: TextStream
    stop_ids: frozenset[int]
    lookup: Lookup | None
    matcher: Matcher | None
    thinking_budget: ThinkingBudget | None
    thought: ReasoningCounter | None
    arrived: float
    started: float = 0.0
    first: float = 0.0
    pending: str = ""
    pending_tokens: int = 0
    logprobs: list[msg.Logprob] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    free: bool = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        params = self.request.params
        self.free = self.matcher is None and self.thinking_budget is None
        self.plain = self.free and self.thought is None and params.logprobs is None and not params.stop

    def count(self, token: int) -> str | None:
        """Book one token; the reason to finish, if its number or its place ends the request."""
        tokens = self.sequence.tokens
        tokens.append(token)
        self.pending_tokens += 1
        if token in self.stop_ids and not self.request.params.ignore_eos:
            return "stop"
        if self.lookup is not None:
            self.lookup.extend(token)
        return "length" if len(tokens) >= self.sequence.limit else None

    def say(self, token: int, backend: Backend) -> bytes:
        """Make a booked token's text."""
        data = backend.decode(token)
        self.pending += self.text.push(data)
        return data

    def take(self, choice: Choice, backend: Backend) -> str | None:
        """Book one token and its text; the reason to finish, if it ends the request."""
        token = choice.token
        if (reason := self.count(token)) == "stop":
            return reason
        data = self.say(token, backend)
        if choice.logprob is not None:
            top = [(backend.decode(t), p) for t, p in choice.top]
            self.logprobs.append(msg.Logprob(data, choice.logprob, top))
        complete = self.matcher is not None and self.matcher.accept(token)
        if self.thought is not None:
            self.thought.take(data)
        if self.thinking_budget is not None:
            self.matcher = self.thinking_budget.take(token, data) or self.matcher
        if complete or self.text.stopped is not None:
            return "stop"
        return reason

    def done(self, reason: str, now: float) -> msg.Done:
        """The request's last event, with what was not sent yet."""
        self.pending += self.text.finish()
        if self.text.stopped is not None and reason == "length":
            reason = "stop"
        started, first = self.started or now, self.first or now
        return msg.Done(
            key=self.request.key,
            text=self.pending,
            tokens=self.pending_tokens,
            reason=reason,
            prompt_tokens=self.sequence.prompt,
            completion_tokens=len(self.sequence.tokens) - self.sequence.prompt,
            cached_tokens=self.sequence.cached,
            queue_s=started - self.arrived,
            prefill_s=first - started,
            decode_s=now - first,
            stop=self.text.stopped,
            drafted=self.drafted,
            accepted=self.accepted,
            reasoning_tokens=self.thought.tokens if self.thought is not None else 0,
            logprobs=self.logprobs or None,
        )


def prompt_tokens(backend: Backend, prompt: str | list[int], *, special: bool = True) -> list[int]:
    """The ids of a prompt, with one begin token where the model wants it. Raises RequestError."""
    info = backend.info
    if isinstance(prompt, str):
        tokens = backend.encode(prompt, special=special)
        begins = bool(info.bos_text) and special and prompt.startswith(info.bos_text)
        if info.add_bos and info.bos_id is not None and not begins:
            tokens.insert(0, info.bos_id)
    else:
        tokens = list(prompt)
        if any(not 0 <= t < info.vocab for t in tokens):
            raise RequestError(f"token ids must lie in 0..{info.vocab - 1}", param="prompt")
    if not tokens:
        raise RequestError("the prompt is empty", code="empty_prompt", param="prompt")
    if len(tokens) >= info.context:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens; this server's context holds {info.context}, "
            "one of them for the answer",
            code="context_length_exceeded",
            param="messages",
            hint="shorten the prompt, or serve with a larger --ctx",
        )
    return tokens


def admit(
    request: msg.Submit, backend: Backend, grammars: Grammars, *, speculate: bool, arrived: float
) -> Job:
    """What becomes of a request. Raises RequestError for one that cannot be served here."""
    info = backend.info
    tokens = prompt_tokens(backend, request.prompt, special=request.special)
    params = request.params
    for param, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_ids)):
        if bad := [i for i in ids if not 0 <= i < info.vocab]:
            raise RequestError(f"{param}: token id {bad[0]} is outside 0..{info.vocab - 1}", param=param)
    limit = info.context if params.max_tokens is None else len(tokens) + params.max_tokens
    stop_ids = info.stop_ids | frozenset(params.stop_ids)
    matcher = grammars.compile(request.constraint) if request.constraint is not None else None
    thinking_budget = thought = None
    if (asked := request.reasoning) is not None:
        thought = ReasoningCounter(inside=asked.inside)
        if asked.budget is not None or asked.constraint_after:
            thinking_budget = ThinkingBudget(asked, thought, backend, stop_ids, matcher)
        if asked.constraint_after:
            matcher = None
    # A draft of a guided answer would need a mask for each of its tokens.
    drafts = speculate and request.speculate and matcher is None and thinking_budget is None
    return Job(
        request=request,
        sequence=Sequence(request.key, tokens, min(limit, info.context), reuse=request.reuse),
        sampler=Sampler(params, info.vocab, tokens, stop_ids),
        text=TextStream(params.stop),
        stop_ids=stop_ids,
        lookup=Lookup(tokens) if drafts else None,
        matcher=matcher,
        thinking_budget=thinking_budget,
        thought=thought,
        arrived=arrived,
    )
