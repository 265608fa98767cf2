"""A conversation, whichever API family it came through: its prompt, what binds the answer, how it is read.

Every family turns its request into a `Conversation`. `PreparedChat` renders that for one model, and an
`AnswerReader` splits what the model writes into reasoning, text and tool calls, streamed or not. So a family
only translates its own JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.engine.grammar import Constraint
from edge.engine.sampling import Params
from edge.engine.thinking_budget import ReasoningOptions
from edge.errors import RequestError
from edge.prompt import Prompt
from edge.reasoning import THINK, THINK_END, ReasoningSplitter, opens_reasoning
from edge.server.served_model import ServedModel
from edge.server.streaming import start_streams
from edge.server.tool_dialects import LLAMA3, PROSE, Call, Tool, dialect_of, explained, json_rule, readable
from edge.server.tool_parser import ToolParser

Item = msg.Delta | msg.Done

# OpenAI's efforts as tokens of reasoning; None: no bound.
EFFORTS: dict[str, int | None] = {"minimal": 256, "low": 1024, "medium": 4096, "high": None}
_RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "thinking", "self"}
)
# Stands behind a text that the model is to continue, to show where the template ends the turn: no character.
_HERE = "\ufdd0"
# A template's process renders one prompt at a time.
_RENDERING = ThreadPoolExecutor(1, "rendering")


@dataclass
class Conversation:
    """What a client asks of a chat model.

    messages: as chat templates read them, past calls' arguments as text.
    choice: auto, none, required, or the name of a tool. parallel: whether one answer may hold several calls.
    thinking: on, off, or as the artefact has it. budget: tokens of reasoning at most.
    raw: the reasoning stays in the answer, with its tags. extra: the template's own variables.
    prefill: whether a last message of the assistant is continued; None: where there is one.
    """

    messages: list[dict[str, Any]]
    tools: list[Tool] = field(default_factory=list)
    choice: str = "auto"
    parallel: bool = True
    thinking: bool | None = None
    budget: int | None = None
    raw: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    prefill: bool | None = None

    @property
    def continued(self) -> str | None:
        """The text of the last message, which the model is to go on with. Raises RequestError without one."""
        last = self.messages[-1] if self.messages else {"role": ""}
        begun = last["role"] == "assistant" and not last.get("tool_calls")
        if self.prefill and not begun:
            raise RequestError(
                "only a text of the assistant in the last message can be continued",
                param="continue_final_message",
            )
        return last["content"] if begun and self.prefill is not False else None


class PreparedChat:
    """A conversation on one model. Raises RequestError for what it cannot honour; nothing is dropped.

    Waits for the process that renders its template; `prepared` waits elsewhere. splits: whether reasoning is
    told apart from the answer.
    """

    def __init__(self, model: ServedModel, asked: Conversation) -> None:
        self.model = model
        self._asked = asked
        template = model.template()
        self._dialect = dialect_of(template.source)
        self._tools = self._offered()
        self.prompt = self._render()
        begun = asked.continued or ""
        self._inside = opens_reasoning(self.prompt.text) or begun.rfind(THINK) > begun.rfind(THINK_END)
        self.splits = model.reasons and not asked.raw
        self._stops: list[str] = []
        self._constraint, self._after = self._bound()

    def start(self, params: Params, n: int = 1, **run: Any) -> list[Stream]:
        """Start `n` answers to the same prompt, each with a seed of its own where the request gives one."""
        reasoning = None
        if self._after or self.model.reasons:
            budget = self._asked.budget if self.model.reasons else None
            reasoning = ReasoningOptions(self._inside, budget, self._after)
        params = msgspec.structs.replace(params, stop=[*params.stop, *self._stops])
        run |= {"constraint": self._constraint, "reasoning": reasoning}
        submit = self.model.engine.submit
        return start_streams(submit(self.prompt, params.with_seed(i), **run) for i in range(n))

    def reader(self) -> AnswerReader:
        """A new reader for one answer."""
        split = ReasoningSplitter(inside=self._inside) if self.splits else None
        parser = None
        if self._tools:
            assert self._dialect is not None
            parser = ToolParser(self._dialect, self._tools, parallel=self._asked.parallel)
        return AnswerReader(split, parser)

    def _offered(self) -> list[Tool]:
        """The tools that the model may call."""
        asked = self._asked
        names = [tool.name for tool in asked.tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise RequestError(f"several tools are named '{min(twice)}'", param="tools")
        if asked.choice not in ("auto", "none", "required") and asked.choice not in names:
            raise RequestError(
                f"tool_choice names '{asked.choice}', no such tool is given", param="tool_choice"
            )
        if asked.choice == "required" and not names:
            raise RequestError("tool_choice is required, but no tools are given", param="tool_choice")
        if not names or asked.choice == "none":
            return []
        if self._dialect is None:
            raise RequestError(
                f"the chat template of {self.model.name} does not say how it writes tool calls",
                code="unsupported",
                param="tools",
                hint="serve a model whose template does (Qwen, Hermes, Llama 3, DeepSeek)",
            )
        return asked.tools

    def _render(self) -> Prompt:
        asked, template = self._asked, self.model.template()
        if reserved := sorted(_RESERVED & set(asked.extra)):
            raise RequestError(f"chat_template_kwargs may not set {reserved}", param="chat_template_kwargs")
        messages = [readable(message, self._dialect) for message in asked.messages]
        extra = dict(asked.extra)
        if self._tools:
            assert self._dialect is not None
            if "tools" in template.variables:
                extra["tools"] = [tool.spec() for tool in self._tools]
            elif self._dialect.name == "deepseek":
                messages = explained(messages, self._tools, self._dialect)
        mode = self.model.thinking
        if asked.thinking is not None:
            mode = "on" if asked.thinking else "off"
        prompt = self._with_turn(messages, mode, extra)
        if asked.thinking and not (opens_reasoning(prompt.text) or "enable_thinking" in template.variables):
            raise RequestError(
                f"{self.model.name} cannot be told to think: its chat template has no switch for it",
                code="unsupported",
                param="enable_thinking",
            )
        self._check_rendered(prompt.text, messages)
        return prompt

    def _with_turn(self, messages: list[dict[str, Any]], mode: str | None, extra: dict[str, Any]) -> Prompt:
        """The prompt, which ends where the model's text begins: in a new turn, or behind the last message."""
        begun, template = self._asked.continued, self.model.template()
        if begun is None:
            return template.render(messages, thinking=mode, **extra)
        *others, last = messages
        if not begun and not last.get("reasoning_content"):
            # An empty beginning is none.
            return template.render(others, thinking=mode, **extra)
        turns = [*others, {**last, "content": begun + _HERE}]
        rendered = template.render(turns, thinking=mode, add_generation_prompt=False, **extra)
        prompt, *rest = rendered.text.split(_HERE)
        parts = [part.strip() for part in re.split(f"{THINK}|{THINK_END}", begun)]
        if (
            len(rest) != 1
            or not all(part in prompt for part in parts)
            or not prompt.rstrip().endswith(parts[-1])
        ):
            raise _dropped("an answer that is to be continued", "messages")
        return rendered.between(0, len(prompt))

    def _check_rendered(self, prompt: str, messages: list[dict[str, Any]]) -> None:
        """Check that every tool and every past call is in the prompt: templates skip what they don't know."""
        for tool in self._tools:
            if tool.name not in prompt:
                raise _dropped(f"the tool '{tool.name}'", "tools")
        for i, message in enumerate(messages):
            for call in message.get("tool_calls") or []:
                if call["function"]["name"] not in prompt:
                    raise _dropped(f"a call of '{call['function']['name']}'", f"messages[{i}].tool_calls")
            content = message.get("content")
            if message["role"] == "tool" and isinstance(content, str) and not _contains(prompt, content):
                raise _dropped("a tool's result", f"messages[{i}]")

    def _bound(self) -> tuple[Constraint | None, str]:
        """What the answer must match, and the text after which it must."""
        asked = self._asked
        after = THINK_END if self._inside else ""
        if not self._tools:
            return asked.constraint, after if asked.constraint is not None else ""
        assert self._dialect is not None
        if asked.choice != "auto":
            # A format binds an answer's text, and a forced call has no text.
            chosen = [tool for tool in self._tools if asked.choice in ("required", tool.name)]
            many = asked.parallel and asked.choice == "required"
            return self._dialect.grammar(chosen, many=many), after
        if not asked.parallel and self._dialect.closing:
            self._stops = [self._dialect.closing]
        loose = [
            tool if tool.strict else dataclasses.replace(tool, parameters={"type": "object"})
            for tool in self._tools
        ]
        if asked.constraint is not None:
            return self._call_or(asked.constraint, loose), after
        if any(tool.strict for tool in self._tools):
            if self._dialect == LLAMA3:
                return self._dialect.grammar(loose, many=asked.parallel, other=PROSE), after
            self._stops = []
            grammar = self._dialect.grammar(loose, many=asked.parallel, begun=True)
            return grammar, self._dialect.opening or self._dialect.before
        return None, ""

    def _call_or(self, wanted: Constraint, tools: list[Tool]) -> Constraint:
        """One grammar for both: calls, or an answer in the wanted format."""
        assert self._dialect is not None
        if wanted.kind != "json_schema":
            raise RequestError(
                f"{wanted.param} together with tools is not supported; a JSON schema is",
                code="unsupported",
                param=wanted.param,
                hint="give tool_choice none, or leave one of them out",
            )
        schema = json.loads(wanted.text)
        return self._dialect.grammar(
            tools, many=self._asked.parallel, other=json_rule(schema), param=wanted.param
        )


async def prepared(model: ServedModel, asked: Conversation) -> PreparedChat:
    """`asked` on `model`, as PreparedChat, while the event loop goes on."""
    # One at a time of each model: a slow template must not fill the queue of the others.
    async with model.rendering:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_RENDERING, PreparedChat, model, asked)


class AnswerReader:
    """Splits an answer's text into (reasoning, text, tool calls). Without arguments all of it is text."""

    def __init__(self, split: ReasoningSplitter | None = None, parser: ToolParser | None = None) -> None:
        self._split = split
        self._parser = parser

    def take(self, item: Item) -> tuple[str, str, list[Call]]:
        """What is certain after the stream's next item."""
        last = isinstance(item, msg.Done)
        return self.push(item.text, last=last, cut=isinstance(item, msg.Done) and item.reason == "length")

    def push(self, text: str, *, last: bool = False, cut: bool = False) -> tuple[str, str, list[Call]]:
        """What is certain after `text`; with `last`, what was held back too. cut: at the limit of tokens."""
        reasoning, answer = self._split.push(text) if self._split else ("", text)
        if last and self._split:
            rest = self._split.finish()
            reasoning, answer = reasoning + rest[0], answer + rest[1]
        if self._parser is None:
            return reasoning, answer, []
        return reasoning, *self._parser.push(answer, last=last, cut=cut)


@dataclass
class Answer:
    """A whole answer."""

    text: str
    reasoning: str
    calls: list[Call]
    logprobs: list[msg.Logprob]
    done: msg.Done


async def collect(stream: Stream, reader: AnswerReader) -> Answer:
    """Read a stream to its end."""
    parts, logprobs = [], []
    async for item in stream:
        parts.append(item.text)
        logprobs += item.logprobs or []
    assert isinstance(item, msg.Done)
    reasoning, text, calls = reader.push("".join(parts), last=True, cut=item.reason == "length")
    return Answer(text, reasoning, calls, logprobs, item)


async def collect_all(streams: list[Stream], reader: Callable[[], AnswerReader]) -> list[Answer]:
    """Read every stream to its end; the first that fails ends it. reader: a new one for each stream."""
    return await asyncio.gather(*(collect(stream, reader()) for stream in streams))


async def merged(streams: list[Stream]) -> AsyncIterator[tuple[int, Item]]:
    """The items of several streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Item | RequestError]] = asyncio.Queue()

    async def pump(i: int, stream: Stream) -> None:
        try:
            async for item in stream:
                queue.put_nowait((i, item))
        except RequestError as error:
            queue.put_nowait((i, error))

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    left = len(streams)
    try:
        while left:
            i, event = await queue.get()
            if isinstance(event, RequestError):
                raise event
            left -= isinstance(event, msg.Done)
            yield i, event
    finally:
        for task in tasks:
            task.cancel()


def _contains(prompt: str, content: str) -> bool:
    """Whether the prompt holds `content`: as it stands, or as JSON text."""
    text = content.strip()
    return text in prompt or json.dumps(text, ensure_ascii=False)[1:-1] in prompt


def _dropped(what: str, param: str) -> RequestError:
    return RequestError(f"the model's chat template has no place for {what}", code="unsupported", param=param)
