"""The chat page in a real browser: headless Chromium, driven over its debugging protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_server import Server, fake_server

CHROMIUM = next(
    (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), ""
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")]

THINKER = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"


class Browser:
    """One page of a Chromium: just enough of its protocol, over a WebSocket by hand (RFC 6455)."""

    def __init__(self, address: str) -> None:
        host, _, path = address.removeprefix("ws://").partition("/")
        name, _, port = host.partition(":")
        self._socket = socket.create_connection((name, int(port)), 30)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self._socket.sendall(
            f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._file = self._socket.makefile("rb")
        while self._file.readline().strip():
            pass
        self._numbers = itertools.count(1)
        self.errors: list[str] = []

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _send(self, text: str) -> None:
        data, mask = text.encode(), secrets.token_bytes(4)
        size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        self._socket.sendall(b"\x81" + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))

    def _receive(self) -> dict[str, Any]:
        parts, final = b"", False
        while not final:
            first, second = self._file.read(2)
            final, length = bool(first & 0x80), second & 0x7F
            if length == 126:
                [length] = struct.unpack(">H", self._file.read(2))
            elif length == 127:
                [length] = struct.unpack(">Q", self._file.read(8))
            parts += self._file.read(length)
        message: dict[str, Any] = json.loads(parts)
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = self._receive()
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def ask(self, expression: str) -> Any:
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.ask(expression):
                return
            time.sleep(0.05)
        raise AssertionError(f"{expression} did not come true: {self.ask('document.body.innerText')}")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, **extra: Any) -> None:
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, **extra}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(
            "document.readyState === 'complete' && document.getElementById('about').textContent !== ''"
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("profile")
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    process = subprocess.Popen(
        [
            CHROMIUM, "--headless=new", *root, "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", "--lang=en-US", "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    page: Browser | None = None
    try:
        port = profile / "DevToolsActivePort"
        end = time.monotonic() + 30
        while not (port.is_file() and port.read_text().strip()) and time.monotonic() < end:
            time.sleep(0.1)
        number = port.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/json", timeout=10) as answer:
            [target] = [row for row in json.load(answer) if row["type"] == "page"]
        page = Browser(target["webSocketDebuggerUrl"])
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        if page is not None:
            with contextlib.suppress(OSError):
                page.close()
        process.terminate()
        process.wait(15)


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
    browser.open(server.url + "/")
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
    browser.open(server.url + "/")
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
    browser.open(server.url + "/")
    assert browser.ask("document.getElementById('send').textContent") == "Send"
    browser.ask("document.getElementById('language').click()")
    assert browser.ask("document.getElementById('send').textContent") == "发送"
    assert browser.ask("document.documentElement.lang") == "zh-CN"
    browser.open(server.url + "/")
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
    browser.open(server.url + "/")
    browser.type("x" * 5000)
    browser.press("Enter", 13)
    browser.until("document.querySelector('.note.error') !== null")
    assert "4096" in browser.ask("document.querySelector('.note.error').textContent")
    browser.type("hello")
    browser.press("Enter", 13)
    browser.until("document.querySelectorAll('article.assistant .note')[1]?.textContent.includes('tokens/s')")
