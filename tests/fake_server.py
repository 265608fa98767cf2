"""A whole server over the fake backend, in processes of its own, as a user would run it.

As a script: `python -m tests.fake_server SETTINGS_JSON` (keywords of FakeBackend; "keys": API
keys, "max_queue", "drain").
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('the last turn must be yours') }}{% endif %}"
    "<assistant>"
)


class Server:
    """A running server: its base URL and its process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def worker(self) -> int:
        """The engine process's id."""
        import psutil

        [child] = psutil.Process(self.process.pid).children()
        return child.pid

    def get(self, path: str, **given: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **given)

    def post(self, path: str, body: Any, **given: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **given)

    def wait(self, path: str = "/ready", seconds: float = 20.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError):
                if self.get(path).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"{path} did not answer 200 within {seconds} s")

    def until(self, condition: Any, seconds: float = 5.0) -> dict[str, Any]:
        """/info as soon as `condition` of it holds."""
        until = time.monotonic() + seconds
        info: dict[str, Any] = {}
        while time.monotonic() < until:
            info = self.get("/info").json()
            if condition(info):
                return info
            time.sleep(0.02)
        raise AssertionError(f"it did not come to pass: {info}")


@contextlib.contextmanager
def launch(command: list[str], **environment: str) -> Iterator[Server]:
    """Run a server command that prints its URL first; ended and reaped at the end."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = next((word for word in line.split() if word.startswith("http://")), "")
        assert url, f"no URL in {line!r}"
        yield Server(process, url)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def fake_server(**settings: Any) -> Iterator[Server]:
    """A ready server over FakeBackend(**settings)."""
    with launch([sys.executable, "-m", "tests.fake_server", json.dumps(settings)]) as server:
        server.wait()
        yield server


def main() -> int:
    from edge.cli import guarded
    from edge.server.run import bind, serve
    from edge.worker import Load

    settings = json.loads(sys.argv[1])
    keys = settings.pop("keys", [])
    max_queue = settings.pop("max_queue", 64)
    drain = settings.pop("drain", 2.0)
    settings.setdefault("chat_template", TEMPLATE)
    load = Load(kind="fake", settings=settings, max_queue=max_queue)
    return guarded(lambda _: serve(bind("127.0.0.1", 0), load, name="fake", keys=keys, drain=drain), [])


if __name__ == "__main__":
    sys.exit(main())
