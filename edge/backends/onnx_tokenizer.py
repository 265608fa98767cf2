"""Text to token ids and back, from a tokenizer.json, through the package `tokenizers`.

A token's bytes are needed, not its text: a character may be spread over several tokens. Two families of
vocabularies have them: byte-level BPE (GPT-2's table of a printable character for each byte), and
SentencePiece (a space is "▁", and `<0x0A>` is a byte). Another family is refused, never guessed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge.artefact import json_file
from edge.errors import InputError, UnavailableError
from edge.prompt import AddedTokens
from edge.setup import install_command

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_BYTES = 256 * 2**20
_NORMALIZED = re.compile(r'"normalized":\s*true')
# Pre-tokenizers that leave no character out.
_KEEP_ALL = ("ByteLevel", "Digits", "Metaspace", "Split")


def byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 as it is, U+0100 on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def exact(text: str) -> str:
    """A tokenizer.json whose added tokens are found where a text spells them, not where it is normalised to.

    Else `＜s＞` is the control token `<s>` to a tokenizer with NFKC, which no look at the text shows.
    """
    if not _NORMALIZED.search(text):
        return text
    described = json.loads(text)
    kinds = {part.get("type") for part in _parts(described.get("normalizer"), "normalizers")}
    for token in described["added_tokens"]:
        # SentencePiece's normalizers change no character but the space.
        if not kinds <= {"Prepend", "Replace"} or "▁" in token["content"]:
            token["normalized"] = False
    return json.dumps(described)


class Vocabulary:
    """A tokenizer for a model of `size` ids; no text has ids beyond the tokenizer's own.

    token_bytes, strips: see BackendInfo. marks: texts of the tokens that are found in a text before all
    others, at which it may be cut; parsed_always: those of them that are found with special=False, too.
    added: all of these tokens.

    Thread-safe. Raises InputError for a file that is missing, broken or of an unsupported family.
    """

    def __init__(self, folder: Path, size: int) -> None:
        try:
            # One text at a time gives the package's threads nothing to do.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UnavailableError(
                "serving ONNX needs the package tokenizers", install_command("serve", "onnx")
            ) from error
        path = folder / "tokenizer.json"
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise InputError(
                f"{path} is missing, or too large to be a tokenizer",
                "export again: edge export onnx RUN --overwrite",
            )
        with _reading(path):
            text = exact(path.read_text(encoding="utf-8"))
            described: dict[str, Any] = json.loads(text)
            # The first parses control tokens, the second reads them as plain text.
            self._special, self._plain = Tokenizer.from_str(text), Tokenizer.from_str(text)
        for tokenizer in (self._special, self._plain):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._plain.encode_special_tokens = True
        if self._special.get_vocab_size() > size:
            raise InputError(f"{path} has more tokens than the model's {size}", "it belongs to another model")
        self._pieces = _pieces(path, self._special, described, size)
        self._describe_added(described)
        config = json_file.read(folder / "tokenizer_config.json", hint="export again: edge export onnx RUN")
        self.bos_text, self.eos_text = (
            json_file.token_text(config.get(key)) for key in ("bos_token", "eos_token")
        )
        self.bos_id: int | None = self._special.token_to_id(self.bos_text) if self.bos_text else None
        eos = self._special.token_to_id(self.eos_text) if self.eos_text else None
        self.ends = frozenset(() if eos is None else (eos,))
        with _reading(path):
            added = self._special.encode("a", add_special_tokens=True).ids
        self.add_bos = self.bos_id is not None and added[:1] == [self.bos_id]

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`, without a begin-of-text token. special: control tokens are parsed."""
        tokenizer = self._special if special else self._plain
        # Unlike `encode` this releases the GIL, so that a long text keeps no other thread waiting.
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _describe_added(self, described: dict[str, Any]) -> None:
        added = list(self._special.get_added_tokens_decoder().values())
        # A token that takes the spaces before it, or only counts as a word, must not be parted from them.
        free = [token for token in added if not token.lstrip and not token.single_word and token.content]
        self.marks = tuple(token.content for token in free)
        self.parsed_always = tuple(token.content for token in free if not token.special)
        self.added = AddedTokens.of((token.content, token.special) for token in added)
        self.strips = any(token.lstrip or token.rstrip for token in added)
        pieces = [*self._pieces, *(token.content.encode("utf-8") for token in added)]
        self.token_bytes = max(map(len, pieces)) * _shrinks(described)

    def decode(self, token: int) -> bytes:
        """The bytes of `token`; none for a control token."""
        return self._pieces[token]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises plain Exception, and its panics are not even that
        raise InputError(
            f"{path} cannot be read: {error}", "export again, with the base's tokenizer"
        ) from error


def _shrinks(described: dict[str, Any]) -> int:
    """How many times shorter a text's bytes may be when they are looked up; 0 where that is not known.

    Composition (NFC) makes a text up to 3.5 times shorter: U+1FBE U+0308 U+0341 (7 bytes) become U+0390 (2).
    """
    model, factor = described.get("model") or {}, 1
    for part in _parts(described.get("normalizer"), "normalizers"):
        pattern = (part.get("pattern") or {}).get("String")
        content = part.get("content")
        if part.get("type") == "NFC":
            factor = 4
        elif part.get("type") == "Replace" and isinstance(pattern, str) and isinstance(content, str):
            if len(content.encode("utf-8")) < len(pattern.encode("utf-8")):
                return 0
        elif part.get("type") != "Prepend":
            return 0
    kinds = _parts(described.get("pre_tokenizer"), "pretokenizers")
    if any(part.get("type") not in _KEEP_ALL or part.get("behavior") == "Removed" for part in kinds):
        return 0
    # Otherwise a token for the unknown may stand for any number of characters.
    by_bytes = any(part.get("type") == "ByteLevel" for part in kinds) or bool(model.get("byte_fallback"))
    return factor if by_bytes else 0


def _pieces(path: Path, tokenizer: Any, described: dict[str, Any], size: int) -> list[bytes]:
    names = {part.get("type") for part in _parts(described.get("decoder"), "decoders")}
    model = described.get("model") or {}
    if "ByteLevel" in names:
        table = byte_table()

        def convert(text: str) -> bytes:
            # An added token may hold characters that stand for no byte.
            if all(character in table for character in text):
                return bytes(table[character] for character in text)
            return text.encode("utf-8")

    elif names & {"ByteFallback", "Metaspace", "Replace"} and model.get("type") in ("BPE", "Unigram"):

        def convert(text: str) -> bytes:
            byte = _BYTE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode("utf-8")

    else:
        raise InputError(
            f"{path}: the bytes of its tokens cannot be told (decoder {', '.join(sorted(map(str, names)))})",
            "serve this model as GGUF: edge export gguf RUN",
        )
    pieces = [b""] * size
    for text, token in tokenizer.get_vocab(with_added_tokens=False).items():
        if token < size:
            pieces[token] = convert(text)
    for token, added in tokenizer.get_added_tokens_decoder().items():
        if token < size:
            pieces[token] = b"" if added.special else added.content.encode("utf-8")
    return pieces


def _parts(described: Any, name: str) -> list[dict[str, Any]]:
    """A decoder, normalizer or pre-tokenizer; or those that a sequence has under `name`."""
    if not isinstance(described, dict):
        return []
    if described.get("type") == "Sequence":
        return [part for part in described.get(name, []) if isinstance(part, dict)]
    return [described]
