"""The chat page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.browser import CHROMIUM, Browser, headless
from tests.support.fake_server import Server, fake_server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")]

THINKER = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
READY = "document.getElementById('about').textContent !== ''"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with headless(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    script = [["count", "1 2 3 " * 400]]
    models = {
        "conch": {
            "reply": "hm, </think>\n\n**Nothing.** <b>你好</b>\n```py\nx = 1\n```\n",
            "script": script,
            "chat_template": THINKER,
            "context": 4096,
            "step_s": 0.01,
        },
        "other": {"reply": "I am the other."},
    }
    with fake_server(models=models) as started:
        yield started


def test_a_conversation_by_keyboard_alone(browser: Browser, server: Server) -> None:
    browser.open(server.url + "/", READY)
    assert browser.ask("document.activeElement.id") == "ask"
    browser.type("hello")
    browser.press("Enter", 13)
    browser.until("document.querySelector('article.assistant .note')?.textContent.includes('tokens/s')")
    assert browser.ask("document.querySelector('article.user .text').textContent") == "hello"
    # The thought is folded away; markup of the model's is text; fenced code has a box.
    assert browser.ask("document.querySelector('article.assistant details').open") is False
    assert browser.ask("document.querySelector('article.assistant details .text').textContent") == "hm,"
    assert browser.ask("document.querySelector('article.assistant b')") is None
    answer = browser.ask("document.querySelector('article.assistant > .text').textContent")
    assert answer.startswith("**Nothing.** <b>你好</b>")
    assert browser.ask("document.querySelector('article.assistant pre').textContent") == "x = 1\n"
    assert browser.ask("document.activeElement.id") == "ask"
    assert browser.errors == []


def test_escape_stops_the_work_and_the_conversation_goes_on(browser: Browser, server: Server) -> None:
    browser.open(server.url + "/", READY)
    browser.type("count")
    browser.press("Enter", 13)
    browser.until("document.querySelector('article.assistant details .text').textContent.length > 20")
    assert browser.ask("document.getElementById('stop').getClientRects().length") == 1
    browser.press("Escape", 27)
    browser.until("document.querySelector('article.assistant .note').textContent === 'stopped'")
    server.until(lambda info: info["busy_slots"] == 0)
    assert browser.ask("document.getElementById('send').getClientRects().length") == 1
    browser.ask("document.getElementById('model').value = 'other'")
    browser.type("who?")
    browser.press("Enter", 13)
    browser.until("document.querySelectorAll('article.assistant .note')[1]?.textContent.includes('tokens/s')")
    text = browser.ask(
        "document.querySelectorAll('article.assistant')[1].querySelector(':scope > .text').textContent"
    )
    assert text == "I am the other."


def test_two_languages_two_themes_and_a_narrow_screen(browser: Browser, server: Server) -> None:
    browser.open(server.url + "/", READY)
    assert browser.ask("document.getElementById('send').textContent") == "Send"
    browser.ask("document.getElementById('language').click()")
    assert browser.ask("document.getElementById('send').textContent") == "发送"
    assert browser.ask("document.documentElement.lang") == "zh-CN"
    browser.open(server.url + "/", READY)
    assert browser.ask("document.getElementById('fresh').textContent") == "新对话"
    browser.ask("document.getElementById('language').click()")
    background = "getComputedStyle(document.body).backgroundColor"
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    light = browser.ask(background)
    browser.call("Emulation.setEmulatedMedia", features=scheme)
    dark = browser.ask(background)
    assert dark != light
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask(background) == light
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=340, height=640, deviceScaleFactor=1, mobile=True
    )
    assert browser.ask("document.documentElement.scrollWidth <= 340") is True
    browser.call("Emulation.clearDeviceMetricsOverride")
    browser.call("Emulation.setEmulatedMedia", features=[])
    # Everything that can be used has a name for those who cannot see it.
    unnamed = browser.ask(
        "[...document.querySelectorAll('button, textarea, input, select')].filter(e => !e.textContent.trim() "
        "&& !e.labels?.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


def test_an_error_is_shown_and_the_message_can_be_sent_again(browser: Browser, server: Server) -> None:
    browser.open(server.url + "/", READY)
    browser.type("x" * 5000)
    browser.press("Enter", 13)
    browser.until("document.querySelector('.note.error') !== null")
    assert "4096" in browser.ask("document.querySelector('.note.error').textContent")
    browser.type("hello")
    browser.press("Enter", 13)
    browser.until("document.querySelectorAll('article.assistant .note')[1]?.textContent.includes('tokens/s')")
