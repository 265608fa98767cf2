"""Prompts whose control tokens are the template's alone: marks that stand in a user's text are cut in two.

A tokenizer finds the text of a control token wherever it stands. So a mark in a user's text is broken: the
prompt is tokenized in parts, none of which holds the whole of it. A text without marks is never cut.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edge.errors import RequestError
from edge.reasoning import THINK, THINK_END

# What an assistant writes itself: tokens of its own text, whatever their flag.
ANSWERS = frozenset({THINK, THINK_END, "<tool_call>", "</tool_call>"})
# GGUF files keep no flag: their converter takes these for control tokens, so they are everywhere.
_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
# Where a mark is longer than any model's, each text may be a part of it: a cut that none spans is not kept.
_LOOKED = 256
# Stands in front of a part that goes on from another: some tokenizers put a space before a text.
_LEAD = "\n"
# Cuts are held in a template by a character that nobody wrote: printable, for templates that print objects.
_CUTS = range(0x2801, 0xD7A4)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to tokenize. cuts: positions that no token may span, in ascending order."""

    text: str
    cuts: tuple[int, ...] = ()

    def parts(self) -> Iterator[str]:
        ends = [*self.cuts, len(self.text)]
        return (self.text[start:end] for start, end in zip([0, *self.cuts], ends, strict=True))

    def between(self, start: int, end: int) -> Prompt:
        """The part from character `start` to `end`."""
        cuts = tuple(cut - start for cut in self.cuts if start < cut < end)
        return Prompt(self.text[start:end], cuts)

    def __add__(self, other: Prompt) -> Prompt:
        cuts = (cut + len(self.text) for cut in other.cuts)
        return Prompt(self.text + other.text, (*self.cuts, *cuts))


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """Texts of the tokens that a tokenizer finds before all others. special: control tokens.

    A token of one character is left out: it could not be cut.
    """

    special: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokens: Iterable[tuple[str, bool]]) -> AddedTokens:
        """From texts with their flags."""
        flags = {text: special or bool(_CONTROL.fullmatch(text)) for text, special in tokens if len(text) > 1}
        return cls(tuple(text for text in flags if flags[text]), tuple(t for t in flags if not flags[t]))


class Authored(str):
    """A text whose last `own` characters are the server's, not a user's: marks count there."""

    own: int


class Marks:
    """Finds the marks that a user wrote.

    literals: what the template itself names; it may look for them in a text, so they are not taken apart.
    """

    def __init__(self, marks: Iterable[str], literals: Iterable[str]) -> None:
        self._marks = frozenset(marks)
        self._mark = re.compile(any_of(self._marks))
        self._all = "\0".join(self._marks)
        self._words = frozenset(literals)
        self._longest = max(map(len, self._marks), default=0)
        self._ordered = sorted(self._marks)
        self._reversed = sorted(mark[::-1] for mark in self._marks)
        # Only behind such a text, or filled into one, can a user's go on to a mark that the template began.
        parts = itertools.chain.from_iterable(re.split("[%{]", word) for word in self._words)
        self._begun = self._longest > _LOOKED or any(
            _begins(self._ordered, part[-i:])
            for part in parts
            for i in range(1, min(len(part) + 1, self._longest))
        )
        self._firsts = sorted({mark[0] for mark in self._marks})
        self._safe = self._looked_for() if self._firsts else set[str]()

    def _looked_for(self) -> set[str]:
        """Texts that begin as marks do, are part of none, and may be what the template looks for."""
        begins = re.compile(f"{any_of(self._firsts)}[^{re.escape(''.join(self._firsts))}]*")
        words = {part for word in self._words for part in begins.findall(word)}
        return {word for word in words if word not in self._all and not self._mark.search(word)}

    def cut(self, messages: list[dict[str, Any]], extra: Any = None) -> tuple[list[dict[str, Any]], Any, str]:
        """`messages` and `extra` with a character at each place where a mark may have to be cut.

        The third value is that character, "" where there is no such place. Roles, which are no user's text,
        stay as they are. Raises RequestError where every such character is taken, RecursionError for values
        that are nested too deeply.
        """
        texts = list(_texts([messages, extra]))
        hold = any(first in text for text in texts for first in self._firsts)
        if not hold and not (self._begun and any(map(self._goes_on, texts))):
            return messages, extra, ""
        taken: str | set[str] = "".join([*texts, *self._words])
        # One look is faster than a set, unless somebody makes all of them fail.
        taken = set(taken) if chr(_CUTS[0]) in taken else taken
        cut = next((c for c in map(chr, _CUTS) if c not in taken), "")
        if not cut:
            raise RequestError("the messages hold too many different characters", param="messages")
        return [self._message(message, cut) for message in messages], self._cut(extra, cut), cut

    def _message(self, message: dict[str, Any], cut: str) -> dict[str, Any]:
        """Calls that an assistant made are no text of its own: their arguments hold what others wrote."""
        own = ANSWERS if message["role"] == "assistant" else frozenset()
        return {
            self._cut(key, cut): value
            if key == "role"
            else self._cut(value, cut, own if isinstance(value, str) else frozenset())
            for key, value in message.items()
        }

    def _cut(self, value: Any, cut: str, kept: frozenset[str] = frozenset()) -> Any:
        if isinstance(value, Authored):
            end = len(value) - value.own
            return self._cut(value[:end], cut, kept) + value[end:]
        if isinstance(value, str):
            text = value
            for first in self._firsts:
                text = text.replace(first, first + cut)
            for word in self._safe | kept:
                text = text.replace(word[0] + cut + word[1:], word)
            return cut + text if self._begun and self._goes_on(value) else text
        if isinstance(value, dict):
            return {self._cut(key, cut): self._cut(item, cut) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._cut(item, cut) for item in value]
        return value

    def _goes_on(self, text: str) -> bool:
        """Whether `text` may be the inner part of a mark, or begins with the end of one."""
        if not text or text in self._words:
            return False
        if self._longest > _LOOKED:
            return True
        lengths = range(1, min(len(text) + 1, self._longest))
        return text in self._all or any(_begins(self._reversed, text[:i][::-1]) for i in lengths)

    def prompt(self, text: str, cut: str) -> Prompt:
        """`text` without the character `cut`. It is cut there only where a mark would be."""
        if not cut or cut not in text:
            return Prompt(text)
        parts = text.split(cut)
        places = list(itertools.accumulate(map(len, parts)))[:-1]
        clean, kept, done = "".join(parts), list[int](), 0
        mark = self._mark.search(clean)
        while mark is not None:
            start, end = mark.span()
            done = bisect.bisect_right(places, start, done)
            while done < len(places) and places[done] < end:
                kept.append(places[done])
                done += 1
            # Marks may overlap.
            mark = self._mark.search(clean, start + 1)
        return Prompt(clean, tuple(kept))


def _begins(ordered: list[str], text: str) -> bool:
    """Whether `text` begins one of the longer texts in `ordered`."""
    place = bisect.bisect_right(ordered, text)
    return place < len(ordered) and ordered[place].startswith(text)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of messages or tools, keys included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item


def token_ids(
    texts: Iterable[str | Prompt], encode: Callable[[list[str]], Sequence[list[int]]]
) -> list[list[int]]:
    """The ids of each text. encode: the ids of each of several texts, marks parsed."""
    parts = [list(text.parts()) if isinstance(text, Prompt) else [text] for text in texts]
    rows = iter(encode([_LEAD * (i > 0) + part for row in parts for i, part in enumerate(row)]))
    lead = next(iter(encode([_LEAD]))) if any(len(row) > 1 for row in parts) else []
    result = []
    for row in parts:
        ids = list(next(rows))
        for part in row[1:]:
            more = next(rows)
            # Where the line end joins what follows it, the part is taken by itself.
            ids += more[len(lead) :] if more[: len(lead)] == lead else next(iter(encode([part])))
        result.append(ids)
    return result


def any_of(texts: Iterable[str], levels: int = 64) -> str:
    """A regular expression for the longest of `texts`: what they begin with alike is written once.

    levels: of groups in one another, of which Python compiles a few hundred.
    """
    ordered = sorted(set(texts))
    if not levels:
        return f"(?:{'|'.join(map(re.escape, sorted(ordered, key=len, reverse=True)))})"
    branches = []
    for _, group in itertools.groupby(filter(None, ordered), key=lambda text: text[0]):
        members = list(group)
        # Of sorted texts the first and the last differ earliest.
        pairs = zip(members[0], members[-1], strict=False)
        prefix = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        branches.append(re.escape(prefix) + any_of((text[len(prefix) :] for text in members), levels - 1))
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if ordered[0] == '' else ''}"
