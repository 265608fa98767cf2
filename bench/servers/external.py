"""Servers that somebody else started: `--targets NAME=URL`, by OpenAI's completions or by Ollama's interface.

    edge bench RUN --targets edge,vllm=http://127.0.0.1:8000
    edge bench RUN --targets edge,ollama=http://127.0.0.1:11434/api#magic-conch

Prompts are sent raw, without a chat template, so that every server reads the same tokens. Few of them can be
made to go on after an end token: those that take `ignore_eos` are asked for it; an answer of another length
than was asked for is counted apart, and the target marked. Which weights such a server reads is not known.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bench.measure.http1 import ProtocolError
from bench.measure.load import Dialect, Part, get
from bench.measure.workloads import Job
from bench.servers.target import Target
from edge.errors import EdgeError, InputError

KEY = "EDGE_BENCH_API_KEY"


@dataclass
class OpenAI(Dialect):
    """/v1/completions, streamed, greedy. force: whether the server takes what makes it ignore end tokens."""

    path: str
    model: str
    key: str
    force: bool = True

    def ask(self, job: Job) -> tuple[str, str, Any]:
        body = {"model": self.model, "prompt": job.prompt, "max_tokens": job.tokens, "temperature": 0.0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.force:
            # Not min_tokens too: vLLM would then mask the end tokens at each step.
            body["ignore_eos"] = True
        return "POST", f"{self.path}/completions", body

    def read(self, answer: dict[str, Any]) -> Part:
        choice = (answer.get("choices") or [{}])[0]
        usage = answer.get("usage") or {}
        return Part(
            text=choice.get("text") or "",
            # How many tokens a piece has is not said.
            tokens=0,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            finish=choice.get("finish_reason") or "",
        )


@dataclass
class Ollama(Dialect):
    """/api/generate with a raw prompt, streamed, greedy. It always ends at an end token."""

    path: str
    model: str
    key: str
    force: bool = False

    def ask(self, job: Job) -> tuple[str, str, Any]:
        body = {"model": self.model, "prompt": job.prompt, "raw": True, "stream": True}
        options = {"num_predict": job.tokens, "temperature": 0.0}
        return "POST", f"{self.path}/generate", body | {"options": options}

    def read(self, answer: dict[str, Any]) -> Part:
        return Part(
            text=answer.get("response", ""),
            tokens=0,
            prompt_tokens=answer.get("prompt_eval_count"),
            completion_tokens=answer.get("eval_count"),
            finish=answer.get("done_reason", ""),
        )


def target(name: str, url: str) -> Target:
    """The server at `url`: Ollama's interface where the path ends with /api, OpenAI's otherwise.

    The model is the fragment of the URL, or the only one that the server lists. The key, where one is needed,
    is in the variable KEY. Raises InputError where the server lists none or several or wants another key,
    EdgeError where it does not answer.
    """
    parts = urlsplit(url)
    base, path, key = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/"), os.environ.get(KEY, "")
    ollama = path.endswith("/api")
    path = path if path.endswith(("/api", "/v1")) else f"{path}/v1"
    listing = f"{path}/{'tags' if ollama else 'models'}"
    model = parts.fragment or only_model(name, url, base, listing, key)
    dialect = Ollama(path, model, key) if ollama else OpenAI(path, model, key)
    if isinstance(dialect, OpenAI):
        # Some refuse fields that they do not have.
        _, where, body = dialect.ask(Job("1, 2, 3,", 0, 2))
        dialect.force = fetch(name, base, where, key, body)[0] < 400
    return Target(
        name, [], dialect, listing, listing, health=listing, stage="", url=base, forced=dialect.force
    )


def told(target: Target) -> dict[str, Any]:
    """What the server behind `target` says of itself: version, where it has vLLM's route for it."""
    status, body = fetch(target.name, target.url, "/version", target.dialect.key)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if status == 200:
            return {"url": target.url, "version": str(json.loads(body)["version"])}
    return {"url": target.url}


def only_model(name: str, url: str, base: str, listing: str, key: str) -> str:
    """The one model that the server lists. Raises InputError for none and for several."""
    status, body = fetch(name, base, listing, key)
    try:
        answer = json.loads(body)
        rows = answer["data"] if "data" in answer else answer["models"]
        models = [str(row.get("id") or row["name"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        models = []
    if status != 200 or not models:
        raise InputError(
            f"{name}: {base}{listing} lists no model (HTTP {status})",
            "check the URL: is it a model's server?",
        )
    if len(models) > 1:
        raise InputError(
            f"{name}: {url} serves several models: {', '.join(models)}", f"name one: {name}={url}#MODEL"
        )
    return models[0]


def fetch(name: str, base: str, path: str, key: str, body: Any = None) -> tuple[int, bytes]:
    """Status and body. Raises EdgeError where nothing answers, InputError where another key is wanted."""
    try:
        status, answer = asyncio.run(get(base, path, limit=60.0, key=key, body=body))
    except (OSError, TimeoutError, ProtocolError) as error:
        raise EdgeError(f"{name}: {base}{path} does not answer: {error}", "is the server running?") from error
    if status in (401, 403):
        wrong = f"does not take the key in {KEY}" if key else "wants a key"
        raise InputError(
            f"{name}: {base}{path} {wrong} (HTTP {status})", f"put its key into the variable {KEY}"
        )
    return status, answer
