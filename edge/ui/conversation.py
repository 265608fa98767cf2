"""A conversation with one model, or with two beside each other; as it is on the disk, and how it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import markdown2

from edge.artefact import json_file
from edge.errors import EdgeError
from edge.jobs.job import read
from edge.server.access import KEY_VARIABLE

_EXTRAS = ("fenced-code-blocks", "tables", "break-on-newline", "strike", "cuddled-lists")
_FENCE = "```"


class Conversation:
    """Settings and turns, kept in a file so that every page shows the same.

    models: one name, or two. turns: {"question", "answers": [{"model", "content", "reasoning", "good"}],
    "chosen"}; good: True, False or None; chosen: the index of the better answer, or None.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = read(path) or {}
        self.models: list[str] = kept.get("models", [])
        self.system: str = kept.get("system", "")
        self.temperature: float = kept.get("temperature", 0.7)
        self.max_tokens: int = kept.get("max_tokens", 512)
        self.turns: list[dict[str, Any]] = kept.get("turns", [])

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_path"}

    def keep(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        json_file.write(self._path, self.record())

    def messages(self, turn: int, side: int) -> list[dict[str, str]]:
        """What the model of `side` is asked in a turn: all before it, and the question.

        The conversation goes on from the answer that was chosen; where none was, each side has its own.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for earlier in self.turns[:turn]:
            answers = earlier["answers"]
            index = side if earlier["chosen"] is None else earlier["chosen"]
            answer = answers[min(index, len(answers) - 1)]
            messages += [
                {"role": "user", "content": earlier["question"]},
                {"role": "assistant", "content": answer["content"]},
            ]
        return [*messages, {"role": "user", "content": self.turns[turn]["question"]}]

    def ask(self, question: str) -> dict[str, Any]:
        """Begin a turn with an empty answer for each model."""
        answers = [{"model": name, "content": "", "reasoning": "", "good": None} for name in self.models]
        turn = {"question": question, "answers": answers, "chosen": None}
        self.turns.append(turn)
        self.keep()
        return turn

    def comparable(self, turn: int) -> bool:
        """Whether two whole answers of a turn answer the same, and so can be preferred to one another."""
        contents = [answer["content"] for answer in self.turns[turn]["answers"]]
        return (
            len(contents) == 2
            and all(contents)
            and contents[0] != contents[1]
            and self.messages(turn, 0) == self.messages(turn, 1)
        )


async def stream(
    url: str, model: str, messages: list[dict[str, str]], *, temperature: float, max_tokens: int
) -> AsyncIterator[tuple[str, str]]:
    """(more of the reasoning, more of the answer) from the server at `url`, until the answer ends.

    Raises EdgeError with the server's message.
    """
    body = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens,
            "stream": True}  # fmt: skip
    key = os.environ.get(KEY_VARIABLE, "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        # Without the proxies of the environment: the server is on this machine.
        async with (
            httpx.AsyncClient(timeout=None, trust_env=False, verify=False) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                raise _error(await response.aread())
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if not line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise _error(data.encode())
                for choice in event["choices"]:
                    delta = choice["delta"]
                    yield delta.get("reasoning_content") or "", delta.get("content") or ""
    except httpx.HTTPError as error:
        raise EdgeError(f"the model's server has gone: {error}", "load the model again") from error


def _error(body: bytes) -> EdgeError:
    try:
        return EdgeError(str(json.loads(body)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return EdgeError(body.decode("utf-8", "replace"))


def html(text: str) -> str:
    """A model's Markdown as HTML. HTML in it is shown as text."""
    if sum(line.lstrip().startswith(_FENCE) for line in text.split("\n")) % 2:
        text += f"\n{_FENCE}"  # the end of the block is still to come
    return str(markdown2.markdown(text, extras=_EXTRAS, safe_mode="escape"))
