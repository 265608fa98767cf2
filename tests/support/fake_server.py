"""A whole server over the fake backend, in processes of its own, as a user would run it.

As a script: `python -m tests.support.fake_server SETTINGS_JSON`. Settings are keywords of FakeBackend, and
"keys", "admin_keys", "origins", "max_queue", "drain", "budget", "keep_alive", "accept_any",
"max_connections"; "models": settings by name, in place of one "fake"; "bytes": the memory that a model
claims; "file": a JSON file that is read at each load; "file_handles": how many the process may have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx

# Plain HTTP, and a connection for each request: a client that reads certificates takes 30 ms to make.
CLIENT = httpx.Client(verify=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
_SERVING = ("budget", "keep_alive", "drain", "accept_any", "max_connections")
ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('the last turn must be yours') }}{% endif %}"
    "<assistant>"
)


def user(text: Any = "hi") -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def error(response: httpx.Response) -> dict[str, Any]:
    """The error object, of OpenAI's form."""
    body: dict[str, Any] = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def events(response: httpx.Response) -> list[Any]:
    """The server-sent events of a stream that ends with [DONE]."""
    rows = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert rows[-1] == "[DONE]"
    return [json.loads(row) for row in rows[:-1]]


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The server-sent events of a stream whose events have the name of their type."""
    rows = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        row = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {row['type']}"
        rows.append(row)
    return rows


class Server:
    """A running server: its base URL and its process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def worker(self) -> int:
        """The engine process's id."""
        return self.child("edge.engine.worker")

    def child(self, module: str) -> int:
        """The id of the server's process that runs `module`."""
        import psutil

        children = psutil.Process(self.process.pid).children()
        [child] = [child for child in children if module in child.cmdline()]
        return child.pid

    def get(self, path: str, **given: Any) -> httpx.Response:
        return CLIENT.get(self.url + path, **given)

    def post(self, path: str, body: Any, **given: Any) -> httpx.Response:
        return CLIENT.post(self.url + path, json=body, **given)

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
def launch(command: list[str], *, log: IO[str] | None = None, **environment: str) -> Iterator[Server]:
    """Run a server command that prints its URL first; ended and reaped at the end. log: takes its stderr."""
    process = subprocess.Popen(
        command,
        stderr=log,
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
def fake_server(*, log: IO[str] | None = None, **settings: Any) -> Iterator[Server]:
    """A ready server over FakeBackend(**settings). log: takes what it writes to stderr."""
    command = [sys.executable, "-m", "tests.support.fake_server", json.dumps(settings)]
    with launch(command, log=log) as server:
        server.wait()
        yield server


def main() -> int:
    from edge.console import guarded
    from edge.engine.worker import Load
    from edge.server.access import Access
    from edge.server.cli import bind
    from edge.server.launch import serve
    from edge.server.model_registry import Planned

    settings = json.loads(sys.argv[1])
    access = Access(*(tuple(settings.pop(name, [])) for name in ("keys", "admin_keys", "origins")))
    serving = {name: settings.pop(name) for name in _SERVING if name in settings}
    if (handles := settings.pop("file_handles", None)) is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles))
    max_queue, cache_ram = settings.pop("max_queue", 64), settings.pop("cache_ram", 0)

    def planned(given: dict[str, Any]) -> Planned:
        given = dict(given)
        if (file := given.pop("file", None)) is not None:
            given |= json.loads(Path(file).read_text(encoding="utf-8"))
        size, digest = given.pop("bytes", 0), given.pop("digest", "")
        given.setdefault("chat_template", TEMPLATE)
        load = Load(kind="fake", settings=given, max_queue=max_queue, cache_ram=cache_ram)
        return Planned(load, FakeArtefact(digest) if digest else None, size)  # type: ignore[arg-type]

    models = settings.pop("models", {"fake": settings})
    plans = {name: functools.partial(planned, given) for name, given in models.items()}
    return guarded(
        lambda _: serve(bind("127.0.0.1", 0), plans, access=access, **{"drain": 2.0, **serving}), []
    )


@dataclasses.dataclass
class FakeArtefact:
    """What the server reads of an artefact."""

    digest: str
    thinking: str | None = None
    header: None = None


if __name__ == "__main__":
    sys.exit(main())
