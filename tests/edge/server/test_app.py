"""The application's own errors, and that every API family is listed."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

from edge.server import api
from edge.server.app import FAMILIES
from tests.support.fake_server import CLIENT, Server, error, user


@pytest.mark.parametrize("text", ["{", "[1,2", '{"prompt": "a", "temperature": NaN}', "null", '"x"'])
def test_bodies_that_are_no_request(spelling: Server, text: str) -> None:
    response = CLIENT.post(
        spelling.url + "/generate", content=text, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    failure = error(response)
    assert failure["param"] == ("temperature" if "NaN" in text else "body")


def test_unknown_routes_and_methods_have_the_same_error_body(spelling: Server) -> None:
    assert error(spelling.get("/nowhere"))["code"] == "not_found"
    assert spelling.get("/nowhere").status_code == 404
    assert spelling.post("/health", {}).status_code == 405


def test_every_family_in_the_folder_is_listed() -> None:
    modules = [module.name for module in pkgutil.iter_modules(api.__path__)]
    routers = [importlib.import_module(f"edge.server.api.{name}").router for name in modules]
    listed = [router for router, _ in FAMILIES]
    assert sorted(map(id, routers)) == sorted(map(id, listed))


@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat", "/v1/chat/completions"])
def test_errors_have_the_form_of_the_family_that_was_asked(spelling: Server, path: str) -> None:
    forms = {"/v1/messages": {"type", "error"}, "/api/chat": {"error"}, "/v1/chat/completions": {"error"}}
    for response in (
        spelling.post(path, {"messages": 5, "model": "fake", "max_tokens": 3}),
        spelling.post(path, {}, headers={"host": "evil.example"}),
        spelling.get(path),
    ):
        assert response.status_code in (400, 403, 405)
        assert set(response.json()) == forms[path]
        assert isinstance(response.json()["error"], str) == (path == "/api/chat")


def test_a_part_of_a_message_that_has_the_wrong_type_is_the_clients_error(spelling: Server) -> None:
    call = {"type": "tool_use", "id": "1", "name": 5, "input": {}}
    body = {"messages": [{"role": "assistant", "content": [call]}], "max_tokens": 3}
    assert spelling.post("/v1/messages", body).status_code == 400
    item = {"type": "function_call", "call_id": "1", "name": ["f"], "arguments": "{}"}
    assert spelling.post("/v1/responses", {"input": [item]}).status_code == 400


def test_head_is_answered_wherever_get_is(spelling: Server) -> None:
    paths = ["/health", "/ready", "/v1/models", "/v1/models/fake", "/api/tags", "/api/ps", "/api/version"]
    for path in [*paths, "/info", "/metrics", "/", "/docs", "/openapi.json", "/models"]:
        head = CLIENT.head(spelling.url + path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == spelling.get(path).headers["content-type"]
    assert CLIENT.head(spelling.url + "/nowhere").status_code == 404
    assert CLIENT.head(spelling.url + "/v1/completions").status_code == 405
    assert 'method="HEAD"' in spelling.get("/metrics").text


def test_openais_routes_answer_without_v1_too(spelling: Server) -> None:
    messages = {"messages": [{"role": "user", "content": "hi"}]}
    bodies = {
        "/chat/completions": messages, "/completions": {"prompt": "hi"}, "/embeddings": {"input": "hi"},
        "/responses": {"input": "hi"},
    }  # fmt: skip
    for path, body in bodies.items():
        short, long = spelling.post(path, body), spelling.post("/v1" + path, body)
        assert (short.status_code, set(short.json())) == (200, set(long.json())), path
    assert spelling.get("/models").json() == spelling.get("/v1/models").json()
    assert spelling.get("/models/fake").json()["id"] == "fake"
    assert not set(bodies) & set(spelling.get("/openapi.json").json()["paths"])
    assert "/v1" in error(spelling.post("/chat", messages))["message"]
    assert "/v1" in error(spelling.post("/v1/v1/chat/completions", messages))["message"]


def test_nesting_is_no_way_in(spelling: Server) -> None:
    for depth in (50, 5000, 200_000):
        for text in ("[" * depth, '{"prompt":' + "[" * depth + "]" * depth + "}"):
            response = CLIENT.post(spelling.url + "/generate", content=text)
            assert response.status_code == 400
    deep: Any = {}
    for _ in range(200):
        deep = {"properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "f"}, "x": deep}
    response = spelling.post("/v1/chat/completions", {"messages": user(), "tools": [tool]})
    assert response.status_code in (200, 400)
