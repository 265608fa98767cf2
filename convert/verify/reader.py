"""One stage of a model, as a comparison asks it: the interface that each format implements.

A further format needs a subclass of Reader and a line in `convert.verify.open_reader`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.artefact import manifest
from edge.chat_template import ChatTemplate
from edge.errors import RequestError

Logits = NDArray[np.float32]


class Reader(ABC):
    """One stage of a model, as it would be asked. Tokenizing must work before any weights are loaded.

    path: what was given. stage: as in edge.json. kind: type of its weights. template: the chat template's
    text. stop_ids: tokens at which an answer ends; more_ends: others at which its runtime would stop as well.
    vocab: rows of the output layer. known: its manifest, if it has one. slowness: which of two readers is to
    write texts.
    """

    path: Path
    stage: str
    kind: str
    template: str
    stop_ids: frozenset[int]
    more_ends: frozenset[int] = frozenset()
    vocab: int
    known: manifest.Manifest | None = None
    slowness: int = 2

    def __init__(self, source: str, bos: str, eos: str, thinking: str | None) -> None:
        self.template = source
        self.thinking = thinking
        self._chat = ChatTemplate(source, bos=bos, eos=eos)

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The text that serving makes of `messages`; the template's words in angle brackets if it refuses."""
        try:
            return self._chat.render(messages, thinking=self.thinking)
        except RequestError as error:
            return f"<{error.message}>"

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text: special tokens that stand in it are recognised, none are added."""

    @abstractmethod
    def decode(self, rows: list[list[int]]) -> list[str]:
        """The text of each row of ids, without control tokens."""

    @abstractmethod
    def logits(self, ids: list[int]) -> Logits:
        """Logits after each of `ids`: float32 (len(ids), vocab)."""

    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        """Logits after the `last` tokens of each row in turn, float32 (last, vocab).

        To be overridden where many rows at once, or fewer logits, are cheaper.
        """
        return (self.logits(ids)[-count:] for ids, count in zip(rows, last, strict=True))

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        """At most `count` most probable next tokens, a stop token included; None where it is too slow."""
        made: list[int] = []
        while len(made) < count and not (made and made[-1] in self.stop_ids):
            made.append(int(self.logits(ids + made)[-1].argmax()))
        return made

    @abstractmethod
    def close(self) -> None:
        """Let go of the weights."""
