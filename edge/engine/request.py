"""A request in the engine: what was asked for, and its state so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edge.backends.base import Backend, nothing
from edge.engine import protocol as msg
from edge.engine import tokenize
from edge.engine.detokenizer import TextStream
from edge.engine.grammar import Grammars, Matcher
from edge.engine.prompt_lookup import Lookup
from edge.engine.sampling import Choice, Sampler
from edge.engine.scheduler import Sequence
from edge.engine.thinking_budget import ThinkingBudget
from edge.errors import RequestError
from edge.prompt import Prompt
from edge.reasoning import ReasoningCounter


@dataclass(slots=True, eq=False)
class Request:
    """A request in the engine. arrived, started, first: times of the engine's clock, 0 until they are known.

    free: sampled from the logits alone (no grammar, no thinking budget). plain: also nobody reads its text
    (no stop strings, no logprobs, no reasoning to count), so its tokens become text when it is sent.
    undecoded: tokens of a plain request that are not yet text. pending, pending_tokens: what is not yet sent.
    """

    submit: msg.Submit
    sequence: Sequence
    sampler: Sampler
    text: TextStream
    decode: Callable[[int], bytes]
    stop_ids: frozenset[int]
    lookup: Lookup | None
    matcher: Matcher | None
    thinking_budget: ThinkingBudget | None
    reasoning: ReasoningCounter | None
    arrived: float
    started: float = 0.0
    first: float = 0.0
    undecoded: list[int] = field(default_factory=list)
    pending: str = ""
    pending_tokens: int = 0
    logprobs: list[msg.Logprob] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    key: int = field(init=False)
    deadline: float = field(init=False)
    free: bool = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        submit, params = self.submit, self.submit.params
        self.key = submit.key
        self.deadline = math.inf if submit.timeout_s is None else self.arrived + submit.timeout_s
        self.free = self.matcher is None and self.thinking_budget is None
        self.plain = self.free and self.reasoning is None and params.logprobs is None and not params.stop

    def take(self, choice: Choice) -> str | None:
        """Append a sampled token. Returns the reason to finish, "stop" or "length", if it ends the request.

        Raises RequestError where its grammar cannot be followed.
        """
        token, tokens = choice.token, self.sequence.tokens
        tokens.append(token)
        self.pending_tokens += 1
        if token in self.stop_ids and not self.submit.params.ignore_eos:
            return "stop"
        if self.lookup is not None:
            self.lookup.extend(token)
        reason = "length" if len(tokens) >= self.sequence.limit else None
        if self.plain:
            self.undecoded.append(token)
            return reason
        data = self.decode(token)
        self.pending += self.text.push(data)
        if choice.logprob is not None:
            top = [(self.decode(alternative), logprob) for alternative, logprob in choice.top]
            self.logprobs.append(msg.Logprob(data, choice.logprob, top))
        complete = self.matcher is not None and self.matcher.accept(token)
        if self.reasoning is not None:
            self.reasoning.take(data)
        if self.thinking_budget is not None:
            self.matcher = self.thinking_budget.take(token, data) or self.matcher
        return "stop" if complete or self.text.stopped is not None else reason

    def learn_draft(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens that were proposed, the first `accepted` were right."""
        self.drafted += drafted
        self.accepted += accepted
        if self.lookup is not None:
            self.lookup.learn(drafted, accepted)

    def delta(self) -> msg.Delta:
        """The event that sends what is pending."""
        self._detokenize()
        event = msg.Delta(self.key, self.pending, self.pending_tokens, self.logprobs or None)
        self.pending, self.pending_tokens, self.logprobs = "", 0, []
        return event

    def done(self, reason: str, now: float) -> msg.Done:
        """The request's last event, with what was not sent yet."""
        self._detokenize()
        self.pending += self.text.finish()
        if self.text.stopped is not None and reason == "length":
            reason = "stop"
        started, first = self.started or now, self.first or now
        return msg.Done(
            key=self.key,
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
            reasoning_tokens=self.reasoning.tokens if self.reasoning is not None else 0,
            logprobs=self.logprobs or None,
        )

    def _detokenize(self) -> None:
        if self.undecoded:
            self.pending += self.text.push(b"".join(map(self.decode, self.undecoded)))
            self.undecoded = []


def prompt_tokens(
    backend: Backend,
    prompt: str | list[int] | Prompt,
    *,
    special: bool = True,
    check: Callable[[], None] = nothing,
) -> list[int]:
    """The ids of a prompt, with one begin token where the model wants it. check: see tokenize.encode.

    Raises RequestError.
    """
    info = backend.info
    if isinstance(prompt, (str, Prompt)):
        tokens = tokenize.encode(backend, prompt, special=special, limit=info.context, check=check)
        # By the token: a user's text may begin with its characters.
        begins = special and tokens[:1] == [info.bos_id]
        if info.add_bos and info.bos_id is not None and not begins:
            tokens.insert(0, info.bos_id)
    else:
        tokens = list(prompt)
        check_ids(tokens, info.vocab, "prompt")
    if not tokens:
        raise RequestError("the prompt is empty", code="empty_prompt", param="prompt")
    if len(tokens) >= info.context:
        raise tokenize.too_long(info, str(len(tokens)))
    return tokens


def check_ids(ids: Iterable[int], vocab: int, param: str) -> None:
    """Raise RequestError, which names the request's field `param`, for a token id outside the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab:
            raise RequestError(f"{param}: token id {token} is outside 0..{vocab - 1}", param=param)


def admit(
    submit: msg.Submit,
    backend: Backend,
    grammars: Grammars,
    *,
    speculate: bool,
    arrived: float,
    check: Callable[[], None] = nothing,
) -> Request:
    """The request that `submit` asks for. Raises RequestError for one that cannot be served here.

    check: see tokenize.encode.
    """
    info, params, options = backend.info, submit.params, submit.reasoning
    tokens = prompt_tokens(backend, submit.prompt, special=submit.special, check=check)
    check_ids(params.logit_bias, info.vocab, "logit_bias")
    check_ids(params.stop_ids, info.vocab, "stop_token_ids")
    limit = info.context if params.max_tokens is None else len(tokens) + params.max_tokens
    stop_ids = info.stop_ids | frozenset(params.stop_ids)
    matcher = grammars.compile(submit.constraint) if submit.constraint is not None else None
    thinking_budget = reasoning = None
    if options is not None:
        reasoning = ReasoningCounter(inside=options.inside)
        # A constraint that rules from the first token leaves no room for reasoning.
        if options.constraint_after or (options.budget is not None and matcher is None):
            thinking_budget = ThinkingBudget(options, reasoning, backend, stop_ids, matcher)
        if options.constraint_after:
            matcher = None
    # With a grammar or a thinking budget each token of a draft would need a mask of its own.
    drafts = speculate and submit.speculate and matcher is None and thinking_budget is None
    return Request(
        submit=submit,
        sequence=Sequence(submit.key, tokens, min(limit, info.context), reuse=submit.reuse),
        sampler=Sampler(params, info.vocab, tokens, stop_ids),
        text=TextStream(params.stop),
        decode=backend.decode,
        stop_ids=stop_ids,
        lookup=Lookup(tokens) if drafts else None,
        matcher=matcher,
        thinking_budget=thinking_budget,
        reasoning=reasoning,
        arrived=arrived,
    )
