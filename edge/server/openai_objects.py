"""The parts that OpenAI's objects share: identifiers, usage, logprobs of both kinds, ready-made chunks."""

from __future__ import annotations

import secrets
import time
from typing import Any

from edge.engine import protocol as msg
from edge.server.served_model import Serving
from edge.server.streaming import dump, event

# JSON has no infinity; OpenAI writes this for a probability of nothing.
_NEVER = -9999.0


class Shape:
    """The fields that every object of one response shares.

    A chunk of plain text is put together from bytes that are made once: nothing is encoded but the text.
    """

    def __init__(self, serving: Serving, kind: str, prefix: str) -> None:
        self.serving = serving
        self._kind = kind
        self._base = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": serving.name,
            "system_fingerprint": serving.digest or None,
        }
        self._chunk_kind = "chat.completion.chunk" if kind == "chat.completion" else kind
        self._before: dict[tuple[int, str], bytes] = {}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._base, "object": self._kind, "choices": choices, "usage": usage}

    def chunk(self, choice: dict[str, Any] | None, usage: dict[str, Any] | None = None) -> bytes:
        choices = [] if choice is None else [choice]
        body = {**self._base, "object": self._chunk_kind, "choices": choices}
        if usage is not None:
            body["usage"] = usage
        return event(body)

    def text(self, index: int, name: str, text: str) -> bytes:
        """A chunk that carries nothing but text; name: content, reasoning_content, or text (completions)."""
        before = self._before.get((index, name))
        if before is None:
            head = dump({**self._base, "object": self._chunk_kind, "choices": []})[:-2]
            field = b'"text":' if name == "text" else b'"delta":{"' + name.encode("ascii") + b'":'
            before = b"data: " + head + b'{"index":' + str(index).encode("ascii") + b"," + field
            self._before[(index, name)] = before
        after = _AFTER_TEXT if name == "text" else _AFTER_DELTA
        return before + dump(text) + after


_AFTER_TEXT = b',"logprobs":null,"finish_reason":null}]}\n\n'
_AFTER_DELTA = b'},"logprobs":null,"finish_reason":null}]}\n\n'


def usage(dones: list[msg.Done]) -> dict[str, Any]:
    """OpenAI's usage object over the choices of each prompt: one prompt counts once."""
    prompt = dones[0].prompt_tokens
    made = sum(done.completion_tokens for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": dones[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(done.reasoning_tokens for done in dones)},
    }


def summed(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """The usage of several prompts in one request."""
    total: dict[str, Any] = {
        name: sum(one[name] for one in usages)
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        total[name] = {key: sum(one[name][key] for one in usages) for key in usages[0][name]}
    return total


def _token(piece: bytes) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "bytes": list(piece)}


def _finite(value: float) -> float:
    return max(value, _NEVER)


def chat_logprobs(logprobs: list[msg.Logprob] | None) -> dict[str, Any] | None:
    if not logprobs:
        return None
    rows = [
        {
            **_token(entry.token),
            "logprob": _finite(entry.logprob),
            "top_logprobs": [{**_token(piece), "logprob": _finite(value)} for piece, value in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": rows, "refusal": None}


def text_logprobs(logprobs: list[msg.Logprob] | None, offset: int) -> dict[str, Any] | None:
    """The older shape; offset: where in the answer's text the first of these tokens begins."""
    if not logprobs:
        return None
    tokens = [entry.token.decode("utf-8", "replace") for entry in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops = [
        {piece.decode("utf-8", "replace"): _finite(value) for piece, value in entry.top} for entry in logprobs
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
