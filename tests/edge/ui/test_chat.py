"""Chat, choices and measuring in a real browser; what was said and chosen is read from the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convert.pull import embedded_gguf, pull
from edge.jobs import job as jobs
from tests.support.browser import CHROMIUM
from tests.support.page import Page, until

pytest.importorskip("nicegui")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")]

FIELD = "document.querySelector('textarea[aria-label=Question]')"


@pytest.fixture
def chat(page: Page) -> Page:
    """The page beside a model that llama.cpp knows, with short answers."""
    pull(str(embedded_gguf()), out=page.folder / "models" / "small")
    (page.folder / "jobs").mkdir()
    settings = {"models": ["models/small", "models/small"], "max_tokens": 12, "temperature": 1.5}
    (page.folder / "jobs" / "chat.json").write_text(json.dumps(settings), encoding="utf-8")
    page.start()
    page.open("Chat")
    return page


def said(page: Page) -> list[dict[str, object]]:
    return list(json.loads((page.folder / "jobs" / "chat.json").read_text("utf-8"))["turns"])


def ask(page: Page, question: str) -> None:
    page.browser.until(f"{FIELD} !== null")
    page.browser.ask(f"{FIELD}.focus()")
    page.browser.type(question)
    page.browser.press("Enter", 13)


def test_two_answers_a_choice_and_a_training_on_it(chat: Page) -> None:
    page, browser = chat, chat.browser
    ask(page, "Say <b>hello</b>.")
    page.sees("A is better", 60)
    [server] = jobs.jobs(page.folder / "jobs")  # one for both
    assert server.argv[:5] == ["edge", "serve", "models/small", "--name", "models/small"]
    [turn] = said(page)
    first, second = (answer["content"] for answer in turn["answers"])  # type: ignore[attr-defined]
    assert turn["question"] == "Say <b>hello</b>." and first and second
    assert browser.ask("document.querySelectorAll('.edge-question b').length") == 0
    page.press("B is better")
    file = page.folder / "data" / "preferences_dpo.jsonl"
    page.sees("✓")
    [row] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert row["messages"] == [{"role": "user", "content": "Say <b>hello</b>."}]
    assert (row["chosen"]["content"], row["rejected"]["content"]) == (second, first)
    page.browser.until("document.querySelector('button[aria-label=\"A bad answer\"]') !== null")
    browser.ask("document.querySelector('button[aria-label=\"A bad answer\"]').click()")
    page.sees("Train KTO on thumbs (1)")
    [flag] = [
        json.loads(line)
        for line in (page.folder / "data" / "preferences_kto.jsonl").read_text("utf-8").splitlines()
    ]
    assert flag["messages"][-1]["content"] == first and flag["kto_tag"] is False

    # It goes on from the answer that was chosen.
    ask(page, "And now?")
    until(lambda: said(page)[-1]["question"] == "And now?" and said(page)[-1]["answers"][1]["content"])  # type: ignore[index]
    page.sees("Regenerate", 60)
    page.press("Train DPO on choices (1)")
    browser.until(f"{page.field('Base model')}?.value === 'models/small'")
    form = json.loads((page.folder / "jobs" / "form.json").read_text("utf-8"))
    assert (form["stage"], form["dataset"]) == ("dpo", ["preferences_dpo"])
    assert form["model_name_or_path"] == "models/small" and "output_dir" not in form
    info = json.loads((page.folder / "data" / "dataset_info.json").read_text("utf-8"))
    assert list(info) == ["d", "preferences_dpo", "preferences_kto"]

    page.open("Chat")
    page.sees("And now?")
    page.press("Unload")
    until(lambda: server.state in ("done", "stopped"))
    page.press("New chat")
    until(lambda: said(page) == [])
    assert browser.errors == []


@pytest.mark.matrix
def test_an_answer_is_stopped_edited_saved_and_a_full_machine_is_named(chat: Page, tmp_path: Path) -> None:
    page, browser = chat, chat.browser
    path = page.folder / "jobs" / "chat.json"
    path.write_text(json.dumps({"models": ["models/small"], "max_tokens": 2000}), encoding="utf-8")
    page.open("Chat")
    ask(page, "Count to one thousand, slowly.")
    browser.until("document.querySelector('.edge-markdown')?.innerText.length > 20", 60)
    browser.ask("document.querySelector('button[aria-label=Stop]').click()")
    page.sees("Regenerate")
    [turn] = said(page)
    assert len(turn["answers"][0]["content"]) > 20  # type: ignore[index]

    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "max_tokens": 4}), encoding="utf-8")
    page.open("Chat")
    browser.until("document.querySelector('button[aria-label=Edit]') !== null")
    browser.ask("document.querySelector('button[aria-label=Edit]').click()")
    browser.until("document.querySelector('.q-dialog textarea') !== null")
    browser.ask("document.querySelector('.q-dialog textarea').select()")
    browser.type("Say hi.")
    page.press("Ask again")
    until(lambda: [turn["question"] for turn in said(page)] == ["Say hi."])
    until(lambda: said(page)[0]["answers"][0]["content"])  # type: ignore[index]
    page.sees("Regenerate")

    # What does not fit is said before it starts, with what is loaded.
    form = {"model_name_or_path": "models/toy", "dataset": ["d"], "output_dir": "runs/large",
            "lora_rank": 10**8}  # fmt: skip
    (page.folder / "jobs" / "form.json").write_text(json.dumps(form), encoding="utf-8")
    page.open("Train")
    page.press("Start training")
    page.sees("training needs about", 60)
    page.sees("models/small · ")
    page.press("Unload")
    until(lambda: jobs.jobs(page.folder / "jobs")[0].state in ("done", "stopped"))
    assert len(jobs.jobs(page.folder / "jobs")) == 1

    page.open("Measure")
    page.sees("This machine")
    browser.ask(
        "[...document.querySelectorAll('.q-item')].find(e => e.innerText.includes('machine')).click()"
    )
    page.sees("llama.cpp", 60)
    page.open("Chat")
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.press("Save as JSON")
    until(lambda: list(tmp_path.glob("chat-*.json")))
    [saved] = tmp_path.glob("chat-*.json")
    assert json.loads(saved.read_text("utf-8"))["turns"] == said(page)
    assert browser.errors == []


def test_a_file_is_answered(chat: Page, tmp_path: Path) -> None:
    page = chat
    (tmp_path / "问题.txt").write_text("Who are you?\nSay <b>hi</b>.\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"answer": "a"}\n', encoding="utf-8")
    page.upload(tmp_path / "bad.jsonl")
    page.sees("line 1 asks nothing")
    assert jobs.jobs(page.folder / "jobs") == []
    page.open("Chat")
    page.upload(tmp_path / "问题.txt")
    page.sees("Download the answers", 60)
    [job] = jobs.jobs(page.folder / "jobs")  # one model on both sides
    assert job.argv[:4] == ["edge", "predict", "models/small", "answers/问题-1/问题.txt"]
    file = page.folder / "answers" / "问题-1" / "models-small" / "generated_predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert ["Who are you?" in line["prompt"] and bool(line["predict"]) for line in lines] == [True, False]
    assert "Say <b>hi</b>." in lines[1]["prompt"] and lines[1]["predict"]
    assert page.browser.ask("document.querySelectorAll('td b').length") == 0
    page.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "got"))
    page.press("Download the answers")
    got = tmp_path / "got" / file.name
    until(got.is_file)
    assert got.read_bytes() == file.read_bytes()
    assert page.browser.errors == []
