"""`edge ui` and a browser that looks at it, as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.browser import Browser

ROOT = Path(__file__).parents[2]
READY = "window.did_handshake && document.querySelector('.edge-page .q-tab-panel > *') !== null"


class Page:
    """`edge ui` in a folder of its own, and a browser that looks at it."""

    def __init__(self, folder: Path, browser: Browser) -> None:
        self.folder, self.browser = folder, browser
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self, *options: str, **environment: str) -> str:
        """Start the server; what it says."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge.cli", "ui", "--port", "0", *options],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        self.url = said.split("/  (")[0]
        return said

    def kill(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.communicate(timeout=20)
            self.process = None

    def open(self, tab: str, language: str = "en") -> None:
        self.browser.open(f"{self.url}/{language}?tab={tab}", READY)

    def press(self, text: str) -> None:
        """Click the visible button that reads `text`."""
        reads = f"e.getClientRects().length && e.innerText.endsWith({json.dumps(text)})"
        found = f"[...document.querySelectorAll('button')].find(e => {reads})"
        self.browser.until(f"{found} !== undefined")
        self.browser.ask(f"{found}.click()")

    def tab(self, name: str) -> None:
        """Go to a tab by its name, until it alone is shown."""
        reads = f"e.querySelector('.q-tab__label').innerText === {json.dumps(name)}"
        self.browser.ask(f"[...document.querySelectorAll('.q-tab')].find(e => {reads}).click()")
        shown = "document.querySelectorAll('.q-tab-panel').length === 1"
        active = f"document.querySelector('.q-tab--active')?.innerText.includes({json.dumps(name)})"
        content = "document.querySelector('.q-tab-panel > .full-width > *') !== null"
        self.browser.until(f"{shown} && {active} && {content}")

    def select(self, label: str, option: str) -> None:
        """Take an option of a list that has no field to type into."""
        self.browser.until(f"{self.field(label)} !== null")
        self.browser.ask(f"{self.field(label)}.focus()")
        self.browser.press("ArrowDown", 40)
        reads = f"e.innerText === {json.dumps(option)}"
        item = f"[...document.querySelectorAll('.q-menu .q-item')].find(e => {reads})"
        self.browser.until(f"{item} !== undefined")
        self.browser.ask(f"{item}.click()")

    def unfold(self, title: str) -> None:
        """Open the folded part with that title."""
        reads = f"e.innerText.includes({json.dumps(title)})"
        self.browser.ask(
            f"[...document.querySelectorAll('.q-expansion-item .q-item')].find(e => {reads}).click()"
        )

    def field(self, label: str) -> str:
        """The input with that label, or one that ends in it, as an expression."""
        names = ",".join(
            f"input[aria-label{end}={json.dumps(text)}]" for end, text in (("", label), ("$", f" {label}"))
        )
        return f"document.querySelector('{names}')"

    def type(self, label: str, text: str) -> None:
        self.browser.until(f"{self.field(label)}?.getClientRects().length > 0")
        self.browser.ask(f"{self.field(label)}.focus(), {self.field(label)}.select()")
        self.browser.type(text)

    def choose(self, label: str, option: str) -> None:
        """Take an option of a select, as a user does who types a part of it."""
        self.type(label, option)
        self.browser.press("Enter", 13)
        self.browser.press("Escape", 27)

    def upload(self, *paths: Path) -> None:
        """Choose files for the first upload of the tab."""
        root = self.browser.call("DOM.getDocument")["root"]["nodeId"]
        self.browser.until("document.querySelector('input[type=file]') !== null")
        found = self.browser.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.browser.call("DOM.setFileInputFiles", nodeId=found, files=[str(path) for path in paths])

    def sees(self, text: str, seconds: float = 20) -> None:
        self.browser.until(f"document.body?.innerText.includes({json.dumps(text)})", seconds)


def until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
