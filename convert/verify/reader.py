"""One stage of a model, as a comparison asks it: the interface that each format implements.

A further format needs a subclass of Reader and a line in `convert.verify.compare.open_reader`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from edge.artefact.manifest import Manifest
from edge.backends.base import Logits
from edge.chat_template import ChatTemplate
from edge.errors import RequestError
from edge.prompt import AddedTokens, Prompt, token_ids

# The texts of the probes one after the other, for a model without a chat template.
_PLAIN = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


class Side(Protocol):
    """What a comparison reads of either side, before any weights: a stage, or a server that answers for one.

    path: what was given. runtime: what computes it, for notes. template, stop_ids: None where a server does
    not show them; the rest is as of Reader.
    """

    @property
    def path(self) -> Path | str: ...
    @property
    def manifest(self) -> Manifest | None: ...
    @property
    def stage(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def runtime(self) -> str: ...
    @property
    def template(self) -> str | None: ...
    @property
    def stop_ids(self) -> frozenset[int] | None: ...
    @property
    def more_ends(self) -> frozenset[int]: ...
    def prompt_ids(self, conversations: Iterable[list[dict[str, str]]]) -> list[list[int]]: ...
    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, rows: list[list[int]]) -> list[str]: ...
    def special_tokens(self) -> list[str]: ...


class Reader(ABC):
    """One stage of a model, asked as a server asks it. It tokenizes before any weights are loaded.

    path: what was given. manifest: its edge.json, if any. stage: as in edge.json. kind: the type of its
    weights, as in `convert.verify.compare.BOUNDS`. template: the chat template's text, "" without one.
    stop_ids: tokens at which an answer ends; more_ends: others at which its runtime would stop as well.
    vocab: rows of the output layer. slowness: the reader with the lower one writes the greedy texts of a
    comparison.
    """

    runtime = "llama.cpp"  # the only one that knows ends by name
    more_ends: frozenset[int] = frozenset()
    slowness: int = 2

    def __init__(
        self,
        path: Path,
        record: Manifest | None,
        *,
        stage: str,
        kind: str,
        template: str,
        bos: str,
        eos: str,
        tokens: AddedTokens,
        ends: Iterable[int],
        vocab: int,
    ) -> None:
        self.path, self.manifest, self.stage, self.kind = path, record, stage, kind
        self.template, self.vocab = template, vocab
        self.thinking = record.thinking if record else None
        # As a server takes them: what edge.json names, else what the model's own files name.
        self.stop_ids = frozenset(record.stop_ids if record else ()) or frozenset(ends)
        self._chat = ChatTemplate(template or _PLAIN, tokens=tokens, bos=bos, eos=eos, file=str(path))

    def prompt(self, messages: list[dict[str, str]]) -> Prompt:
        """What serving renders for `messages`; the template's error in angle brackets."""
        try:
            return self._chat.render(messages, thinking=self.thinking)
        except RequestError as error:
            return Prompt(f"<{error.message}>")

    def prompt_ids(self, conversations: Iterable[list[dict[str, str]]]) -> list[list[int]]:
        """Token ids of the prompt for each conversation."""
        return token_ids(map(self.prompt, conversations), self.encode)

    def answer_ids(self, answers: Iterable[str]) -> list[list[int]]:
        """Token ids of each answer of an assistant."""
        return token_ids(map(self._chat.answer, answers), self.encode)

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text: special tokens that stand in it are recognised, none are added."""

    @abstractmethod
    def decode(self, rows: list[list[int]]) -> list[str]:
        """The text of each row of ids, without control tokens."""

    @abstractmethod
    def special_tokens(self) -> list[str]:
        """What the tokenizer takes as one token wherever it stands: control and added tokens, by id."""

    @abstractmethod
    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        """Logits after the `last` tokens of each row in turn, float32 (last, vocab).

        Raises InputError where the model cannot be loaded, or its memory does not suffice.
        """

    @abstractmethod
    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        """At most `count` most probable next tokens, a stop token included; None where it is too slow."""

    def greedy_of_all(self, rows: list[list[int]], count: int) -> list[list[int] | None]:
        """`greedy` of each row; together where that is faster."""
        return [self.greedy(ids, count) for ids in rows]

    @abstractmethod
    def close(self) -> None:
        """Let go of the weights."""
