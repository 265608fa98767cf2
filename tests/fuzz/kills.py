"""Processes that are killed at any moment: the engine while clients wait, a training while it saves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from tests.fuzz.http import Watched, watched
from tests.fuzz.runner import Used, bounds
from tests.support.fake_server import CLIENT

Draw = Callable[[Random], Any]
Check = Callable[[Any], None]
CLIENTS = 24
# Of a core for the server, between the first request and the next engine's readiness; it takes 0.07.
BUSY_S = 0.4
_USER = [{"role": "user", "content": "x"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x"},
    "/v1/chat/completions": {"messages": _USER},
    "/v1/completions": {"prompt": ["x", "y"]},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": _USER, "max_tokens": 200},
    "/api/chat": {"model": "fake", "messages": _USER},
    "/api/generate": {"model": "fake", "prompt": "x"},
    "/tokenize": {"text": "x" * 1000},
}


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[tuple[Draw, Check, Used]]:
    """The engine is killed while 24 clients of all families wait: each is answered in its family's words."""

    def draw(rng: Random) -> tuple[float, list[tuple[str, bool]]]:
        asked = [(rng.choice(list(STREAMS)), rng.random() < 0.7) for _ in range(CLIENTS)]
        return rng.choice((0.0, 0.02, 0.1, rng.random() * 0.5)), asked

    def ask(watch: Watched, path: str, stream: bool) -> None:
        body = {**STREAMS[path], **({} if path == "/tokenize" else {"stream": stream})}
        answer = CLIENT.post(watch.server.url + path, json=body)
        text = answer.text
        if answer.status_code == 200 and stream and path != "/tokenize":
            # Whole, or ended by an error; httpx raises where a chunk is torn.
            last = ("[DONE]", "response.completed", "message_stop", '"done":true', '"error"')
            assert any(word in text[-2000:] for word in last), text[-500:]
        else:
            assert answer.status_code in (200, 503), text
            assert (answer.status_code == 503) == bool(json.loads(text).get("error")), text

    def check(given: tuple[float, list[tuple[str, bool]]]) -> None:
        delay, asked = given
        settings = {"reply": "w" * 200, "context": 1024, "slots": 8, "step_s": 0.02}
        with (
            watched(folder, lasting=False, **settings) as watch,
            ThreadPoolExecutor(CLIENTS) as pool,
            bounds(watch.used, limit_s=BUSY_S),
        ):
            answers = [pool.submit(ask, watch, path, stream) for path, stream in asked]
            time.sleep(delay)
            os.kill(watch.server.worker(), getattr(signal, "SIGKILL", signal.SIGTERM))
            for answer in answers:
                answer.result()
            watch.server.wait()
            assert watch.client.get("/info").json()["restarts"] == 1
            watch.check_log()

    # Each case has a server of its own; the clients' time is not the server's.
    yield draw, check, dict


@contextlib.contextmanager
def checkpoints(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """A training is killed while it saves: what is listed is whole, the rest is swept at the next start."""
    import torch

    from convert.config import parse
    from convert.train import checkpoint, run_lock
    from convert.train.trainer import Progress

    run = folder / "run"
    torch.set_num_threads(1)
    model = torch.nn.Linear(64, 64)
    model(torch.ones(64)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": str(run)}
    loop: Any = SimpleNamespace(
        config=parse(keys), device="cpu", dtype=torch.float32, model=model, optimizer=optimizer,
        random={"cpu": torch.zeros(8)}, scaler=torch.amp.GradScaler("cpu", enabled=False), state=Progress(),
        world=SimpleNamespace(shares=1),
    )  # fmt: skip

    def train(steps: list[int]) -> None:
        with run_lock.hold(run):
            for step in steps:
                loop.state.step = step
                checkpoint.save(loop, run, data="x", base={}, best=checkpoint.Best())
            time.sleep(20)

    def draw(rng: Random) -> tuple[float, list[int]]:
        return rng.random() * 0.1, [rng.randint(1, 3) for _ in range(100)]

    def check(given: tuple[float, list[int]]) -> None:
        delay, steps = given
        before = {path for _, path in checkpoint.listed(run)}
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                train(steps)
            os._exit(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status == signal.SIGKILL, "it ended by itself"
        with run_lock.hold(run):
            there = {path for _, path in checkpoint.listed(run)}
            assert there >= before and {path.name for path in run.iterdir()} - {run_lock.FILE} == {
                path.name for path in there
            }
        for path in there:
            assert checkpoint.find(run, str(path)).step == int(path.name.removeprefix("checkpoint-"))

    yield draw, check
