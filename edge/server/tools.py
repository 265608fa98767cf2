"""Tool calls: what a model is told about tools, what it must write, and how its calls are read.

Each family of templates has its own dialect of text. A dialect is recognised by the marks in the chat
template; one that is not known is refused, for its calls could not be told from prose:

    hermes    Qwen, Hermes, SmolLM3 ...   <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    deepseek  V3, R1 and its distills     <｜tool▁call▁begin｜>function<｜tool▁sep｜>name ```json {...}```
    llama3    Llama 3.1 to 3.3            {"name": ..., "parameters": {...}} as the whole answer
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

from edge.errors import RequestError
from edge.grammar import WHITESPACE, Constraint
from edge.text import overlap

MAX_TOOLS = 128
# A forced answer ends after so many calls, whatever the model wants.
MAX_CALLS = 16
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
_BLANK = r"/[ \n]{1,4}/"
# An answer that does not begin as a call of Llama's does.
_PROSE = r"/[^{ \n](.|\n)*/"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RequestError(
                f"'{self.name[:140]}' is no name for a tool: 1 to 128 letters, digits, '_', '-', '.', ':'",
                param="tools",
            )

    def spec(self) -> dict[str, Any]:
        """As chat templates read it, which is OpenAI's form."""
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
    """A call that the model made. arguments: JSON text of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family writes a call.

    opening, closing: the marks around each. noise: marks around the whole list, which say nothing.
    before, between, after: what a forced answer holds around its calls. key: the name of the arguments.
    as_text: the template wants past arguments as JSON text. own_place: definitions have a place in it.
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
        """The call between two marks; None where it is none."""
        if self.name == "deepseek":
            head, mark, rest = body.partition("<｜tool▁sep｜>")
            if not mark:
                return None
            if head.strip() == "function":
                head, _, rest = rest.partition("\n")
            name, text = head.strip(), rest.strip().removeprefix("```json").removesuffix("```").strip()
            try:
                arguments = json.loads(text)
            except ValueError:
                return None
            return _call({"name": name, "arguments": arguments})
        try:
            return _call(json.loads(body))
        except ValueError:
            return None

    def one(self, tool: Tool, rule: str) -> list[str]:
        """Lark lines for `rule`: what stands between the marks of a call of `tool`."""
        if self.name == "deepseek":
            head = (
                f"function<｜tool▁sep｜>{tool.name}\n```json\n"
                if self.fenced
                else f"{tool.name}<｜tool▁sep｜>"
            )
            tail = ' "\\n```"' if self.fenced else ""
            return [f"{rule}: {_quoted(head)} {rule}_args{tail}", f"{rule}_args: %json {_schema(tool)}"]
        name = _quoted(f'{{"name": {json.dumps(tool.name)}, "{self.key}": ')
        return [f'{rule}: {name} {rule}_args "}}"', f"{rule}_args: %json {_schema(tool)}"]

    def grammar(
        self, tools: list[Tool], *, many: bool, begun: bool = False, optional: bool = False
    ) -> Constraint:
        """What an answer must be that calls one of `tools` (many: up to MAX_CALLS times).

        begun: the grammar starts behind the first opening mark, which the model wrote of its own accord.
        optional: the answer may be prose instead.
        """
        rules = [f"tool{i}" for i in range(len(tools))]
        blank = "blank? " if self.name == "hermes" else ""
        body = f"{blank}body {blank}{_quoted(self.closing)}" if self.closing else "body"
        first = body if begun else f"{_quoted(self.before + self.opening)} {body}".removeprefix('"" ')
        more = ""
        if many:
            more = f" ({_quoted(self.between + self.opening)} {body}){{0,{MAX_CALLS - 1}}}"
        last = f" {_quoted(self.after)}" if self.after else ""
        lines = ["start: calls | PROSE" if optional else "start: calls", f"calls: {first}{more}{last}"]
        lines += [f"PROSE: {_PROSE}"] if optional else []
        lines += [f"blank: {_BLANK}"] if blank else []
        lines += [f"body: {' | '.join(rules)}"]
        for tool, rule in zip(tools, rules, strict=True):
            lines += self.one(tool, rule)
        return Constraint("lark", "\n".join(lines), "tools")


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
_LLAMA_TAG = "<|python_tag|>"


def dialect_of(source: str) -> Dialect | None:
    """The dialect of a chat template; None where it has none that is known."""
    if "<｜tool▁calls▁begin｜>" in source:
        return DEEPSEEK if "```json" in source else replace(DEEPSEEK, between="", fenced=False)
    if "<tool_call>" in source:
        return HERMES
    if "<|start_header_id|>" in source and ("tools" in source or _LLAMA_TAG in source):
        return LLAMA3
    return None


def described(tools: list[Tool], dialect: Dialect) -> str:
    """A system text that explains the tools, for templates that know calls but have no place for these.

    The DeepSeek distills are so: their template renders calls and results, never a definition.
    """
    rows = "\n".join(json.dumps(tool.spec(), ensure_ascii=False) for tool in tools)
    example = (
        f"{dialect.before}{dialect.opening}function<｜tool▁sep｜>NAME\n"
        f"```json\n{{ARGUMENTS}}\n```{dialect.closing}{dialect.after}"
    )
    return (
        f"# Tools\n\nYou may call functions. Their definitions, one a line:\n{rows}\n\n"
        f"To call one, write exactly this and end your turn:\n{example}"
    )


def _schema(tool: Tool) -> str:
    schema = dict(tool.parameters)
    schema.setdefault("type", "object")
    # Without a bound a model may write blank space for ever.
    schema["x-guidance"] = {"whitespace_pattern": WHITESPACE}
    return json.dumps(schema, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _call(value: Any) -> Call | None:
    """A call from its JSON object; None where it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


class CallReader:
    """Parts a stream of an answer's text into (text, calls). What looks like a call and is none stays text.

    parallel: False keeps the first call and drops what comes after it, as the request asked.
    """

    def __init__(self, dialect: Dialect, *, parallel: bool = True) -> None:
        self._dialect = dialect
        self._parallel = parallel
        self._marks = [dialect.opening, *dialect.noise] if dialect.opening else []
        self._held = ""
        self._inside = False
        # Llama's calls have no mark: the first character decides, and they are read when all has come.
        self._undecided = not self._marks
        self._whole = False
        self.made = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """What is certain after `text`."""
        self._held += text
        if self._undecided:
            self._decide()
        if self._undecided or self._whole:
            return "", []
        if not self._marks:
            text, self._held = self._held, ""
            return text, []
        shown = ""
        calls: list[Call] = []
        while True:
            if self._inside:
                at = self._held.find(self._dialect.closing)
                if at < 0:
                    return self._kept(shown), calls
                end = at + len(self._dialect.closing)
                shown += self._end_call(self._held[:at], self._held[:end], calls)
                self._held = self._held[end:]
                continue
            found = [(at, mark) for mark in self._marks if (at := self._held.find(mark)) >= 0]
            if not found:
                # A mark that may have begun, and blank space that may stand before it, are held back.
                keep = len(self._held) - max(overlap(self._held, mark) for mark in self._marks)
                keep = len(self._held[:keep].rstrip())
                shown, self._held = shown + self._held[:keep], self._held[keep:]
                return self._kept(shown), calls
            at, mark = min(found)
            shown += self._held[:at].rstrip()
            self._held = self._held[at + len(mark) :]
            self._inside = mark == self._dialect.opening

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back when the answer ended. A last call without its closing mark counts."""
        held, self._held = self._held, ""
        calls: list[Call] = []
        if self._undecided:
            return held, []
        if self._whole:
            return self._all(held)
        if self._inside:
            return self._kept(self._end_call(held, held, calls)), calls
        return (held if not self.made else ""), []

    def _kept(self, shown: str) -> str:
        return "" if self.made and not self._parallel else shown

    def _end_call(self, body: str, raw: str, calls: list[Call]) -> str:
        """Book the call in `body`; the text to show in its place where it is none."""
        self._inside = False
        call = self._dialect.parse(body)
        if call is None:
            return self._dialect.opening + raw
        if self._parallel or not self.made:
            self.made += 1
            calls.append(call)
        return ""

    def _decide(self) -> None:
        bare = self._held.lstrip()
        if not bare or (_LLAMA_TAG.startswith(bare) and bare != _LLAMA_TAG):
            return
        self._undecided = False
        self._whole = bare.startswith(("{", _LLAMA_TAG))

    def _all(self, text: str) -> tuple[str, list[Call]]:
        calls: list[Call] = []
        rest, decoder = text.strip().removeprefix(_LLAMA_TAG).lstrip(), json.JSONDecoder()
        while rest:
            try:
                value, end = decoder.raw_decode(rest)
            except ValueError:
                return text, []
            call = _call(value)
            if call is None or not {"parameters", "arguments"} & set(value):
                return text, []
            calls.append(call)
            rest = rest[end:].lstrip(" \n;")
        calls = calls if self._parallel else calls[:1]
        self.made = len(calls)
        return "", calls
