"""The HTTP process's side: requests reach the worker, and whatever ends it, everybody gets an answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from edge.engine import client
from edge.engine import protocol as msg
from edge.engine.client import EngineProcess, Stream
from edge.engine.sampling import Params
from edge.engine.worker import Load
from edge.errors import EdgeError, RequestError

GREEDY = Params(temperature=0.0)
# Ends a process at once. Windows has only the one.
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


@contextlib.asynccontextmanager
async def engine(
    on_done: Callable[[msg.Done], None] | None = None, **settings: Any
) -> AsyncIterator[EngineProcess]:
    process = EngineProcess(Load("fake", settings=settings), on_done)
    process.start()
    try:
        await process.wait_ready()
        yield process
    finally:
        await process.stop(2.0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 30.0)

    asyncio.run(bounded())


async def read(stream: Stream, begun: asyncio.Event | None = None) -> tuple[str, msg.Done]:
    """A request's whole text and its end. begun: set with the first text."""
    text, done = "", None
    async for event in stream:
        if begun is not None:
            begun.set()
        text += event.text
        if isinstance(event, msg.Done):
            done = event
    assert done is not None
    return text, done


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSES_S", (0.05,))


@pytest.mark.slow
def test_requests_of_every_kind_are_answered() -> None:
    ended: list[msg.Done] = []

    async def test() -> None:
        async with engine(ended.append, reply="hello", slots=2) as process:
            assert process.state == "ready" and process.ready is not None and process.ready.slots == 2
            assert process.load_s >= 0 and process.pid is not None
            answers = await asyncio.gather(*(read(process.submit(f"{i}", GREEDY)) for i in range(5)))
            assert [text for text, _ in answers] == ["hello"] * 5
            assert [done.reason for _, done in answers] == ["stop"] * 5
            assert (await process.encode("ab", special=False)).ids == [97, 98]
            assert (await process.decode([99])).pieces == [b"c"]
            assert (await process.embed("ab")).tokens == 2
            with pytest.raises(RequestError, match="999"):
                await process.decode([999])
            assert not process.busy
            await until(lambda: process.stats is not None and process.stats.running == 0)

    run(test)
    assert len(ended) == 5


def test_a_refused_request_raises_what_the_engine_said() -> None:
    async def test() -> None:
        async with engine(context=32) as process:
            with pytest.raises(RequestError, match="40 tokens") as caught:
                await read(process.submit("x" * 40, GREEDY))
            assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
            # A text that is none leaves nothing behind.
            with pytest.raises(UnicodeEncodeError):
                process.submit("\ud800", GREEDY)
            assert not process.busy

    run(test)


@pytest.mark.slow
def test_a_stream_that_is_left_or_cancelled_frees_its_slot() -> None:
    async def test() -> None:
        async with engine(reply="z" * 3000, context=4096, step_s=0.005, slots=1) as process:
            left = process.submit("x", GREEDY)
            events = aiter(left)
            await anext(events)
            await events.aclose()  # type: ignore[attr-defined]
            cancelled = process.submit("y", GREEDY)
            reading = asyncio.create_task(read(cancelled))
            await until(lambda: process.stats is not None and process.stats.running == 1)
            cancelled.cancel()
            with pytest.raises(RequestError) as caught:
                await reading
            assert caught.value.code == "client_closed"
            await until(lambda: process.stats is not None and process.stats.busy_slots == 0)
            assert not process.busy

    run(test)


@pytest.mark.slow
def test_a_crash_answers_what_was_in_flight_and_starts_another_worker() -> None:
    async def test() -> None:
        async with engine(reply="z" * 3000, context=4096, step_s=0.005) as process:
            begun, pid = asyncio.Event(), process.pid
            reading = asyncio.create_task(read(process.submit("x", GREEDY), begun))
            await begun.wait()
            assert pid is not None
            os.kill(pid, KILL)
            with pytest.raises(RequestError) as caught:
                await reading
            assert (caught.value.status, caught.value.code) == (503, "engine_crashed")
            with pytest.raises(RequestError) as caught:
                process.submit("x", GREEDY)
            assert caught.value.code == "model_loading"
            await process.wait_ready()
            assert (process.restarts, process.state) == (1, "ready") and process.pid != pid
            assert (await process.encode("a", special=False)).ids == [97]

    run(test)


@pytest.mark.slow
def test_a_failed_step_is_told_as_the_reason() -> None:
    async def test() -> None:
        async with engine(fails_at=4) as process:
            with pytest.raises(RequestError, match="failed in a step") as caught:
                await read(process.submit("x", Params(ignore_eos=True)))
            assert caught.value.status == 503
            await process.wait_ready()
            assert process.restarts == 1

    run(test)


@pytest.mark.slow
def test_a_model_that_dies_while_it_loads_is_given_up() -> None:
    async def test() -> None:
        process = EngineProcess(Load("fake", settings={"no_such_setting": 1}))
        process.start()
        with pytest.raises(EdgeError, match="died 3 times while loading"):
            await process.wait_ready()
        assert (process.state, process.restarts) == ("failed", 3)
        with pytest.raises(RequestError) as caught:
            process.submit("x", GREEDY)
        assert caught.value.code == "model_failed"
        await process.stop(1.0)

    run(test)


def test_a_model_that_cannot_be_loaded_is_tried_once() -> None:
    async def test() -> None:
        process = EngineProcess(Load("llamacpp", path="missing.gguf"))
        process.start()
        with pytest.raises(EdgeError, match=r"missing\.gguf"):
            await process.wait_ready()
        assert process.restarts == 0
        await process.stop(1.0)

    run(test)


def test_stopping_lets_what_runs_end_and_the_worker_with_it() -> None:
    async def test() -> None:
        async with engine(reply="z" * 40, step_s=0.005) as process:
            begun = asyncio.Event()
            reading = asyncio.create_task(read(process.submit("x", GREEDY), begun))
            await begun.wait()
            await process.stop(10.0)
            _, done = await reading
            assert (done.reason, done.completion_tokens) == ("stop", 41)
            assert process.pid is None and process.state == "loading"

    run(test)


# -- signs of life ---------------------------------------------------------------------------------------


@pytest.fixture
def _fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_BEAT_S", 0.1), ("_STALLED_S", 0.3), ("_KILLED_S", 1.5), ("_GRACE_S", 0.2)):
        monkeypatch.setattr(client, name, seconds)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no process can be stopped here")
@pytest.mark.usefixtures("_fast_beats")
def test_a_stopped_engine_is_not_ready_and_goes_on_or_is_replaced() -> None:
    async def test() -> None:
        async with engine(reply="z" * 3000, context=4096, step_s=0.005) as process:
            pid, begun = process.pid, asyncio.Event()
            assert pid is not None
            process.check_alive()
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: process.state == "stalled")
            with pytest.raises(RequestError, match="has not answered") as caught:
                process.submit("x", GREEDY)
            assert (caught.value.status, caught.value.code) == (503, "engine_stalled")
            os.kill(pid, signal.SIGCONT)
            await until(lambda: process.state == "ready")
            assert process.restarts == 0
            reading = asyncio.create_task(read(process.submit("x", GREEDY), begun))
            await begun.wait()
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(RequestError, match="did not answer") as caught:
                await reading
            assert caught.value.status == 503
            await process.wait_ready()
            assert process.restarts == 1 and process.pid != pid

    run(test)


@pytest.mark.slow
@pytest.mark.usefixtures("_fast_beats")
def test_a_long_step_is_a_sign_of_life() -> None:
    async def test() -> None:
        async with engine(reply="z", step_s=1.0) as process:
            reading = asyncio.create_task(read(process.submit("x", GREEDY)))
            while not reading.done():
                assert process.state == "ready"
                await asyncio.sleep(0.02)
            assert (await reading)[0] == "z"

    run(test)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no process can be stopped here")
@pytest.mark.usefixtures("_fast_beats")
def test_a_stopped_engine_cannot_keep_a_request_beyond_its_time() -> None:
    async def test() -> None:
        async with engine(reply="z" * 3000, context=4096, step_s=0.005) as process:
            assert process.pid is not None
            stream, loop = process.submit("x", GREEDY, timeout_s=0.3), asyncio.get_running_loop()
            began = loop.time()
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(RequestError) as caught:
                await read(stream)
            assert (caught.value.status, caught.value.code) == (408, "timeout")
            assert 0.3 < loop.time() - began < 1.4 and not process.busy
            os.kill(process.pid, signal.SIGCONT)
            await until(lambda: process.state == "ready")
            # What the engine itself ends in time, it ends.
            _, done = await read(process.submit("x", GREEDY, timeout_s=0.2))
            assert done.reason == "timeout"

    run(test)


@pytest.mark.slow
def test_a_model_that_dies_at_each_request_is_given_up() -> None:
    async def test() -> None:
        async with engine(fails_at=1) as process:
            for _ in range(client._FRUITLESS):
                await process.wait_ready()
                with pytest.raises(RequestError, match="failed in a step"):
                    await read(process.submit("x", GREEDY))
                await until(lambda: process.state != "ready")
            with pytest.raises(EdgeError, match="died 3 times at requests"):
                await process.wait_ready()
            assert (process.state, process.restarts) == ("failed", 3)
            with pytest.raises(RequestError) as caught:
                process.submit("x", GREEDY)
            assert caught.value.code == "model_failed"

    run(test)


@pytest.mark.slow
def test_a_model_that_finishes_answers_is_not_given_up() -> None:
    async def test() -> None:
        async with engine(reply="z", script=[["long", "z" * 3000]], context=4096, step_s=0.005) as process:
            for _ in range(client._FRUITLESS + 1):
                assert (await read(process.submit("x", GREEDY)))[0] == "z"
                begun = asyncio.Event()
                reading = asyncio.create_task(read(process.submit("long", GREEDY), begun))
                await begun.wait()
                assert process.pid is not None
                os.kill(process.pid, KILL)
                with pytest.raises(RequestError):
                    await reading
                await process.wait_ready()
            assert process.state == "ready"

    run(test)


@pytest.mark.slow
def test_a_call_that_is_left_is_cancelled() -> None:
    async def test() -> None:
        async with engine(context=64) as process:
            call = asyncio.create_task(process.encode("x" * 2_000_000, special=False))
            await until(lambda: process.busy)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not process.busy
            assert (await process.encode("a", special=False)).ids == [97]

    run(test)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
def test_a_signal_to_the_whole_group_lets_what_runs_end() -> None:
    """As `timeout`, systemd and containers stop a server: the worker waits to be told to drain."""

    async def test() -> None:
        async with engine(reply="z" * 100, context=256, step_s=0.005) as process:
            begun = asyncio.Event()
            reading = asyncio.create_task(read(process.submit("x", GREEDY), begun))
            await begun.wait()
            heard: list[int] = []
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, heard.append, 1)
            assert process.pid is not None
            for member in (os.getpid(), process.pid):
                os.kill(member, signal.SIGTERM)
            await until(lambda: bool(heard))
            await process.stop(10.0)
            text, done = await reading
            assert (text, done.reason) == ("z" * 100, "stop")

    run(test)
