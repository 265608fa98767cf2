"""Ollama's routes about models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_server import Server, fake_server

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


THINKER = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    common = {"context": 512, "slots": 4, "batch": 128}
    models = {
        "fake": {**common, "reply": "x"},
        "thinker": {**common, "reply": "well</think>\n\nseven", "chat_template": THINKER},
    }
    with fake_server(models=models) as started:
        yield started


def test_ollama_models(server: Server) -> None:
    assert [m["name"] for m in server.get("/api/tags").json()["models"]] == ["fake", "thinker"]
    shown = server.post("/api/show", {"model": "thinker"}).json()
    assert shown["capabilities"] == ["completion", "thinking", "embedding"]
    assert server.post("/api/show", {"name": "fake"}).json()["capabilities"][1] == "tools"
    assert {"fake", "thinker"} == {m["name"] for m in server.get("/api/ps").json()["models"]}
    # VS Code wants at least 0.6.4, and these of a model's keys.
    version = tuple(map(int, server.get("/api/version").json()["version"].split(".")))
    assert version >= (0, 6, 4)
    about = server.post("/api/show", {"model": "fake"}).json()["model_info"]
    assert about["general.basename"] == "fake"
    assert about[about["general.architecture"] + ".context_length"] == 512
    assert len(server.post("/api/embed", {"model": "fake", "input": ["a", "b"]}).json()["embeddings"]) == 2
    gone = server.post("/api/generate", {"model": "thinker", "keep_alive": 0}).json()
    assert gone["done_reason"] == "unload"
    assert [m["name"] for m in server.get("/api/ps").json()["models"]] == ["fake"]
    back = server.post("/api/generate", {"model": "thinker", "keep_alive": "1h"}).json()
    assert back["done_reason"] == "load"
    missing = server.post("/api/show", {"model": "nobody"})
    assert missing.status_code == 404
    assert set(missing.json()) == {"error"}
