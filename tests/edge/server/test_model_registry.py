"""Several artefacts behind one server: loaded on demand, oldest out, swapped by a reload."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from edge.engine.worker import Load
from edge.errors import InputError, RequestError
from edge.server import model_registry
from edge.server.model_registry import Planned
from tests.support.fake_server import CLIENT, Server, fake_server, user

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


def ask(server: Server, model: str | None = None, **extra: Any) -> httpx.Response:
    return server.post("/generate", {"prompt": "x", "max_tokens": 4, "model": model, **extra})


def statuses(server: Server) -> dict[str, str]:
    models: dict[str, str] = server.get("/health").json()["models"]
    return models


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


def test_models_are_loaded_when_asked_for_and_the_oldest_goes() -> None:
    models = {name: {"reply": name, "context": 64, "bytes": 40} for name in ("a", "b", "c")}
    models["huge"] = {"reply": "x", "bytes": 101}
    with fake_server(models=models, budget=100) as server:
        assert statuses(server) == {"a": "ready", "b": "unloaded", "c": "unloaded", "huge": "unloaded"}
        assert ask(server).json()["generate_text"] == "a"
        assert ask(server, "b").json()["generate_text"] == "b"
        ask(server, "a")
        assert ask(server, "c").headers["x-edge-model"] == "c"
        assert statuses(server) == {"a": "ready", "b": "unloaded", "c": "ready", "huge": "unloaded"}
        refused = ask(server, "huge").json()["error"]
        assert refused["code"] == "memory_budget"
        assert ask(server, "../etc/passwd").status_code == 404
        assert server.get("/info", params={"model": "b"}).json()["error"]["code"] == "model_unloaded"
        assert server.get("/info", params={"model": "c"}).json()["model"] == "c"


@pytest.mark.slow
def test_a_model_at_work_is_not_pushed_out() -> None:
    endless = {"reply": "x" * 3000, "context": 4096, "step_s": 0.01, "bytes": 60}
    with fake_server(models={"a": endless, "b": {"reply": "b", "bytes": 60}}, budget=100) as server:
        body = {"prompt": "x", "stream": True, "speculate": False}
        with CLIENT.stream("POST", server.url + "/generate", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            refused = ask(server, "b")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "memory_budget")
            assert int(refused.headers["retry-after"]) >= 1
        until(lambda: ask(server, "b").status_code == 200)
        assert statuses(server) == {"a": "unloaded", "b": "ready"}


@pytest.mark.slow
def test_an_idle_model_is_unloaded_after_its_keep_alive() -> None:
    with fake_server(models={"a": {"reply": "a"}, "b": {"reply": "b"}}) as server:
        body = {"model": "b", "prompt": "x", "stream": False, "keep_alive": 0.2}
        assert server.post("/api/generate", body).json()["response"] == "b"
        until(lambda: statuses(server)["b"] == "unloaded")
        assert statuses(server)["a"] == "ready"
        assert ask(server, "b").json()["generate_text"] == "b"


@pytest.mark.slow
def test_m6_a_reload_swaps_a_new_export_in_and_drops_no_stream(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    old = {"reply": "o" * 100, "digest": "sha256:old", "context": 512, "step_s": 0.02}
    file.write_text(json.dumps(old), encoding="utf-8")
    key = {"authorization": "Bearer boss"}
    with fake_server(models={"m": {"file": str(file)}}, admin_keys=["boss"]) as server:
        assert ask(server).headers["x-edge-digest"] == "sha256:old"
        file.write_text(json.dumps({**old, "reply": "new", "digest": "sha256:new"}), encoding="utf-8")
        assert ask(server).json()["digest"] == "sha256:old"
        body = {"prompt": "x", "stream": True, "speculate": False}
        with CLIENT.stream("POST", server.url + "/generate", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            swapped = server.post("/admin/reload", {"model": "m"}, headers=key).json()
            assert swapped == {
                "model": "m",
                "digest_before": "sha256:old",
                "digest": "sha256:new",
                "changed": True,
            }
            assert ask(server).json()["generate_text"] == "new"
            rows = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
        assert "".join(row.get("text", "") for row in rows) == "o" * 100
        assert rows[-1]["digest"] == "sha256:old"
        assert server.get("/v1/models/m").json()["digest"] == "sha256:new"
        file.unlink()
        broken = server.post("/admin/reload", {"model": "m"}, headers=key)
        assert (broken.status_code, broken.json()["error"]["code"]) == (503, "model_failed")
        assert ask(server).json()["generate_text"] == "new"


@pytest.mark.slow
def test_only_an_admin_key_changes_the_server() -> None:
    with fake_server(admin_keys=["boss"]) as server:
        assert server.post("/admin/reload", {}).status_code == 401
        assert server.post("/admin/reload", {}, headers={"x-api-key": "no"}).status_code == 401
        gone = server.post("/admin/unload", {}, headers={"x-api-key": "boss"})
        assert gone.json()["status"] == "unloaded"
        assert server.get("/ready").status_code == 503
        assert ask(server).status_code == 200
    with fake_server() as server:
        assert server.post("/admin/reload", {}).json()["error"]["code"] == "no_admin_key"


@pytest.mark.parametrize("name", ["/etc/passwd", "a/b", "C:\\x"])
def test_an_id_is_never_a_path(name: str) -> None:
    registry = model_registry.Registry({"m": lambda: Planned(Load(kind="fake"))})
    with pytest.raises(RequestError) as caught:
        registry.entry(name)
    assert caught.value.status == 404


@pytest.mark.slow
def test_many_at_once_load_a_model_once_and_keep_to_the_budget() -> None:
    models = {name: {"reply": name, "context": 64, "bytes": 60} for name in ("a", "b", "c")}
    with fake_server(models=models, budget=100) as server, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(server, "bc"[i % 2]), range(8)))
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert all(a.json()["generate_text"] == a.json()["model"] for a in answers if a.status_code == 200)
        until(lambda: list(statuses(server).values()).count("ready") == 1)
        process = psutil.Process(server.process.pid)
        # The engine, and what renders chat templates.
        until(lambda: len(process.children()) == 2)


def test_any_id_means_the_single_model_where_that_was_asked() -> None:
    with fake_server(reply="x", context=256, accept_any=True) as server:
        answer = server.post("/v1/chat/completions", {"model": "gpt-4o", "messages": user()})
        assert (answer.json()["model"], answer.headers["x-edge-model"]) == ("fake", "fake")
        assert server.post("/api/generate", {"model": "llama3:8b", "prompt": "x"}).status_code == 200
        assert server.get("/v1/models/gpt-4o").json()["id"] == "fake"


def test_an_engine_that_dies_of_an_export_is_not_started_again_before_there_is_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The export is planned again where the planning failed, which costs little."""
    monkeypatch.setattr(model_registry, "_LOOK_S", 0.02)
    monkeypatch.setattr(model_registry, "_REPLAN_S", 0.0)
    artefact: Any = SimpleNamespace(name="conch", digest="", thinking=None)
    export: dict[str, Any] = {"state": 0, "plan": None}
    plans: list[int] = []

    def plan() -> Planned:
        plans.append(export["state"])
        if export["plan"] is None:
            raise InputError(f"it needs 900 MiB, {len(plans)} MiB are free")
        return Planned(Load(kind="fake", settings=export["plan"]), artefact)

    async def serve() -> None:
        registry = model_registry.Registry({"run": plan}, awaited=lambda: export["state"])
        waiting = registry.start()

        async def reaches(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(20):
                while not condition():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

        try:
            await reaches(lambda: len(plans) > 3)
            with pytest.raises(RequestError, match="waiting for an export: it needs 900 MiB") as caught:
                await registry.take("any id")
            assert (caught.value.status, caught.value.code) == (503, "model_waiting")
            export["plan"] = {"slots": "x"}
            await reaches(lambda: "3 times while loading" in registry.first.absent)
            tried = len(plans)
            await asyncio.sleep(0.3)
            assert (len(plans), registry.first.status) == (tried, "waiting")
            export.update(plan={"reply": "z"}, state=1)
            served = await waiting
            assert (served.name, registry.first.status) == ("conch", "ready")
            assert await registry.take("conch") is served
            await registry.unload(None)
            assert registry.first.status == "unloaded"
        finally:
            await registry.close(0.5)

    asyncio.run(serve())
    assert sum("MiB are free" in line for line in caplog.messages) == 1
