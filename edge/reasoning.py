"""A reasoning model's thought: where it begins and ends in a text, and its part of an answer."""

from __future__ import annotations

import codecs

THINK, THINK_END = "<think>", "</think>"


def opens_reasoning(prompt: str) -> bool:
    """Whether the prompt ends inside a thought that the model is to finish."""
    return prompt.rstrip().endswith(THINK)


class ReasoningCounter:
    """Counts the tokens of an answer's thought, from the one that completes its opening tag to the one that
    completes the closing tag.

    inside: the prompt has opened the thought. thinking: whether the answer is in its thought now; None until
    the first text says whether the model opens one.
    """

    def __init__(self, *, inside: bool) -> None:
        self.thinking: bool | None = True if inside else None
        self.tokens = 0
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""

    def take(self, piece: bytes) -> None:
        """Book a token by its bytes."""
        if self.thinking is False:
            return
        self._text += self._decode(piece)
        if self.thinking is None:
            bare = self._text.lstrip()
            if not bare or (THINK.startswith(bare) and bare != THINK):
                return
            self.thinking = bare.startswith(THINK)
        if self.thinking:
            self.tokens += 1
            self.thinking = THINK_END not in self._text
            self._text = self._text[-len(THINK_END) :]


class ReasoningSplitter:
    """Parts a stream of text into (thought, answer), whoever opened the thought.

    inside: the template has opened it already. Joined over all pushes and `finish`, `a</think>b` gives
    ("a", "b"). Blank space around the tags belongs to neither.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._held = ""
        self._begun = inside
        self._strip = inside

    def push(self, text: str) -> tuple[str, str]:
        """What is certain after `text`: (more of the thought, more of the answer)."""
        self._held += text
        thought = answer = ""
        while True:
            if not self._begun:
                bare = self._held.lstrip()
                if bare.startswith(THINK):
                    self._held = bare[len(THINK) :]
                    self._begun = self._inside = self._strip = True
                    continue
                if THINK.startswith(bare):
                    return thought, answer
                self._begun = True
                continue
            if self._strip:
                self._held = self._held.lstrip()
                if not self._held:
                    return thought, answer
                self._strip = False
            if not self._inside:
                answer, self._held = answer + self._held, ""
                return thought, answer
            at = self._held.find(THINK_END)
            if at < 0:
                # A tag that may have begun, and blank space that may stand before it, are held back.
                keep = len(self._held) - max(
                    (n for n in range(len(THINK_END)) if self._held.endswith(THINK_END[:n])), default=0
                )
                keep = len(self._held[:keep].rstrip())
                thought, self._held = thought + self._held[:keep], self._held[keep:]
                return thought, answer
            thought += self._held[:at].rstrip()
            self._held = self._held[at + len(THINK_END) :]
            self._inside, self._strip = False, True

    def finish(self) -> tuple[str, str]:
        """What was held back when the stream ended."""
        held, self._held = self._held, ""
        return (held, "") if self._inside else ("", held)
