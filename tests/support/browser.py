"""A headless Chromium, driven over its debugging protocol."""

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
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), ""
)


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

    def open(self, url: str, ready: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && {ready}")

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=mobile,
        )  # fmt: skip

    def colours(self, scheme: str) -> None:
        """scheme: light or dark, as the system prefers."""
        features = [{"name": "prefers-color-scheme", "value": scheme}] if scheme else []
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def headless(profile: Path) -> Iterator[Browser]:
    """A started browser with one page. profile: an empty folder for its files."""
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
