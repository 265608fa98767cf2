"""What OpenAI's routes share: request fields, the response objects and chunks, usage, logprobs."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from pydantic import Field

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.errors import RequestError
from edge.server.conversation import Item, merged
from edge.server.request_fields import MAX_TOKENS, Constrained, Sampled, TokenId
from edge.server.served_model import ServedModel
from edge.server.streaming import DONE, dump, event

MAX_CHOICES = 16
MAX_PROMPTS = 64
assert MAX_CHOICES <= MAX_PROMPTS

Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
IdPrompts = Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]

# JSON has no infinity; OpenAI writes this for a probability of zero.
_NEVER = -9999.0


class CompletionFields(Sampled, Constrained):
    """Fields of both kinds of completions."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise RequestError for what cannot be honoured."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream: true", param="stream_options")

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


def prompt_list(given: Any) -> list[str | list[int]]:
    """One entry for each prompt of a text, token ids, or a list of either."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class ResponseObjects:
    """The objects of one response: its id, its time and its model are the same in each.

    A chunk that carries only text is put together from bytes that are made once; only the text is encoded.
    """

    def __init__(self, model: ServedModel, kind: str, prefix: str) -> None:
        self._kind = kind
        self._base = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.digest or None,
        }
        self._chunk_kind = "chat.completion.chunk" if kind == "chat.completion" else kind
        self._before: dict[tuple[int, str], bytes] = {}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        return {**self._base, "object": self._kind, "choices": choices, "usage": usage}

    def chunk(self, *choices: dict[str, Any], **extra: Any) -> bytes:
        return event({**self._base, "object": self._chunk_kind, "choices": choices, **extra})

    def text(self, index: int, name: str, text: str) -> bytes:
        """A chunk with only text in it. name: content, reasoning_content, or text (completions)."""
        before = self._before.get((index, name))
        if before is None:
            head = dump({**self._base, "object": self._chunk_kind, "choices": []})[:-2]
            field = b'"text":' if name == "text" else b'"delta":{"' + name.encode("ascii") + b'":'
            before = b"data: " + head + b'{"index":' + str(index).encode("ascii") + b"," + field
            self._before[(index, name)] = before
        return before + dump(text) + (_AFTER_TEXT if name == "text" else _AFTER_DELTA)

    async def events(
        self,
        streams: list[Stream],
        take: Callable[[int, Item], bytes],
        *,
        choices: int,
        include_usage: bool,
    ) -> AsyncIterator[bytes]:
        """The chunks of a whole response. take: those of one item of a stream. choices: for each prompt."""
        dones: dict[int, msg.Done] = {}
        async for index, item in merged(streams):
            chunk = take(index, item)
            if isinstance(item, msg.Done):
                dones[index] = item
                if len(dones) == len(streams):
                    total = usage([dones[i] for i in range(len(streams))], choices)
                    chunk += (self.chunk(usage=total) if include_usage else b"") + DONE
            if chunk:
                yield chunk


_AFTER_TEXT = b',"logprobs":null,"finish_reason":null}]}\n\n'
_AFTER_DELTA = b"}" + _AFTER_TEXT


def usage(dones: list[msg.Done], choices: int = 1) -> dict[str, Any]:
    """OpenAI's usage object. choices: so many answers in a row share a prompt, which counts once."""
    firsts = dones[::choices]
    prompt = sum(done.prompt_tokens for done in firsts)
    completion = sum(done.completion_tokens for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(done.cached_tokens for done in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(done.reasoning_tokens for done in dones)},
    }


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def chat_logprobs(logprobs: list[msg.Logprob] | None) -> dict[str, Any] | None:
    """Logprobs in the form of chat completions."""

    def row(piece: bytes, logprob: float) -> dict[str, Any]:
        return {"token": _text(piece), "bytes": list(piece), "logprob": max(logprob, _NEVER)}

    if not logprobs:
        return None
    rows = [
        {**row(entry.token, entry.logprob), "top_logprobs": [row(*pair) for pair in entry.top]}
        for entry in logprobs
    ]
    return {"content": rows, "refusal": None}


def text_logprobs(logprobs: list[msg.Logprob] | None, offset: int) -> dict[str, Any] | None:
    """Logprobs in the form of completions. offset: where in the answer's text the first token begins."""
    if not logprobs:
        return None
    tokens = [_text(entry.token) for entry in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [max(entry.logprob, _NEVER) for entry in logprobs],
        "top_logprobs": [
            {_text(piece): max(value, _NEVER) for piece, value in entry.top} for entry in logprobs
        ],
        "text_offset": list(itertools.accumulate(map(len, tokens[:-1]), initial=offset)),
    }
