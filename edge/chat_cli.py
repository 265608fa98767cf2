"""`edge chat RUN`: talk to a model in the terminal. The same engine as the server's, without HTTP."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

from edge.artefact import find
from edge.backends.onnx_providers import DEVICES
from edge.chat_template import ChatTemplate
from edge.engine import protocol as msg
from edge.engine.client import EngineProcess
from edge.engine.sampling import Params
from edge.engine.worker import Load
from edge.errors import InputError, RequestError, UsageError
from edge.loading import load_plan
from edge.reasoning import ReasoningSplitter, opens_reasoning

HELP = "/reset forgets the conversation, /system TEXT sets a system prompt, /exit (or Ctrl-D) ends"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge chat", description="Talk to a model in the terminal.")
    parser.add_argument("path", type=Path, help="a run, a folder with a model, or a .gguf or .onnx file")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--max-tokens", type=int, help="default: until the context is full")
    parser.add_argument("--ctx", type=int, help="tokens that the conversation may hold")
    parser.add_argument("--threads", type=int, help="default: the physical cores it may use")
    parser.add_argument("--backend", choices=list(find.SUFFIXES), help="default: what is faster here")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args(argv)
    if not 0.0 <= args.temperature <= 2.0:
        raise UsageError(f"--temperature {args.temperature} is not within 0..2")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens} is not positive")
    options = load_plan.Options(context=args.ctx, slots=1, threads=args.threads, device=args.device)
    found, _ = load_plan.pick(args.path, args.backend, options)
    if found.chat_template is None:
        raise InputError(f"{found.path} has no chat template", "chat needs one; export a model that has it")
    load = Load.of(found, load_plan.plan(found, options).settings, tune=True)
    params = Params(temperature=args.temperature, max_tokens=args.max_tokens)
    return asyncio.run(_talk(load, found, params, args.system))


async def _talk(load: Load, found: find.Artefact, params: Params, system: str | None) -> int:
    engine = EngineProcess(load)
    engine.start()
    try:
        ready = await engine.wait_ready()
        _say(f"{found.name} on {ready.device}, context {ready.context}. {HELP}\n")
        assert ready.chat_template is not None
        template = ChatTemplate(ready.chat_template, bos=ready.bos_text, eos=ready.eos_text)
        talk = _Conversation(engine, template, found.thinking, params, system)
        while (line := await asyncio.to_thread(_ask)) is not None:
            if line in ("/exit", "/quit"):
                break
            await talk.turn(line)
    finally:
        await engine.stop(0.0)
    return 0


class _Conversation:
    def __init__(
        self,
        engine: EngineProcess,
        template: ChatTemplate,
        thinking: str | None,
        params: Params,
        system: str | None,
    ) -> None:
        self._engine = engine
        self._template = template
        self._thinking = thinking
        self._params = params
        self._messages: list[dict[str, Any]] = []
        self._reset(system)

    def _reset(self, system: str | None) -> None:
        self._system = system
        self._messages = [{"role": "system", "content": system}] if system else []

    async def turn(self, line: str) -> None:
        """One line of the user's: a command, or a message and its answer."""
        if not line.strip():
            return
        if line == "/reset":
            self._reset(self._system)
            _say("(forgotten)\n")
        elif line.startswith("/system "):
            self._reset(line.removeprefix("/system ").strip())
            _say("(a new conversation with this system prompt)\n")
        elif line.startswith("/"):
            _say(f"({HELP})\n")
        else:
            self._messages.append({"role": "user", "content": line})
            try:
                await self._answer()
            except RequestError as error:
                self._messages.pop()
                _say(f"({error})\n")

    async def _answer(self) -> None:
        prompt = self._template.render(self._messages, thinking=self._thinking)
        split = ReasoningSplitter(inside=opens_reasoning(prompt))
        said = ""
        async for item in self._engine.submit(prompt, self._params):
            thought, answer = split.push(item.text)
            if isinstance(item, msg.Done):
                late = split.finish()
                thought, answer = thought + late[0], answer + late[1]
            _say(_dim(thought) + answer)
            said += answer
        assert isinstance(item, msg.Done)
        self._messages.append({"role": "assistant", "content": said})
        rate = max(item.completion_tokens - 1, 0) / item.decode_s if item.decode_s else 0.0
        note = f"{item.completion_tokens} tokens, {rate:.1f} tok/s, {item.cached_tokens} cached"
        if item.reason == "length":
            note += ", cut at the limit"
        _say("\n" + _dim(f"[{note}]") + "\n\n")


def _ask() -> str | None:
    with contextlib.suppress(EOFError):
        return input("> ")
    return None


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if text and sys.stdout.isatty() else text
