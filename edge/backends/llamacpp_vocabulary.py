"""Texts to token ids by llama.cpp's own tokenizer, and what is known of its vocabulary."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from edge.backends.onnx_tokenizer import byte_table
from edge.errors import EdgeError
from edge.prompt import AddedTokens

# A text is cut in each block of so many characters that are all of a word, or all between words: along those
# llama.cpp recurses, with 305 bytes of the stack for each (BPE); or that are in no token: over those it takes
# time in the square of their number (SPM).
_WORD, _UNKNOWN = 2**13, 2**10


class Vocabulary:
    """A loaded model's tokenizer. Thread-safe.

    token_bytes, strips: see BackendInfo. marks: texts of the tokens that are found in a text before all
    others, at which it may be cut; parsed_always: those of them that are found with special=False, too.
    added: all of these tokens.
    """

    def __init__(self, lib: Any, pointer: Any) -> None:
        self._lib, self._pointer = lib, pointer
        self.size = int(lib.llama_vocab_n_tokens(pointer))
        kind = lib.llama_vocab_type(pointer)
        marks, parsed_always, longest, known = [], [], 1, set[str]()
        bytes_left = {character.encode("utf-8") for character in byte_table()}
        added: list[tuple[str, bool]] = []
        self.strips = False
        control = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        own = control | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        strips = lib.LLAMA_TOKEN_ATTR_LSTRIP | lib.LLAMA_TOKEN_ATTR_RSTRIP
        for token in range(self.size):
            data = lib.llama_vocab_get_text(pointer, token) or b""
            attributes = lib.llama_vocab_get_attr(pointer, token)
            bytes_left.discard(data)
            if kind == lib.LLAMA_VOCAB_TYPE_SPM:
                known.update(data.decode("utf-8", "replace").replace("▁", " "))
            if len(data) > longest:
                longest = max(longest, len(data) if attributes & own else self._spelled(data, kind))
            if not attributes & own:
                continue
            self.strips = self.strips or bool(attributes & strips)
            text = data.decode("utf-8", "replace")
            added.append((text, bool(attributes & control)))
            # A token that takes the spaces before it must not be parted from them.
            if data and not attributes & lib.LLAMA_TOKEN_ATTR_LSTRIP:
                marks.append(text)
                # A token may be both.
                if not attributes & control:
                    parsed_always.append(text)
        # Other kinds of vocabulary shorten a text before they look it up, and BPE leaves out what it has no
        # token for.
        bounded = kind == lib.LLAMA_VOCAB_TYPE_SPM or (kind == lib.LLAMA_VOCAB_TYPE_BPE and not bytes_left)
        self.token_bytes = longest if bounded else 0
        self._spaced = bool(known)
        # A block that lacks one of these is cut.
        self._block, needed = _WORD, [r"\s", r"\S"]
        if known:
            self._block, needed = _UNKNOWN, [f"[{re.escape(''.join(sorted(known)))}]"]
        self._needed = [re.compile(pattern) for pattern in needed]
        self.marks, self.parsed_always = tuple(marks), tuple(parsed_always)
        self.added = AddedTokens.of(added)

    def _spelled(self, data: bytes, kind: int) -> int:
        """Bytes of a text that a token stands for. BPE spells each as a character, SPM only spaces."""
        text = data.decode("utf-8", "replace")
        if kind == self._lib.LLAMA_VOCAB_TYPE_BPE:
            return len(text)
        return len(text.replace("▁", " ").encode("utf-8"))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`, without a begin-of-text token. special: control tokens are parsed.

        Where a word of thousands of characters is cut, the ids may be others than those of the whole.
        """
        start, ids = 0, list[int]()
        for end in [*self._cuts(text), len(text)]:
            part = self._ids(text[start:end], special=special)
            if start and self._spaced:
                # SPM puts a space before a text: what it makes of the first character but that one's bytes.
                first = text[start]
                del part[: len(self._ids(first, special=special)) - len(first.encode("utf-8"))]
            ids += part
            start = end
        return ids

    def _cuts(self, text: str) -> Iterator[int]:
        # Block by block, for a long search would hold up what else waits for Python's lock.
        for end in range(self._block, len(text) + 1, self._block):
            block = text[end - self._block : end]
            if not all(pattern.search(block) for pattern in self._needed):
                # What follows begins with a character of the block.
                yield end - 1

    def _ids(self, text: str, *, special: bool) -> list[int]:
        data = text.encode("utf-8")
        ids = np.empty(len(data) + 16, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = self._lib.llama_tokenize(self._pointer, data, len(data), pointer, ids.size, False, special)
        if count < 0:
            raise EdgeError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
        tokens: list[int] = ids[:count].tolist()
        return tokens
