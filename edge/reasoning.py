"""The reasoning of a reasoning model: where it begins and ends in a text, and how many tokens it has."""

from __future__ import annotations

import codecs

THINK, THINK_END = "<think>", "</think>"
EMPTY = f"{THINK}\n\n{THINK_END}\n\n"


def opens_reasoning(prompt: str) -> bool:
    """Whether the prompt ends inside reasoning that the model is to go on with."""
    return prompt.rstrip().endswith(THINK)


class ReasoningCounter:
    """Counts an answer's reasoning tokens, from the one that completes the opening tag to the one that
    completes the closing tag.

    inside: the prompt has opened the reasoning. thinking: whether the answer is in its reasoning now; None
    until the first text tells whether the model opens any.
    """

    def __init__(self, *, inside: bool) -> None:
        self.thinking: bool | None = True if inside else None
        self.tokens = 0
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""

    def take(self, piece: bytes) -> None:
        """Follow a token by its bytes."""
        if self.thinking is False:
            return
        self._text += self._decode(piece)
        if self.thinking is None:
            bare = self._text.lstrip()
            if bare != THINK and THINK.startswith(bare):
                return
            self.thinking = bare.startswith(THINK)
        if self.thinking:
            self.tokens += 1
            self.thinking = THINK_END not in self._text
            self._text = self._text[-len(THINK_END) :]


class ReasoningSplitter:
    """Splits a stream of text into (reasoning, answer), whoever opened the reasoning.

    inside: the prompt has opened it already. Joined over all pushes and `finish`, `a</think>b` gives ("a",
    "b"). White space around the tags belongs to neither.
    """

    def __init__(self, *, inside: bool) -> None:
        # None until it is clear whether the text opens reasoning.
        self._inside = True if inside else None
        self._strip = inside
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """What is certain after `text`: (more of the reasoning, more of the answer)."""
        self._held += text
        if self._inside is None:
            bare = self._held.lstrip()
            if bare != THINK and THINK.startswith(bare):
                return "", ""
            self._inside = self._strip = bare.startswith(THINK)
            if self._inside:
                self._held = bare[len(THINK) :]
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held
        if not self._inside:
            answer, self._held = self._held, ""
            return "", answer
        reasoning, tag, rest = self._held.partition(THINK_END)
        if tag:
            self._inside, self._strip, self._held = False, True, rest
            return reasoning.rstrip(), self.push("")[1]
        # A tag that may have begun is held back, and white space that may stand before it.
        begun = max(n for n in range(len(THINK_END)) if self._held.endswith(THINK_END[:n]))
        reasoning = self._held[: len(self._held) - begun].rstrip()
        self._held = self._held[len(reasoning) :]
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """What was held back when the stream ended."""
        held, self._held = self._held, ""
        return (held, "") if self._inside else ("", held)
