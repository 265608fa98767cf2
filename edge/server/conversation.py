"""A conversation, however a client put it: the prompt, what binds the answer, and how the answer is read.

Every API family turns its request into a `Conversation`; `Turn` makes one prompt of it, and a `Reader` parts
what the model writes into thought, answer and tool calls, streamed or not. So each family only has to speak
its own JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.engine.grammar import Constraint
from edge.engine.sampling import Params
from edge.engine.thinking_budget import ReasoningOptions
from edge.errors import RequestError
from edge.reasoning import THINK, THINK_END, ReasoningSplitter, opens_reasoning
from edge.server.served_model import Serving
from edge.server.tool_dialects import LLAMA3, MAX_TOOLS, PROSE, Call, Tool, described, dialect_of, json_rule
from edge.server.tool_parser import CallReader

# OpenAI's efforts as tokens that a thought may have; None: no bound.
EFFORTS: dict[str, int | None] = {"minimal": 256, "low": 1024, "medium": 4096, "high": None}
_RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "thinking", "_edge_tick"}
)


@dataclass
class Conversation:
    """What a client asks of a chat model.

    messages: as chat templates read them, past calls' arguments as text.
    choice: auto, none, required, or the name of a tool. parallel: whether several calls may be made at once.
    thinking: on, off, or as the artefact has it. budget: tokens that the thought may have.
    raw: the thought stays in the answer, with its tags. extra: the template's own variables.
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


class Turn:
    """A conversation on one model. Raises RequestError for what it cannot honour; nothing is dropped."""

    def __init__(self, serving: Serving, asked: Conversation) -> None:
        self.serving = serving
        self._asked = asked
        template = serving.template()
        self._dialect = dialect_of(template.source)
        self._tools = self._offered()
        self.prompt = self._render()
        self._inside = opens_reasoning(self.prompt)
        thinks = THINK in template.source or THINK_END in template.source
        self._thinks = thinks or serving.thinking in ("on", "mixed")
        self._stops: list[str] = []
        self._constraint, self._after = self._bound()

    def start(self, params: Params, n: int = 1, **run: Any) -> list[Stream]:
        """`n` answers to the same prompt, each with a seed of its own where one is given."""
        asked = self._asked
        reasoning = None
        if self._after or self._thinks:
            budget = asked.budget if self._thinks else None
            reasoning = ReasoningOptions(self._inside, budget, self._after)
        if self._stops:
            params = msgspec.structs.replace(params, stop=[*params.stop, *self._stops])
        streams = []
        for i in range(n):
            streams.append(
                self.serving.engine.submit(
                    self.prompt, params.with_seed(i), constraint=self._constraint, reasoning=reasoning, **run
                )
            )
        return streams

    @property
    def splits(self) -> bool:
        """Whether thoughts are told apart from answers."""
        return self._thinks and not self._asked.raw

    def reader(self) -> Reader | None:
        """A new reader; None where the text is the answer as it stands."""
        split = ReasoningSplitter(inside=self._inside) if self.splits else None
        calls = None
        if self._tools:
            assert self._dialect is not None
            calls = CallReader(self._dialect, self._tools, parallel=self._asked.parallel)
        return Reader(split, calls) if split or calls else None

    def _offered(self) -> list[Tool]:
        """The tools that the model may call."""
        asked = self._asked
        if len(asked.tools) > MAX_TOOLS:
            raise RequestError(f"{len(asked.tools)} tools; at most {MAX_TOOLS} are taken", param="tools")
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
                f"the chat template of {self.serving.name} does not say how it writes tool calls",
                code="unsupported",
                param="tools",
                hint="serve a model whose template does (Qwen, Hermes, Llama 3, DeepSeek)",
            )
        return asked.tools

    def _render(self) -> str:
        asked, template = self._asked, self.serving.template()
        if reserved := sorted(_RESERVED & set(asked.extra)):
            raise RequestError(f"chat_template_kwargs may not set {reserved}", param="chat_template_kwargs")
        messages = [self._for_template(message) for message in asked.messages]
        extra = dict(asked.extra)
        if self._tools:
            assert self._dialect is not None
            if "tools" in template.variables:
                extra["tools"] = [tool.spec() for tool in self._tools]
            elif self._dialect.name == "deepseek":
                messages = _with_system(messages, described(self._tools, self._dialect))
        mode = self.serving.thinking
        if asked.thinking is not None:
            mode = "on" if asked.thinking else "off"
        prompt = template.render(messages, thinking=mode, **extra)
        if asked.thinking and not (opens_reasoning(prompt) or "enable_thinking" in template.variables):
            raise RequestError(
                f"{self.serving.name} cannot be told to think: its chat template has no switch for it",
                code="unsupported",
                param="enable_thinking",
            )
        self._check_rendered(prompt, messages)
        return prompt

    def _for_template(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message in the form that this template wants: past arguments as objects, or as text."""
        calls = message.get("tool_calls")
        if not calls:
            return message
        as_text = self._dialect is not None and self._dialect.as_text
        if not as_text:
            calls = [_with_object(call) for call in calls]
        # DeepSeek's templates look for a content that is none, and pass over the calls otherwise.
        content = None if as_text and not message.get("content") else message.get("content")
        return {**message, "content": content, "tool_calls": calls}

    def _check_rendered(self, prompt: str, messages: list[dict[str, Any]]) -> None:
        """Every tool and every past call must be in the prompt: templates pass over what they don't know."""
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
        """What the answer must match, and the text from which on."""
        asked = self._asked
        late = THINK_END if self._inside else ""
        if not self._tools:
            return asked.constraint, late if asked.constraint is not None else ""
        assert self._dialect is not None
        if asked.choice != "auto":
            # A format is one for an answer's text, and a forced call has none.
            chosen = [tool for tool in self._tools if asked.choice in ("required", tool.name)]
            many = asked.parallel and asked.choice == "required"
            return self._dialect.grammar(chosen, many=many), late
        if not asked.parallel and self._dialect.closing:
            self._stops = [self._dialect.closing]
        loose = [
            tool if tool.strict else dataclasses.replace(tool, parameters={"type": "object"})
            for tool in self._tools
        ]
        if asked.constraint is not None:
            return self._call_or(asked.constraint, loose), late
        if any(tool.strict for tool in self._tools):
            if self._dialect == LLAMA3:
                return self._dialect.grammar(loose, many=asked.parallel, other=PROSE), late
            self._stops = []
            return self._dialect.grammar(loose, many=asked.parallel, begun=True), self._dialect.opening
        return None, ""

    def _call_or(self, wanted: Constraint, tools: list[Tool]) -> Constraint:
        """Either calls or what the request wants of an answer: one grammar of both."""
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


class Reader:
    """Parts an answer's text into (thought, answer, calls)."""

    def __init__(self, split: ReasoningSplitter | None, calls: CallReader | None) -> None:
        self._split = split
        self._calls = calls

    def push(self, text: str, *, last: bool = False) -> tuple[str, str, list[Call]]:
        """What is certain after `text`; with `last`, all that was held back too."""
        thought, answer = self._split.push(text) if self._split else ("", text)
        if last and self._split:
            late = self._split.finish()
            thought, answer = thought + late[0], answer + late[1]
        if self._calls is None:
            return thought, answer, []
        return thought, *self._calls.push(answer, last=last)

    @property
    def called(self) -> bool:
        """Whether a call was made so far."""
        return self._calls is not None and self._calls.made > 0


@dataclass
class Whole:
    """A whole answer."""

    text: str
    thought: str
    calls: list[Call]
    logprobs: list[msg.Logprob]
    done: msg.Done


async def collect(stream: Stream, reader: Reader | None) -> Whole:
    """Read a stream to its end."""
    parts, logprobs = [], []
    async for item in stream:
        parts.append(item.text)
        logprobs += item.logprobs or []
    assert isinstance(item, msg.Done)
    text = "".join(parts)
    thought, answer, calls = reader.push(text, last=True) if reader else ("", text, [])
    return Whole(answer, thought, calls, logprobs, item)


async def merged(streams: list[Stream]) -> AsyncIterator[tuple[int, msg.Delta | msg.Done]]:
    """The events of several streams as they come, each with its stream's number."""
    queue: asyncio.Queue[tuple[int, msg.Delta | msg.Done | RequestError]] = asyncio.Queue()

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
            i, item = await queue.get()
            if isinstance(item, RequestError):
                raise item
            left -= isinstance(item, msg.Done)
            yield i, item
    finally:
        for task in tasks:
            task.cancel()


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """`text` behind what the first system message says, or as one."""
    for i, message in enumerate(messages):
        if message["role"] == "system":
            merged = {**message, "content": f"{message['content']}\n\n{text}"}
            return [*messages[:i], merged, *messages[i + 1 :]]
    return [{"role": "system", "content": text}, *messages]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}


def _contains(prompt: str, content: str) -> bool:
    """Whether a template took `content` over: as it stands, or as JSON text."""
    text = content.strip()
    return text in prompt or json.dumps(text, ensure_ascii=False)[1:-1] in prompt


def _dropped(what: str, param: str) -> RequestError:
    return RequestError(f"the model's chat template has no place for {what}", code="unsupported", param=param)
