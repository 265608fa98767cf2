"""Servers that somebody else started: `--targets NAME=URL`, by OpenAI's completions or by Ollama's interface.

    edge bench RUN --targets edge,vllm=http://127.0.0.1:8000
    edge bench RUN --targets edge,ollama=http://127.0.0.1:11434/api#magic-conch

Prompts are sent raw, without a chat template, so that every server reads the same tokens. Few of them can be
made to go on after an end token: those that take `ignore_eos` are asked for it; an answer of another length
than was asked for is counted apart, and the target marked. Which weights such a server reads is not known.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from typing import Any
from urllib.parse import urlsplit

from bench.measure.http1 import ProtocolError
from bench.measure.load import Job, Part, get
from bench.servers.target import Target
from edge.errors import EdgeError, InputError, UsageError

KEY = "EDGE_BENCH_API_KEY"
_NAME = re.compile(r"[\w][\w.-]*")


class OpenAI:
    """/v1/completions, streamed, greedy. force: whether the server takes what makes it ignore end tokens."""

    def __init__(self, path: str, model: str, key: str = "", *, force: bool) -> None:
        self.path, self.model, self.key, self.force = path, model, key, force

    def ask(self, job: Job) -> tuple[str, str, Any]:
        body = {"model": self.model, "prompt": job.prompt, "max_tokens": job.tokens, "temperature": 0.0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.force:
            body |= {"ignore_eos": True, "min_tokens": job.tokens}
        return "POST", f"{self.path}/completions", body

    def read(self, said: dict[str, Any]) -> Part:
        if "error" in said:
            return Part(error=_words(said["error"]))
        choice = (said.get("choices") or [{}])[0]
        usage = said.get("usage") or {}
        return Part(
            text=choice.get("text") or "",
            # How many tokens a piece has is not said.
            tokens=0,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            finish=choice.get("finish_reason") or "",
        )


class Ollama:
    """/api/generate with a raw prompt, streamed, greedy. It always ends at an end token."""

    def __init__(self, path: str, model: str, key: str = "") -> None:
        self.path, self.model, self.key = path, model, key

    def ask(self, job: Job) -> tuple[str, str, Any]:
        body = {"model": self.model, "prompt": job.prompt, "raw": True, "stream": True}
        options = {"num_predict": job.tokens, "temperature": 0.0}
        return "POST", f"{self.path}/generate", body | {"options": options}

    def read(self, said: dict[str, Any]) -> Part:
        if "error" in said:
            return Part(error=_words(said["error"]))
        return Part(
            text=said.get("response", ""),
            tokens=0,
            prompt_tokens=said.get("prompt_eval_count"),
            completion_tokens=said.get("eval_count"),
            finish=said.get("done_reason", ""),
        )


def _words(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def check(given: str) -> tuple[str, str]:
    """(name, URL) of `NAME=URL`. Raises UsageError where it is no such pair."""
    name, _, url = given.partition("=")
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not _NAME.fullmatch(name):
        raise UsageError(
            f"--targets: '{given}' is not NAME=URL",
            "such as vllm=http://127.0.0.1:8000 or ollama=http://127.0.0.1:11434/api#MODEL",
        )
    return name, url


def outside(name: str, url: str) -> Target:
    """The server at `url`: Ollama's interface where the path ends with /api, OpenAI's otherwise.

    The model is the fragment of the URL, or the only one that the server lists. The key, where one is needed,
    is in the variable KEY. Raises InputError where the server lists none or several, EdgeError where it does
    not answer.
    """
    parts = urlsplit(url)
    base, path = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")
    key = os.environ.get(KEY, "")
    if path.endswith("/api"):
        listing = f"{path}/tags"
        model = parts.fragment or _only(name, url, _models(name, base + listing, key), "name")
        dialect: OpenAI | Ollama = Ollama(path, model, key)
    else:
        path = path if path.endswith("/v1") else f"{path}/v1"
        listing = f"{path}/models"
        model = parts.fragment or _only(name, url, _models(name, base + listing, key), "id")
        dialect = OpenAI(path, model, key, force=True)
        # Some refuse what they do not know.
        _, where, body = dialect.ask(Job("1, 2, 3,", 0, 2))
        status, _ = _fetch(name, base, where, key, body)
        dialect.force = status < 400
    forced = isinstance(dialect, OpenAI) and dialect.force
    return Target(name, [], dialect, listing, listing, health=listing, stage="", url=base, forced=forced)


def _models(name: str, url: str, key: str) -> list[dict[str, Any]]:
    parts = urlsplit(url)
    status, body = _fetch(name, f"{parts.scheme}://{parts.netloc}", parts.path, key)
    try:
        said = json.loads(body)
        found = said["data"] if "data" in said else said["models"]
    except (ValueError, KeyError, TypeError):
        found = []
    if status != 200 or not found:
        raise InputError(
            f"{name}: {url} lists no model (HTTP {status})",
            f"check the URL; a key goes into the variable {KEY}",
        )
    return list(found)


def _only(name: str, url: str, models: list[dict[str, Any]], field: str) -> str:
    names = [str(model.get(field, "")) for model in models]
    if len(names) > 1:
        raise InputError(
            f"{name}: {url} serves several models: {', '.join(names)}", f"name one: {name}={url}#MODEL"
        )
    return names[0]


def _fetch(name: str, base: str, path: str, key: str, body: Any = None) -> tuple[int, bytes]:
    try:
        return asyncio.run(get(base, path, limit=60.0, key=key, body=body))
    except (OSError, TimeoutError, ProtocolError) as error:
        raise EdgeError(f"{name}: {base}{path} does not answer: {error}", "is the server running?") from error
