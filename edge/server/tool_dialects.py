"""Tool calls: how each family of models writes them, and the grammars that force them.

A dialect is recognised by its marks in the chat template. A template without a known dialect is refused: its
calls could not be told from prose.

    hermes    Qwen, Hermes, SmolLM3 ...   <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    deepseek  V3, R1 and its distills     <｜tool▁call▁begin｜>function<｜tool▁sep｜>name ```json {...}```
    llama3    Llama 3.1 to 3.3            {"name": ..., "parameters": {...}} as the whole answer
    mistral   Mistral 0.3                 [TOOL_CALLS] [{"name": ..., "arguments": {...}}]
    action    LLaMA-Factory's default     Action: name, and in the next line Action Input: {...}
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

from edge.engine.grammar import WHITESPACE, Constraint
from edge.errors import RequestError
from edge.prompt import Authored

MAX_TOOLS = 128
# A forced answer has at most this many calls.
MAX_CALLS = 16
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_BLANK = r"/[ \n]{1,4}/"
# An answer that does not begin like one of Llama's calls.
PROSE = r"/[^{ \n](.|\n)*/"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: the JSON schema of its arguments; by default, none."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: dict(_NO_ARGUMENTS))
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RequestError(
                f"'{self.name[:140]}' is no name for a tool: 1 to 128 letters, digits, '_', '-', '.', ':'",
                param="tools",
            )

    def spec(self) -> dict[str, Any]:
        """The tool as chat templates read it, in OpenAI's form."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
            },
        }


@dataclass(frozen=True, slots=True)
class Call:
    """A call by the model. arguments: the JSON text of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family writes a call.

    opening, closing: the marks around each call. noise: marks around the whole list, which are dropped.
    before, between, after: the text around the calls of a forced answer. key: the name of the arguments.
    as_text: the template reads past arguments as JSON text. fenced: arguments stand in a fenced block.
    """

    name: str
    opening: str = ""
    closing: str = ""
    noise: tuple[str, ...] = ()
    before: str = ""
    between: str = ""
    after: str = ""
    key: str = "arguments"
    as_text: bool = False
    fenced: bool = False

    def parse(self, body: str) -> Call | None:
        """The call between two marks; None where the text is no call."""
        try:
            if self.name != "deepseek":
                return call_of(written(body))
            head, _, rest = body.partition("<｜tool▁sep｜>")
            if head.strip() == "function":
                head, _, rest = rest.partition("\n")
            text = rest.strip().removeprefix("```json").removesuffix("```").strip()
            return call_of({"name": head.strip(), "arguments": written(text)})
        except ValueError:
            return None

    def head(self, name: str) -> str:
        """What stands before the arguments of a call of `name`, where that is no JSON; "" where it is."""
        return f"Action: {name}\nAction Input: " if self.name == "action" else ""

    def rules(self, tool: Tool, rule: str) -> list[str]:
        """Lark lines for `rule`: the text between the marks of a call of `tool`."""
        arguments = f"{rule}_args: {json_rule({'type': 'object', **tool.parameters})}"
        if self.name == "deepseek":
            head, tail = f"{tool.name}<｜tool▁sep｜>", ""
            if self.fenced:
                head, tail = f"function<｜tool▁sep｜>{tool.name}\n```json\n", ' "\\n```"'
            return [f"{rule}: {_quoted(head)} {rule}_args{tail}", arguments]
        if self.name == "action":
            head = self.head(tool.name).removeprefix(self.before)
            return [f"{rule}: {_quoted(head)} {rule}_args", arguments]
        name = _quoted(f'{{"name": {json.dumps(tool.name)}, "{self.key}": ')
        return [f'{rule}: {name} {rule}_args "}}"', arguments]

    def grammar(
        self, tools: list[Tool], *, many: bool, begun: bool = False, other: str = "", param: str = "tools"
    ) -> Constraint:
        """The grammar of an answer that calls one of `tools` (many: up to MAX_CALLS times).

        begun: the grammar starts after the first opening mark, which the model wrote by itself.
        other: a Lark expression that the answer may match instead. param: the field that errors name.
        """
        rules = [f"tool{i}" for i in range(len(tools))]
        blank = "blank? " if self.name == "hermes" else ""
        body = f"{blank}body {blank}{_quoted(self.closing)}" if self.closing else "body"
        first = body if begun else f"{_quoted(self.before + self.opening)} {body}".removeprefix('"" ')
        more = ""
        if many:
            more = f" ({_quoted(self.between + self.opening)} {body}){{0,{MAX_CALLS - 1}}}"
        last = f" {_quoted(self.after)}" if self.after else ""
        lines = ["start: calls | other" if other else "start: calls", f"calls: {first}{more}{last}"]
        lines += [f"other: {other}"] if other else []
        lines += [f"blank: {_BLANK}"] if blank else []
        lines += [f"body: {' | '.join(rules)}"]
        for tool, rule in zip(tools, rules, strict=True):
            lines += self.rules(tool, rule)
        return Constraint("lark", "\n".join(lines), param)


HERMES = Dialect("hermes", "<tool_call>", "</tool_call>", between="\n")
DEEPSEEK = Dialect(
    "deepseek",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    before="<｜tool▁calls▁begin｜>",
    between="\n",
    after="<｜tool▁calls▁end｜>",
    as_text=True,
    fenced=True,
)
LLAMA3 = Dialect("llama3", between="; ", key="parameters")
MISTRAL = Dialect("mistral", before="[TOOL_CALLS] [", between=", ", after="]")
ACTION = Dialect("action", before="Action: ", between="\nAction: ")
_LLAMA_TAG = "<|python_tag|>"


def dialect_of(source: str) -> Dialect | None:
    """The dialect of a chat template; None where it has no known one."""
    if "<｜tool▁calls▁begin｜>" in source:
        return DEEPSEEK if "```json" in source else replace(DEEPSEEK, between="", fenced=False)
    if "<tool_call>" in source:
        return HERMES
    if "<|start_header_id|>" in source and ("tools" in source or _LLAMA_TAG in source):
        return LLAMA3
    # Later ones write no list; Mistral's own template wants ids of nine letters.
    if "[TOOL_CALLS]" in source and not any(sign in source for sign in ("[ARGS]", "length 9")):
        return MISTRAL
    return ACTION if "Action Input: " in source else None


def chosen(tools: list[Tool], names: list[str]) -> list[Tool]:
    """The tools of these names, as a tool_choice of type allowed_tools wants it. Raises RequestError."""
    if unknown := sorted(set(names) - {tool.name for tool in tools}):
        raise RequestError(f"tool_choice names '{unknown[0]}', no such tool is given", param="tool_choice")
    return [tool for tool in tools if tool.name in names]


def readable(message: dict[str, Any], dialect: Dialect | None) -> dict[str, Any]:
    """`message` in the form that its template reads: past calls' arguments as objects, or as text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    as_text = dialect is not None and dialect.as_text
    # DeepSeek's templates render calls only beside a content of None.
    content = None if as_text and not message.get("content") else message.get("content")
    return {**message, "content": content, "tool_calls": [_with_arguments(call, as_text) for call in calls]}


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function["arguments"]
    if as_text and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        function["arguments"] = json.loads(arguments)
    return {**call, "function": function}


def explained(messages: list[dict[str, Any]], tools: list[Tool], dialect: Dialect) -> list[dict[str, Any]]:
    """`messages` with a system text about `tools`, for templates that render calls but no definitions.

    DeepSeek's distills have such a template. What the user wrote stands before what is ours.
    """
    rows = "\n".join(json.dumps(tool.spec(), ensure_ascii=False) for tool in tools)
    text = f"# Tools\n\nYou may call functions. Their definitions, one a line:\n{rows}\n\n"
    own = (
        "To call one, write exactly this and end your turn:\n"
        f"{dialect.before}{dialect.opening}function<｜tool▁sep｜>NAME\n"
        f"```json\n{{ARGUMENTS}}\n```{dialect.closing}{dialect.after}"
    )
    for i, message in enumerate(messages):
        if message["role"] == "system":
            longer = {**message, "content": _authored(f"{message['content']}\n\n{text}", own)}
            return [*messages[:i], longer, *messages[i + 1 :]]
    return [{"role": "system", "content": _authored(text, own)}, *messages]


def _authored(text: str, own: str) -> Authored:
    whole = Authored(text + own)
    whole.own = len(own)
    return whole


def json_rule(schema: dict[str, Any]) -> str:
    """A Lark expression for JSON that fits `schema`."""
    # Without a bound a model may write blank space without end.
    bounded = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps(bounded, ensure_ascii=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def written(text: str) -> Any:
    """The value of JSON that a model wrote. Raises ValueError for what a client could not read."""
    try:
        value = json.loads(text)
        # Python also reads NaN, and half of a surrogate pair.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def call_of(value: Any, *, explicit: bool = False) -> Call | None:
    """A call from its JSON object; None where it is no call. explicit: its arguments must be there."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    if explicit and not {"arguments", "parameters"} & set(value):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = written(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))
