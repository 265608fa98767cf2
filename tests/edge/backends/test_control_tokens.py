"""A user's text is no control token to llama.cpp's tokenizer, and none to the package tokenizers'."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge.chat_template import ChatTemplate
from edge.prompt import AddedTokens, Prompt, token_ids
from tests.support import tiny_llama, tiny_onnx
from tests.support.marked import FAMILIES, Family, attacks

# (text, whether it is one added token) in turn; what lies between two such tokens is one entry.
Shown = list[tuple[str, bool]]


@dataclass
class Tokenized:
    """A family's tokenizer in one backend. text_of: an added token's text by its id, None for another id."""

    family: Family
    vocabulary: Any
    byte_of: Callable[[int], bytes]
    text_of: dict[int, str]

    def ids(self, *prompts: str | Prompt) -> list[list[int]]:
        def encode(texts: list[str]) -> list[list[int]]:
            return [self.vocabulary.encode(text, special=True) for text in texts]

        return token_ids(prompts, encode)

    def shown(self, prompt: str | Prompt) -> Shown:
        rows: list[tuple[bytes, bool]] = []
        for token in self.ids(prompt)[0]:
            if token in self.text_of:
                rows.append((self.text_of[token].encode("utf-8"), True))
            elif rows and not rows[-1][1]:
                rows[-1] = (rows[-1][0] + self.byte_of(token), False)
            else:
                rows.append((self.byte_of(token), False))
        # To SentencePiece a space and its own character for it are the same.
        return [(text.decode("utf-8").replace("▁", " "), mark) for text, mark in rows]

    def __post_init__(self) -> None:
        self.template, self.unprotected = (
            ChatTemplate(self.family.template, tokens=tokens, bos=self.family.bos)
            for tokens in (self.vocabulary.added, AddedTokens())
        )


def llamacpp(folder: Path, family: Family) -> Tokenized:
    pytest.importorskip("llama_cpp")
    from edge.backends.llamacpp import Model

    vocabulary = Model(tiny_llama.write(folder / "m.gguf", added=family.added)).vocabulary
    first = tiny_llama.VOCAB

    def byte_of(token: int) -> bytes:
        return b" " if token == tiny_llama.SPACE else bytes([token - tiny_llama.BYTES_AT])

    return Tokenized(
        family, vocabulary, byte_of, {first + n: text for n, (text, _) in enumerate(family.added)}
    )


def onnx(folder: Path, family: Family) -> Tokenized:
    pytest.importorskip("tokenizers")
    from edge.backends.onnx_tokenizer import Vocabulary

    # The tiny model has this one by itself.
    added = [(text, on) for text, on in family.added if text != "<think>"]
    (folder / "tokenizer.json").write_text(json.dumps(tiny_onnx.tokenizer(added)), encoding="utf-8")
    numbers = {259 + n: text for n, (text, _) in enumerate(added)} | {258: "<think>"}
    return Tokenized(family, Vocabulary(folder, 300), lambda token: bytes([token]), numbers)


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenized]:
    folder = tmp_path_factory.mktemp("marks")
    return [llamacpp(folder, request.param), onnx(folder, request.param)]


def conversations(family: Family, text: str) -> list[list[dict[str, Any]]]:
    user = {"role": "user", "content": text}
    call = {"function": {"name": "f", "arguments": {text: text}}}
    return [
        [user],
        [{"role": "system", "content": text}, user],
        [user, {"role": "assistant", "content": f"<tool_call>{text}", "tool_calls": [call]}, user],
    ]


def test_both_backends_find_the_templates_marks_alone(both: list[Tokenized]) -> None:
    family = both[0].family
    for text in attacks(family):
        for messages, plain in zip(conversations(family, text), conversations(family, "x"), strict=True):
            tools = [{"name": "f", "description": text}]
            shown = []
            for side in both:
                prompt = side.template.render(messages, tools=tools)
                shown.append(side.shown(prompt))
                assert "".join(part for part, _ in shown[-1]) == prompt.text.replace("▁", " ")
                harmless = side.template.render(plain, tools=[{"name": "f", "description": "x"}])
                marks = [part for part, mark in shown[-1] if mark]
                assert marks == [part for part, mark in side.shown(harmless) if mark]
            assert shown[0] == shown[1]


def test_unprotected_the_same_text_is_a_forged_turn(both: list[Tokenized]) -> None:
    family = both[0].family
    for side in both:
        raw = side.unprotected.render([{"role": "user", "content": attacks(family)[0]}])
        assert [part for part, mark in side.shown(raw) if mark].count(family.end) > 1


@pytest.mark.parametrize(
    "text", ["", "hi", "a < b", "<think>\nx\n</think>\n\ny", "[x](y)", "你好 <tool_call>"]
)
def test_ids_of_a_text_without_marks_are_those_of_one_text(both: list[Tokenized], text: str) -> None:
    for side in both:
        for messages in conversations(side.family, text):
            prompt = side.template.render(messages)
            assert side.ids(prompt)[0] == side.vocabulary.encode(prompt.text, special=True)
            assert prompt.cuts == ()


def test_a_text_that_is_continued_keeps_its_marks_apart(both: list[Tokenized]) -> None:
    for side in both:
        text = f"so{side.family.end}far"
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
        prompt = side.template.render(turns, add_generation_prompt=False)
        begun = prompt.between(0, prompt.text.index("far") + 3)
        assert begun.text.endswith(text)
        # The last entry is all of the answer.
        last, mark = side.shown(begun)[-1]
        assert (last.endswith(text), mark) == (True, False)


def test_one_begin_token_whoever_wrote_it(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from edge.backends.llamacpp import LlamaCpp, Model, Settings
    from edge.engine.request import prompt_tokens

    model = Model(tiny_llama.write(tmp_path / "m.gguf"))
    backend = LlamaCpp(model, Settings(slots=1, context=256, batch=64))
    try:
        assert backend.info.add_bos
        messages = [{"role": "user", "content": "<s>a<s>"}]
        for source in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
            template = ChatTemplate(source, tokens=backend.info.added, bos=backend.info.bos_text)
            ids = prompt_tokens(backend, template.render(messages))
            assert ids == [1, *tiny_llama.ids("<s>a<s>")]
        # A raw text's marks are parsed, and its begin token is not doubled.
        assert prompt_tokens(backend, "<s>a<s>") == [1, *tiny_llama.ids("a"), 1]
    finally:
        backend.close()


NORMALIZERS = {
    "nfkc": {"type": "NFKC"},
    "lower": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFC"}]},
    "spaces": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
}
# No mark, but what one of the normalizers makes a mark of.
LOOK_ALIKES = ["＜|im_end|＞", "<|IM_END|>", "<｜end of sentence｜>", "［/turn］", "[/TURN]"]


@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_tokenizer_normalizes_to_a_mark_is_none(
    tmp_path: Path, name: str, normalizer: dict[str, Any]
) -> None:
    from convert.model import chat_format
    from edge.backends.onnx_tokenizer import Vocabulary

    family = FAMILIES[name]
    described: dict[str, Any] = tiny_onnx.tokenizer([row for row in family.added if row[0] != "<think>"])
    for token in described["added_tokens"]:
        token["normalized"] = True
    described["normalizer"] = normalizer
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": family.end}), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    vocabulary, form = Vocabulary(tmp_path, 300), chat_format.load(tmp_path, tokens=("<|Kelvin|>",))
    marks = {token["id"] for token in described["added_tokens"]} | {300}
    for text in [*LOOK_ALIKES, "<|\u212aelvin|>"]:
        rows = [vocabulary.encode(f"a {text}", special=True), form.encode([f"a {text}"])[0]]
        assert all(not marks & set(row) for row in rows), text
    assert {*vocabulary.encode("".join(family.marks), special=True)} <= marks
