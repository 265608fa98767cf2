"""A conversation with a model in the terminal, on the same engine as the server's, without HTTP."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import sys
from typing import Any

from edge.engine import protocol as msg
from edge.engine.client import EngineProcess
from edge.engine.sampling import Params
from edge.engine.worker import Load
from edge.errors import InputError, RequestError
from edge.loading import load_plan
from edge.server.conversation import Conversation, prepared
from edge.server.served_model import ServedModel

HELP = "/reset forgets the conversation, /system TEXT sets a system prompt, /exit (or Ctrl-D) ends"

_print = functools.partial(print, end="", flush=True)


def run(args: argparse.Namespace) -> int:
    """Load the model that the arguments name and talk until the user ends. Raises EdgeError."""
    options = load_plan.Options(context=args.ctx, slots=1, threads=args.threads, device=args.device)
    artefact, _ = load_plan.pick(args.path, args.backend, options)
    if artefact.chat_template is None:
        raise InputError(
            f"{artefact.path} has no chat template, which `edge chat` needs",
            "serve it, and ask for the continuation of a text: edge serve, then /v1/completions",
        )
    load = Load.of(artefact, load_plan.plan(artefact, options).settings, tune=True)
    params = Params(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        max_tokens=args.max_tokens,
    )
    model = ServedModel(artefact, EngineProcess(load), artefact.name)
    return asyncio.run(_talk(_Chat(model, params, args.system)))


async def _talk(chat: _Chat) -> int:
    engine = chat.model.engine
    engine.start()
    try:
        ready = await engine.wait_ready()
        _print(f"{chat.model.name} on {ready.device}, context {ready.context}. {HELP}\n")
        with contextlib.suppress(EOFError):
            while (line := await asyncio.to_thread(input, "> ")) not in ("/exit", "/quit"):
                await chat.take(line)
    finally:
        await engine.stop(0.0)
    return 0


class _Chat:
    """The conversation so far. It is put to the model as the server puts one."""

    def __init__(self, model: ServedModel, params: Params, system: str | None) -> None:
        self.model = model
        self._params = params
        self._reset(system)

    def _reset(self, system: str | None) -> None:
        self._system = system
        self._messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    async def take(self, line: str) -> None:
        """Handle a line of the user's: a command, or a message that is answered."""
        if not line.strip():
            return
        if line == "/reset":
            self._reset(self._system)
            _print("(forgotten)\n")
        elif line.startswith("/system "):
            self._reset(line.removeprefix("/system ").strip())
            _print("(a new conversation with this system prompt)\n")
        elif line.startswith("/"):
            _print(f"({HELP})\n")
        else:
            self._messages.append({"role": "user", "content": line})
            try:
                await self._answer()
            except RequestError as error:
                self._messages.pop()
                _print(f"({error})\n")

    async def _answer(self) -> None:
        chat = await prepared(self.model, Conversation(self._messages))
        [stream], reader = chat.start(self._params), chat.reader()
        content = ""
        async for item in stream:
            reasoning, text, _ = reader.take(item)
            _print(_dim(reasoning) + text)
            content += text
        assert isinstance(item, msg.Done)
        self._messages.append({"role": "assistant", "content": content})
        rate = max(item.completion_tokens - 1, 0) / item.decode_s if item.decode_s else 0.0
        note = f"{item.completion_tokens} tokens, {rate:.1f} tok/s, {item.cached_tokens} cached"
        if item.reason == "length":
            note += ", cut at the limit"
        _print("\n" + _dim(f"[{note}]") + "\n\n")


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if text and sys.stdout.isatty() else text
