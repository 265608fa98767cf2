"""The tutorial's interface."""

from __future__ import annotations

from tests.support.fake_server import Server, events, user


def test_get_generate_answers_as_the_tutorial_does(spelling: Server) -> None:
    response = spelling.get("/generate", params={"prompt": "你好"})
    assert response.status_code == 200
    assert response.json()["generate_text"] == "你好, world! <end>"
    assert response.json()["finish_reason"] == "stop"
    assert response.headers["x-edge-device"] == "none"


def test_post_generate_and_its_stream_agree(spelling: Server) -> None:
    body = {"prompt": "hello", "stop": ["<end>"]}
    whole = spelling.post("/generate", body).json()
    rows = events(spelling.post("/generate", {**body, "stream": True}))
    assert whole["generate_text"] == "你好, world! " == "".join(row.get("text", "") for row in rows)
    assert rows[-1]["done"] is True
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert rows[-1]["usage"][name] == whole["usage"][name]


def test_prompts_go_through_the_template_unless_raw(spelling: Server) -> None:
    raw = spelling.post("/generate", {"prompt": "hello", "raw": True}).json()
    cooked = spelling.post("/generate", {"prompt": "hello"}).json()
    assert raw["usage"]["prompt_tokens"] == 5
    assert cooked["usage"]["prompt_tokens"] == len("<user>hello<assistant>")
    messages = spelling.post("/generate", {"messages": user("hello")}).json()
    assert messages["usage"]["prompt_tokens"] == cooked["usage"]["prompt_tokens"]
