"""A conversation with one or two models: what each is asked, and what is read of its answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edge.errors import EdgeError

pytest.importorskip("markdown2")

from edge.ui.conversation import Conversation, html, stream
from tests.support.fake_server import fake_server


def answered(chat: Conversation, question: str, *answers: str) -> None:
    for answer, text in zip(chat.ask(question)["answers"], answers, strict=True):
        answer["content"] = text


def test_each_side_has_its_own_history_until_an_answer_is_chosen(tmp_path: Path) -> None:
    chat = Conversation(tmp_path / "jobs" / "chat.json")
    chat.system, chat.models = "s", ["m", "n"]
    answered(chat, "1", "a", "b")
    assert chat.comparable(0)
    answered(chat, "2", "c", "d")
    said = [[one["content"] for one in chat.messages(1, side)] for side in (0, 1)]
    assert said == [["s", "1", "a", "2"], ["s", "1", "b", "2"]]
    assert not chat.comparable(1)  # they answer different conversations
    chat.turns[0]["chosen"] = 1
    assert chat.messages(1, 0) == chat.messages(1, 1) and chat.comparable(1)
    answered(chat, "3", "e", "e")
    assert not chat.comparable(2)
    chat.models = ["m"]
    answered(chat, "4", "f")
    assert [one["role"] for one in chat.messages(3, 0)][:3] == ["system", "user", "assistant"]
    chat.keep()
    assert Conversation(tmp_path / "jobs" / "chat.json").record() == chat.record()


@pytest.mark.parametrize(
    ("text", "within"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img"),
        ("```html\n<script>alert(1)</script>\n```", "&lt;script"),
        ("[a](javascript:alert(1))", ">a<"),
        ("<style>* {display: none}</style> **b**", "<strong>b</strong>"),
        ("```python\nif a < b:", "codehilite"),
        ("| a |\n|---|\n| <i>1</i> |", "<table>"),
    ],
)
def test_markdown_is_drawn_and_html_is_text(text: str, within: str) -> None:
    made = html(text)
    assert within in made
    assert not any(bad in made for bad in ("<img", "<script", "<style", "<i>", "javascript"))


def read(url: str, model: str = "fake") -> list[tuple[str, str]]:
    async def all_of_it() -> list[tuple[str, str]]:
        asked = [{"role": "user", "content": "hi"}]
        return [part async for part in stream(url, model, asked, temperature=0.0, max_tokens=5)]

    return asyncio.run(all_of_it())


@pytest.mark.slow
def test_an_answer_is_streamed_and_an_error_is_the_servers() -> None:
    with fake_server() as server:
        parts = read(server.url)
        assert len([text for _, text in parts if text]) > 1
        with pytest.raises(EdgeError, match="the model 'other' is not served here"):
            read(server.url, "other")
    with pytest.raises(EdgeError, match="server has gone"):
        read(server.url)
