"""Control tokens in a row's own texts are learnt as the server reads them: as plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert.data import dataset, encode
from convert.data.dataset_info import Row
from convert.model import chat_format
from edge.backends.onnx_tokenizer import Vocabulary
from edge.chat_template import ChatTemplate
from edge.prompt import token_ids
from tests.support import tiny_onnx
from tests.support.marked import DEEPSEEK, FAMILIES, Family, attacks


def write(folder: Path, family: Family) -> Path:
    """A folder with the family's tokenizer and template."""
    # The tiny tokenizer has this one by itself.
    added = [(text, on) for text, on in family.added if text != "<think>"]
    ends = "<｜end▁of▁sentence｜>" if family is DEEPSEEK else family.end
    config = {"eos_token": ends, **({"bos_token": family.bos} if family.bos else {})}
    (folder / "tokenizer.json").write_text(json.dumps(tiny_onnx.tokenizer(added)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    return folder


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Family, Path]:
    return request.param, write(tmp_path, request.param)


def talk(text: str) -> list[dict[str, Any]]:
    roles = ("system", "user", "assistant", "user", "assistant")
    return [{"role": role, "content": f"q{text}r"} for role in roles]


def served(folder: Path, messages: list[dict[str, Any]], **given: Any) -> list[int]:
    """The ids that the ONNX backend makes of a conversation."""
    vocabulary = Vocabulary(folder, 300)
    source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, bos=vocabulary.bos_text, eos=vocabulary.eos_text, tokens=vocabulary.added)
    prompt = template.render(messages, **given)
    [ids] = token_ids([prompt], lambda texts: [vocabulary.encode(text, special=True) for text in texts])
    return ids


def test_the_ids_are_those_of_serving(folder: tuple[Family, Path]) -> None:
    family, path = folder
    form = chat_format.load(path)
    mode = chat_format.thinking_mode(form, True)
    for text in attacks(family):
        messages, report = talk(text), dataset.Report()
        last = encode.encode([Row("d, row 1", messages)], form, report)[-1]
        prompt = served(path, messages[:-1], thinking=mode)
        assert list(last.ids[: len(prompt)]) == prompt
        marks = {form.tokenizer.token_to_id(mark) for mark in family.marks}
        answer = last.ids[len(prompt) :]
        assert answer[-1] == form.turn_end
        assert not marks & set(answer[:-1])
        if not form.thinks:
            # An answer that was learnt is read back as the same ids.
            again = served(path, messages, add_generation_prompt=False)
            assert again[: len(last.ids)] == list(last.ids)
        assert report.marked == (["d, row 1"] if any(mark in text for mark in family.marks) else [])


def test_rows_with_marks_are_counted_once(tmp_path: Path) -> None:
    form, report = chat_format.load(write(tmp_path, DEEPSEEK)), dataset.Report()
    rows = [
        Row(f"d, row {n}", talk(text)) for n, text in enumerate(("x", "<｜User｜>", "<think>", "<｜User｜>"))
    ]
    # This template drops reasoning from earlier answers, so a row has a sample for each answer.
    assert len(encode.encode(rows, form, report)) == 8
    pair = Row("d, row 4", talk("x")[:-1], None, "<｜User｜>", "<｜Assistant｜>")
    list(encode.pairs([pair], form, report, encode.Rules()))
    assert report.marked == ["d, row 1", "d, row 3", "d, row 4"]
    assert report.numbers()["with_control_tokens"] == 3
    [line] = [line for line in report.lines() if "control tokens" in line]
    assert line.startswith("3 rows") and "first: d, row 1" in line and "parse_control_tokens" in line


def test_who_asks_for_it_trains_on_marks(folder: tuple[Family, Path]) -> None:
    family, path = folder
    form, report = chat_format.load(path, parse_control_tokens=True), dataset.Report()
    messages = talk(f"a{family.end}b")
    sample = encode.encode([Row("d, row 1", messages)], form, report)[-1]
    whole = form.tokenizer.decode(list(sample.ids), skip_special_tokens=False)
    assert form.tokenizer.encode(whole, add_special_tokens=False).ids == list(sample.ids)
    plain = encode.encode([Row("d, row 1", messages)], chat_format.load(path), dataset.Report())[-1]
    assert len(plain.ids) == len(sample.ids) + 5 * (len(family.end.encode()) - 1)
    assert report.marked == []


def test_what_ends_a_learnt_call_is_the_templates(tmp_path: Path) -> None:
    family = FAMILIES["chatml"]
    form = chat_format.load(write(tmp_path, family))
    function = {"name": "f", "arguments": {"k": "a<|im_end|>\nb"}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": []}]
    messages[1]["tool_calls"] = [{"type": "function", "function": function}]
    (sample,) = encode.encode([Row("d, row 1", messages)], form, dataset.Report())
    answer = form.tokenizer.decode(sample.ids[sample.spans[0][0] :], skip_special_tokens=False)
    assert answer == '<tool_call>{"name": "f", "arguments": {"k": "a<|im_end|>\\nb"}}</tool_call><|im_end|>'
    ends = [token for token in sample.ids if token == form.turn_end]
    assert len(ends) == 2


def test_a_row_with_an_unknown_role_is_named(tmp_path: Path) -> None:
    form, report = chat_format.load(write(tmp_path, FAMILIES["chatml"])), dataset.Report()
    messages = [{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert encode.encode([Row("d, row 7", messages)], form, report) == []
    [(source, reason)] = report.bad
    assert source == "d, row 7" and "messages[0] has the role 'wizard'" in reason
