"""Reads the tool calls of an answer while it streams, between marks or as plain JSON; the rest stays text.

Dialects with marks open and close each call. Llama 3 has none, and small models of the other families forget
theirs and write the bare object, often in a fenced block. Such an object is a call only if it begins with the
name of a tool that was offered, and fits the schema of a strict tool. Anything else that looks like a call
stays text, except one that the limit of tokens cut off: it is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from edge.engine.detokenizer import overlap
from edge.engine.grammar import fits
from edge.server.tool_dialects import Call, Dialect, Tool, call_of, written

_FENCE = "```"
# What may stand before a bare object, blank space aside, and what closes it.
_OPENINGS = {"": "", "```json": _FENCE, _FENCE: _FENCE, "<tools>": "</tools>", "<|python_tag|>": ""}
_LISTS = ("[", "[TOOL_CALLS][")
_TAGS = [opening for opening in _OPENINGS if opening.startswith("<")]
_KINDS = ("", '"type":"function",')
# How far a call's beginning is looked for, blank space included: a name has at most 128 characters.
_LOOK = 1024
# Llama parts its calls by a semicolon.
_BLANK = " \t\r\n;"


class ToolParser:
    """Splits a stream of an answer's text into (text, calls), the same for any chunking.

    tools: those that were offered. parallel: False keeps the first call and drops everything after it, as the
    request asked.
    """

    def __init__(self, dialect: Dialect, tools: list[Tool], *, parallel: bool = True) -> None:
        self._marks = _Marks(dialect) if dialect.opening else None
        self._bare = _Bare(tools, dialect)
        self._parallel = parallel
        self._count = 0

    def push(self, text: str, *, last: bool = False, cut: bool = False) -> tuple[str, list[Call]]:
        """What is certain after `text`; with `last`, what was held back too, less a call that was cut off."""
        pieces: Iterable[str | Call] = [text]
        if self._marks is not None:
            pieces = self._marks.push(text, last=last, cut=cut)
        return self._counted(self._with_bare(pieces, last, cut))

    def _with_bare(self, pieces: Iterable[str | Call], last: bool, cut: bool) -> Iterator[str | Call]:
        for piece in pieces:
            if isinstance(piece, Call):
                # Text that was held back in front of a mark is no call.
                yield from self._bare.push("", last=True)
                yield piece
            else:
                yield from self._bare.push(piece)
        if last:
            yield from self._bare.push("", last=True, cut=cut)

    def _counted(self, pieces: Iterable[str | Call]) -> tuple[str, list[Call]]:
        shown, calls = "", []
        for piece in pieces:
            if self._count and not self._parallel:
                continue
            if isinstance(piece, Call):
                self._count += 1
                calls.append(piece)
            elif not self._count or piece.strip():
                shown += piece
        return shown, calls


class _Marks:
    """Calls between a dialect's marks. A last call without its closing mark counts."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._openings = [dialect.opening, *dialect.noise]
        self._held = ""
        self._inside = False

    def push(self, text: str, *, last: bool, cut: bool = False) -> Iterator[str | Call]:
        # The limit may fall within a character of a mark.
        whole = text.rstrip("\ufffd") if cut else text
        self._held += whole
        while True:
            if self._inside:
                body, closing, rest = self._held.partition(self._dialect.closing)
                if not closing:
                    break
                yield self._ended(body, body + closing)
                self._held = rest
                continue
            marks = [(index, mark) for mark in self._openings if (index := self._held.find(mark)) >= 0]
            if not marks:
                # A mark that may have begun, and blank space that may stand before it, are held back.
                keep = len(self._held) - max(overlap(self._held, mark) for mark in self._openings)
                keep = len(self._held[:keep].rstrip())
                yield self._held[:keep]
                self._held = self._held[keep:]
                break
            index, mark = min(marks)
            yield self._held[:index].rstrip()
            self._held = self._held[index + len(mark) :]
            self._inside = mark == self._dialect.opening
        if last and self._inside:
            ended = self._ended(self._held, self._held)
            yield "" if cut and isinstance(ended, str) else ended
        elif last:
            yield _without_mark(self._held, self._openings, text[len(whole) :]) if cut else self._held
        if last:
            self._held = ""

    def _ended(self, body: str, raw: str) -> str | Call:
        """The call in `body`, or the text to show in its place where it is none."""
        self._inside = False
        return self._dialect.parse(body) or self._dialect.opening + raw


def _without_mark(text: str, marks: Iterable[str], rest: str = "") -> str:
    """`text` and `rest`, less a mark that has begun where they meet. One character is no sign of a mark."""
    begun = max(overlap(text, mark) for mark in marks)
    return text[:-begun].rstrip() if begun > 1 else text + rest


class _Bare:
    """Calls that stand in the text as plain JSON: at its beginning, after another, or in a fenced block.

    Some stand in a list, some have their name in front.
    """

    def __init__(self, tools: list[Tool], dialect: Dialect) -> None:
        self._strict = {tool.name: tool.parameters for tool in tools if tool.strict}
        self._heads = {
            f'{opening}{{{kind}"name":"{tool.name}"': closing
            for tool in tools
            for opening, closing in (_OPENINGS | dict.fromkeys(_LISTS, "")).items()
            for kind in _KINDS
        }
        named = {"".join(dialect.head(tool.name).split()) + "{": tool.name for tool in tools}
        self._named = {head: name for head, name in named.items() if head != "{"}
        self._heads |= dict.fromkeys(self._named, "")
        # What no prose begins with: left out where the limit of tokens cuts it off.
        self._begun = [*_TAGS, *(f'[TOOL_CALLS] [{{"name": "{tool.name}"' for tool in tools)]
        self._begun += [head + "{" for tool in tools if (head := dialect.head(tool.name))]
        self._name = ""
        # Behind a call of a list.
        self._listed = False
        self._held = ""
        # At the beginning of the text, or behind a call.
        self._fresh = True
        self._closing = ""
        self._object: _Braces | None = None

    def push(self, text: str, *, last: bool = False, cut: bool = False) -> Iterator[str | Call]:
        self._held += text
        while self._held:
            if self._object is not None:
                end = self._object.end(self._held)
                if end is None:
                    break
                yield self._ended(end)
                continue
            if self._closing and not self._skipped_closing():
                break
            blank = _BLANK + ",]" * self._listed
            begin = (
                len(self._held) - len(self._held.lstrip(blank)) if self._fresh else self._held.find(_FENCE)
            )
            if begin < 0:
                # A fence that may have begun, and blank space that may stand before a call, are held back.
                begin = len(self._held) - overlap(self._held, _FENCE)
                yield self._cut(len(self._held[:begin].rstrip()))
                break
            compact = "".join(self._held[begin : begin + _LOOK].split())
            head = next((head for head in self._heads if compact.startswith(head)), None)
            if head is not None:
                yield self._cut(begin).rstrip(blank if self._fresh else None)
                self._closing, self._object = self._heads[head], _Braces(self._held.index("{"))
                self._name = self._named.get(head, "")
                self._listed = self._listed or head.startswith(_LISTS)
            elif any(head.startswith(compact) for head in self._heads):
                yield self._cut(0 if self._fresh else len(self._held[:begin].rstrip()))
                break
            elif self._fresh:
                self._fresh = False
                self._held = self._held[begin if self._listed else 0 :]
            else:
                yield self._cut(begin + len(_FENCE))
        if last:
            held, begun = self._cut(len(self._held)), self._object is not None
            if self._listed and self._fresh:
                held = held.lstrip(_BLANK + ",]")
            if cut:
                held = "" if begun else _without_mark(held, self._begun)
            yield held
            self._object = None

    def _cut(self, n: int) -> str:
        """Take the first `n` characters of what is held."""
        taken, self._held = self._held[:n], self._held[n:]
        return taken

    def _skipped_closing(self) -> bool:
        """Drop the mark that closes a call's block. False while it may still come."""
        bare = self._held.lstrip()
        if bare != self._closing and self._closing.startswith(bare):
            return False
        if bare.startswith(self._closing):
            self._held = bare.removeprefix(self._closing)
        self._closing = ""
        return True

    def _ended(self, end: int) -> str | Call:
        """The call that ends at `end`, or its text where it is none."""
        assert self._object is not None
        body, raw = self._held[self._object.begin : end], self._held[:end]
        self._object, self._held = None, self._held[end:]
        try:
            value = written(body)
            call = call_of({"name": self._name, "arguments": value} if self._name else value, explicit=True)
        except ValueError:
            call = None
        if call is not None and call.name in self._strict:
            # No grammar bound a call that was written without a mark.
            call = call if fits(self._strict[call.name], json.loads(call.arguments)) else None
        self._fresh = call is not None
        if call is None:
            self._closing = ""
            return raw
        return call


class _Braces:
    """Finds the end of a JSON object that streams in. begin: the index of its first brace."""

    def __init__(self, begin: int) -> None:
        self.begin = self._next = begin
        self._depth = 0
        self._quoted = self._escaped = False

    def end(self, text: str) -> int | None:
        """The index after its last brace; None until that has come. `text` only grows between calls."""
        for index in range(self._next, len(text)):
            character = text[index]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{}":
                self._depth += 1 if character == "{" else -1
                if not self._depth:
                    return index + 1
        self._next = len(text)
        return None
