"""The process that renders: what ends it, what follows, and that it ends with the one that asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

import psutil
import pytest

from edge.errors import InputError, RequestError
from edge.rendering import client
from edge.rendering.client import Renderer
from edge.rendering.protocol import read_frame
from tests.support.fake_server import ROOT

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# Within the sandbox's bounds, at four bytes a character.
HUNGRY = (
    "{% set ns = namespace(l=[]) %}{% for i in range(15) %}"
    "{% set ns.l = ns.l + ['\U0001f600' * 8000000] %}{% endfor %}"
)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    process = Renderer()
    yield process
    process.close()


def test_texts_and_values_cross_the_border(renderer: Renderer) -> None:
    context = {"a": "好\n\U0001f600\ud800", "b": [1, 2.5, None, True, 10**30], "c": {"k": "<"}}
    want = context["a"] + str(context["b"]) + "<"  # type: ignore[operator]
    assert renderer.render("{{ a }}{{ b }}{{ c.k }}", context) == want
    assert renderer.variables("{{ a }}{{ b }}") == {"a", "b"}


def test_a_template_that_is_not_valid_is_named_by_its_file(renderer: Renderer) -> None:
    with pytest.raises(InputError, match=r"\(m\.gguf\) is not valid"):
        renderer.variables("{% for %}", "m.gguf")
    # Twenty blocks in one another are too many for Python.
    deep = "{% for a in b %}" * 25 + "{% endfor %}" * 25
    with pytest.raises(InputError, match="not valid"):
        renderer.variables(deep)


def test_values_that_are_nested_too_deep_are_refused(renderer: Renderer) -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(RequestError, match="what JSON cannot say"):
        renderer.render("{{ a }}", {"a": value})
    assert renderer.render("{{ a }}", {"a": 1}) == "1"


def test_a_death_between_two_renderings_is_not_noticed(renderer: Renderer) -> None:
    renderer.start()
    assert renderer.pid is not None
    os.kill(renderer.pid, KILL)
    psutil.wait_procs([psutil.Process(renderer.pid)] if psutil.pid_exists(renderer.pid) else [], timeout=5)
    assert renderer.render("{{ a }}", {"a": 1}) == "1"


@pytest.mark.slow
def test_a_rendering_without_end_ends_after_a_second_and_another_process_follows(renderer: Renderer) -> None:
    renderer.render("x", {})
    pid, began = renderer.pid, time.monotonic()
    with pytest.raises(RequestError, match=r"\(m\.gguf\) takes more than 1 s") as caught:
        renderer.render(ENDLESS, {}, "m.gguf")
    assert (caught.value.status, caught.value.code) == (400, "prompt_too_long")
    assert 0.9 < time.monotonic() - began < 5.0
    assert renderer.render("{{ a }}", {"a": 1}) == "1"
    assert renderer.pid != pid


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="no bound on memory")
def test_memory_is_bounded(renderer: Renderer) -> None:
    with pytest.raises(RequestError, match="512 MiB") as caught:
        renderer.render(HUNGRY, {})
    assert caught.value.status == 400
    assert renderer.render("{{ a }}", {"a": 1}) == "1"


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_death_in_a_rendering_is_the_templates_where_it_comes_twice(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    renderer.render("x", {})
    died: list[int | None] = []

    def read(stream: IO[bytes]) -> Any:
        reply = read_frame(stream)
        if "text" not in reply or len(died) == deaths:
            return reply
        died.append(renderer.pid)
        return None

    with monkeypatch.context() as patch:
        patch.setattr(client, "read_frame", read)
        if deaths == 1:
            assert renderer.render("x", {}) == "x"
        else:
            with pytest.raises(RequestError, match="ended the process that renders it") as caught:
                renderer.render("x", {})
            assert (caught.value.status, caught.value.code) == (400, "prompt_too_long")
    assert len({*died}) == deaths and renderer.pid not in died
    assert renderer.render("x", {}) == "x"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("size", [1, 10**6], ids=["reading", "writing"])
def test_a_process_that_is_stopped_is_replaced(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    renderer.render("x", {})
    assert renderer.pid is not None
    # So that a fault fails the test instead of holding it up.
    rescue = threading.Timer(4.0, os.kill, (renderer.pid, KILL))
    os.kill(renderer.pid, signal.SIGSTOP)
    rescue.start()
    began, ended_after, limits = time.monotonic(), client._ended_after, iter([0.2])
    monkeypatch.setattr(
        client, "_ended_after", lambda seconds, process: ended_after(next(limits, seconds), process)
    )
    assert renderer.render("{{ a }}", {"a": "x" * size}) == "x" * size
    rescue.cancel()
    assert time.monotonic() - began < 3.0


def test_an_interrupted_rendering_does_not_answer_the_next(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    renderer.render("x", {})
    with monkeypatch.context() as patch:
        patch.setattr(client, "read_frame", interrupt)
        with pytest.raises(KeyboardInterrupt):
            renderer.render("old", {})
    assert renderer.render("new", {}) == "new"


def test_a_system_without_a_bound_on_memory_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replies = iter([{"limited": False}, {"text": "x"}, {"limited": False}, {"text": "x"}])
    monkeypatch.setattr(client, "read_frame", lambda _: next(replies))
    renderer = Renderer()
    for _ in range(2):
        assert renderer.render("x", {}) == "x"
        renderer.close()
    assert caplog.text.count("cannot bound the memory") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("source", ["x", ENDLESS], ids=["idle", "at-work"])
def test_it_ends_when_the_process_that_asks_is_killed(source: str) -> None:
    script = (
        "import sys; from edge.rendering.client import RENDERER\n"
        "RENDERER.render('x', {}); print(RENDERER.pid, flush=True)\n"
        "RENDERER.render(sys.argv[1], {}); sys.stdin.read()"
    )
    asks = subprocess.Popen(
        [sys.executable, "-c", script, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    with asks:
        assert asks.stdout is not None
        child = psutil.Process(int(asks.stdout.readline()))
        time.sleep(0.2)
        asks.kill()
    assert not psutil.wait_procs([child], timeout=5)[1]


@pytest.mark.slow
def test_it_ends_in_silence_when_nobody_reads_it() -> None:
    child = [sys.executable, "-m", "edge.rendering.child"]
    with subprocess.Popen(
        child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.wait(30), process.stderr.read()) == (0, b"")
