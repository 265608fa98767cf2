"""The HTTP surface over a real engine process with the fake backend."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from edge.errors import InputError
from edge.server.cli import read_keys
from tests.support.fake_server import Server, fake_server, launch

CHAT = "/v1/chat/completions"
EMOJI = "你好👩\u200d🚀🇨🇳"


@pytest.fixture(scope="module")
def spelling() -> Iterator[Server]:
    """Answers everything with one text, quickly."""
    with fake_server(reply="你好, world! <end>", context=256, slots=4) as server:
        yield server


@pytest.fixture(scope="module")
def emoji() -> Iterator[Server]:
    with fake_server(reply=EMOJI, context=256) as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    """Never stops by itself within its context; 20 ms a step."""
    with fake_server(
        reply="x" * 5000, context=4096, slots=2, step_s=0.02, token_s=0.001, max_queue=3
    ) as server:
        yield server


def user(text: Any = "hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def events(response: httpx.Response) -> list[Any]:
    rows = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert rows[-1] == "[DONE]"
    return [json.loads(row) for row in rows[:-1]]


def error(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


# -- the tutorial's interface --------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"prompt": "a", "temperature": "0.5"}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": 1e300}, "temperature"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias"),
        ({"prompt": "a", "max_new_tokens": 3}, "max_new_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
    ],
)
def test_bad_values_are_named(spelling: Server, body: dict[str, Any], param: str) -> None:
    response = spelling.post("/generate", body)
    assert response.status_code == 400
    assert (error(response)["param"] or "").split(".")[0] == param


@pytest.mark.parametrize(
    ("body", "param", "bound"),
    [
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": "x" * 257}, "stop", "at most 256"),
        ({"stop": ["a", "x" * 257]}, "stop.1", "at most 256"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"max_tokens": 1_000_001}, "max_tokens", "1000000"),
        ({"max_tokens": 10**20}, "max_tokens", "1000000"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 1"),
        ({"temperature": 2.1}, "temperature", "2"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "259"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", "259"),
        ({"timeout": 86401}, "timeout", "86400"),
        ({"messages": [{"role": "user", "content": "x"}] * 2049}, "messages", "at most 2048"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ({"tool_choice": "sometimes"}, "tool_choice", "'required'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", "at most 128"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 65536]}}}},
            "response_format.json_schema.schema",
            "65536",
        ),
    ],
)
def test_every_limit_names_its_field_and_its_bound(
    spelling: Server, body: dict[str, Any], param: str, bound: str
) -> None:
    response = spelling.post("/v1/chat/completions", {"messages": user(), **body})
    assert response.status_code == 400
    said = error(response)
    assert said["param"] == param
    assert bound in said["message"]


@pytest.mark.parametrize("text", ["{", "[1,2", '{"prompt": "a", "temperature": NaN}', "null", '"x"'])
def test_bodies_that_are_no_request(spelling: Server, text: str) -> None:
    response = httpx.post(
        spelling.url + "/generate", content=text, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    said = error(response)
    assert said["param"] == ("temperature" if "NaN" in text else "body")


def test_unknown_routes_and_methods_have_the_same_error_body(spelling: Server) -> None:
    assert error(spelling.get("/nowhere"))["code"] == "not_found"
    assert spelling.get("/nowhere").status_code == 404
    assert spelling.post("/health", {}).status_code == 405


# -- OpenAI's --------------------------------------------------------------------------------------------


def test_chat_completion(spelling: Server) -> None:
    body = spelling.post(CHAT, {"model": "fake", "messages": user(), "temperature": 0}).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "你好, world! <end>"}
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_s14_the_usage_chunk_comes_only_when_asked(spelling: Server) -> None:
    body = {"messages": user(), "stream": True, "temperature": 0}
    plain = events(spelling.post(CHAT, body))
    asked = events(spelling.post(CHAT, {**body, "stream_options": {"include_usage": True}}))
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in plain)
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] > 0
    for chunks in (plain, asked[:-1]):
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "你好, world! <end>"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("limit", range(1, 21, 3))
def test_s1_a_stream_joins_to_the_whole_wherever_it_is_cut(emoji: Server, limit: int) -> None:
    body = {"messages": user(), "temperature": 0, "max_tokens": limit}
    whole = emoji.post(CHAT, body).json()["choices"][0]["message"]["content"]
    streamed = events(emoji.post(CHAT, {**body, "stream": True}))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed) == whole
    assert whole.rstrip("\ufffd") == EMOJI.encode()[:limit].decode("utf-8", "ignore")


@pytest.mark.parametrize(
    ("stop", "want"), [("好👩", "你"), (["x", "\u200d"], "你好👩"), (EMOJI + "!", EMOJI)]
)
def test_s2_a_stop_that_straddles_tokens_is_never_shown(emoji: Server, stop: Any, want: str) -> None:
    body = {"messages": user(), "temperature": 0, "stop": stop}
    assert emoji.post(CHAT, body).json()["choices"][0]["message"]["content"] == want
    streamed = events(emoji.post(CHAT, {**body, "stream": True}))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed) == want
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_s7_a_long_system_prompt_is_read_once(emoji: Server) -> None:
    system = {"role": "system", "content": "s" * 150}
    used = [
        emoji.post(CHAT, {"messages": [system, *user(text)]}).json()["usage"]["prompt_tokens_details"]
        for text in ("one?", "two?")
    ]
    # Other tests' prompts begin with the same "<".
    assert used[0]["cached_tokens"] <= 1
    assert used[1]["cached_tokens"] == len("<system>" + "s" * 150 + "<user>")


@pytest.mark.slow
def test_s13_both_names_of_the_limit_and_a_sane_default(slow: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = slow.post(CHAT, {"messages": user(), "temperature": 0, name: 4}).json()
        assert body["usage"]["completion_tokens"] == 4
        assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_s13_without_a_limit_the_context_is_the_limit() -> None:
    with fake_server(reply="y" * 500, context=128) as server:
        body = server.post(CHAT, {"messages": user(), "temperature": 0}).json()
        assert body["usage"]["total_tokens"] == 128
        assert body["choices"][0]["finish_reason"] == "length"


def test_s15_logprobs_of_both_shapes(spelling: Server) -> None:
    chat = spelling.post(CHAT, {"messages": user(), "logprobs": True, "temperature": 0}).json()
    choice = chat["choices"][0]
    joined = b"".join(bytes(row["bytes"]) for row in choice["logprobs"]["content"])
    assert joined.decode() == choice["message"]["content"]
    assert all(row["top_logprobs"] == [] and row["logprob"] <= 0 for row in choice["logprobs"]["content"])
    legacy = spelling.post("/v1/completions", {"prompt": "x", "logprobs": 2, "temperature": 0}).json()
    shape = legacy["choices"][0]["logprobs"]
    count = len(shape["tokens"])
    assert count == len(shape["token_logprobs"]) == len(shape["top_logprobs"]) == len(shape["text_offset"])
    assert all(len(top) <= 2 for top in shape["top_logprobs"])
    assert spelling.post(CHAT, {"messages": user(), "top_logprobs": 2}).status_code == 400


def test_s19_content_parts_and_null(spelling: Server) -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    joined = spelling.post(CHAT, {"messages": user(parts)}).json()
    assert joined["usage"]["prompt_tokens"] == len("<user>hello<assistant>")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = [{"role": "assistant", "content": None, "tool_calls": [call]}, *user()]
    assert spelling.post(CHAT, {"messages": calls}).status_code == 200
    for messages in (user(None), user([{"type": "image_url"}]), user(5), "x", [], None, [{"role": "user"}]):
        assert spelling.post(CHAT, {"messages": messages}).status_code == 400, messages


def test_s8_a_templates_own_exception_is_a_400_with_its_text(spelling: Server) -> None:
    response = spelling.post(CHAT, {"messages": [*user(), {"role": "assistant", "content": "x"}]})
    assert response.status_code == 400
    assert "the last turn must be yours" in error(response)["message"]


def test_what_cannot_be_honoured_is_refused(spelling: Server) -> None:
    for extra in (
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        {"n": 17},
        {"functions": [{"name": "f"}]},
        {"stream_options": {"include_usage": True}},
    ):
        assert spelling.post(CHAT, {"messages": user(), **extra}).status_code == 400, extra
    for extra in ({"user": "u"}, {"response_format": {"type": "text"}}, {"tools": []}):
        assert spelling.post(CHAT, {"messages": user(), **extra}).status_code == 200, extra
    assert spelling.post(CHAT, {"model": "/etc/passwd", "messages": user()}).status_code == 404


def test_structured_output_over_http(spelling: Server) -> None:
    # The model wants to say something else; the masks leave it no choice.
    schema = {"type": "object", "properties": {"k": {"enum": [7]}}, "required": ["k"]}
    asked = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}},
    }
    body = spelling.post(CHAT, {"messages": user(), "response_format": asked}).json()
    assert json.loads(body["choices"][0]["message"]["content"]) == {"k": 7}
    assert body["choices"][0]["finish_reason"] == "stop"
    text = spelling.post("/generate", {"prompt": "x", "regex": "[0-9]{4}-[a-f]{2}"}).json()["generate_text"]
    assert re.fullmatch("[0-9]{4}-[a-f]{2}", text)
    both = spelling.post("/generate", {"prompt": "x", "regex": "a", "json_schema": True})
    assert both.status_code == 400
    deep = spelling.post("/generate", {"prompt": "x", "regex": "(" * 50_000 + ")" * 50_000})
    assert deep.status_code == 400
    assert spelling.get("/ready").json() == {"status": "ready", "model": "fake"}


def test_s5_a_prompt_that_does_not_fit(spelling: Server) -> None:
    response = spelling.post(CHAT, {"messages": user("word " * 300)})
    assert response.status_code == 400
    assert error(response)["code"] == "context_length_exceeded"
    tokens = len("<user>" + "word " * 300 + "<assistant>")
    assert f"{tokens} tokens" in error(response)["message"]
    assert "256" in error(response)["message"]
    streamed = spelling.post(CHAT, {"messages": user("word " * 300), "stream": True})
    assert streamed.status_code == 400


def test_models(spelling: Server) -> None:
    assert [row["id"] for row in spelling.get("/v1/models").json()["data"]] == ["fake"]


@pytest.mark.slow
def test_s9_a_thought_that_the_template_opened_is_split_off() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    with fake_server(reply="a</think>\n\nb", chat_template=template) as server:
        whole = server.post(CHAT, {"messages": user(), "temperature": 0}).json()["choices"][0]["message"]
        assert (whole["reasoning_content"], whole["content"]) == ("a", "b")
        rows = events(server.post(CHAT, {"messages": user(), "temperature": 0, "stream": True}))
        deltas = [row["choices"][0]["delta"] for row in rows]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "a"
        assert "".join(delta.get("content", "") for delta in deltas) == "b"


# -- many at once, and clients that go -----------------------------------------------------------------


@pytest.mark.slow
def test_s4_parallel_requests_are_isolated() -> None:
    with fake_server(slots=4, context=256) as server:

        def ask(k: int) -> str:
            body = {"prompt": f"repeat the number {k}", "raw": True, "max_tokens": 30, "ignore_eos": True}
            text: str = server.post("/generate", body).json()["generate_text"]
            return text

        alone = [ask(k) for k in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == alone
        assert len(set(alone)) == 8


@contextlib.contextmanager
def running(server: Server, count: int) -> Iterator[None]:
    """`count` endless streams that have given their first token; they end with the block."""
    with contextlib.ExitStack() as held:
        streams = []
        for _ in range(count):
            body = {"prompt": "x", "stream": True, "speculate": False}
            response = held.enter_context(
                httpx.stream("POST", server.url + "/generate", json=body, timeout=30)
            )
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            streams.append(lines)  # an iterator that is dropped closes its response
        yield


def test_health_answers_while_tokens_are_made(slow: Server) -> None:
    with running(slow, 2), httpx.Client(base_url=slow.url) as client:
        client.get("/health")
        waits = []
        for _ in range(20):
            began = time.perf_counter()
            assert client.get("/health").json()["status"] == "ready"
            waits.append(time.perf_counter() - began)
        slow.until(lambda info: info["running"] == 2)
    assert sorted(waits)[10] < 0.05


@pytest.mark.slow
def test_s3_a_client_that_goes_frees_its_slot_in_every_phase(slow: Server) -> None:
    long = {"prompt": "p" * 1500, "raw": True, "cache_prompt": False}
    cases = {
        "before the first token": ({**long, "stream": True}, 0),
        "after three": ({"prompt": "x", "stream": True}, 3),
        "in an unstreamed request": ({"prompt": "x"}, 0),
    }
    for phase, (body, wanted) in cases.items():
        with socket.create_connection(("127.0.0.1", int(slow.url.rsplit(":", 1)[1]))) as client:
            text = json.dumps(body)
            head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
            slow.until(lambda info: info["busy_slots"] == 1)
            received = b""
            while received.count(b'"text"') < wanted:
                received += client.recv(4096)
        began = time.monotonic()
        slow.until(lambda info: info["busy_slots"] == 0, seconds=1.5)
        assert time.monotonic() - began < 1.0, phase


@pytest.mark.slow
def test_a_full_queue_answers_429_with_retry_after(slow: Server) -> None:
    body = {"prompt": "x", "max_tokens": 3}
    with ThreadPoolExecutor(3) as pool:
        with running(slow, 2):
            queued = [pool.submit(slow.post, "/generate", body) for _ in range(3)]
            slow.until(lambda info: info["waiting"] == 3)
            refused = slow.post("/generate", body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert error(refused)["type"] == "rate_limit_error"
        assert [future.result().status_code for future in queued] == [200] * 3


@pytest.mark.slow
def test_a_deadline_answers_408(slow: Server) -> None:
    response = slow.post("/generate", {"prompt": "x", "timeout": 0.2})
    assert (response.status_code, error(response)["code"]) == (408, "timeout")
    # A stream that has begun can only say it in its last event.
    streamed = slow.post(CHAT, {"messages": user("x"), "timeout": 0.5, "stream": True})
    assert streamed.status_code == 200
    assert events(streamed)[-1]["error"]["code"] == "timeout"
    assert streamed.text.endswith("data: [DONE]\n\n")


# -- who gets in ---------------------------------------------------------------------------------------


def test_a_foreign_host_or_origin_is_refused(spelling: Server) -> None:
    assert spelling.get("/info", headers={"host": "evil.example"}).status_code == 403
    assert spelling.get("/info", headers={"origin": "https://evil.example"}).status_code == 403
    assert spelling.get("/info", headers={"origin": spelling.url}).status_code == 200


def test_keys_come_from_a_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ключи"
    file.write_text("\ufeffone\n\n two \n", encoding="utf-8")
    monkeypatch.delenv("EDGE_API_KEY", raising=False)
    assert read_keys(None, "EDGE_API_KEY") == []
    assert read_keys(file, "EDGE_API_KEY") == ["one", "two"]
    monkeypatch.setenv("EDGE_API_KEY", "three ")
    assert read_keys(file, "EDGE_API_KEY") == ["three", "one", "two"]
    file.write_text("\n", encoding="utf-8")
    for path in (file, tmp_path / "none"):
        with pytest.raises(InputError, match=r"one API key a line|no key"):
            read_keys(path, "EDGE_API_KEY")


@pytest.mark.slow
def test_an_api_key_opens_every_route_but_health() -> None:
    with launch(
        [sys.executable, "-m", "tests.support.fake_server", json.dumps({"keys": ["one", "two"]})]
    ) as server:
        key = {"authorization": "Bearer two"}
        until = time.monotonic() + 20
        while server.get("/ready", headers=key).status_code != 200 and time.monotonic() < until:
            time.sleep(0.05)
        assert server.get("/health").status_code == 200
        for path in ("/info", "/ready", "/docs", "/v1/models"):
            assert server.get(path).status_code == 401
            assert server.get(path, headers={"authorization": b"Bearer \xe9"}).status_code == 401
            assert server.get(path, headers=key).status_code == 200
        assert server.get("/ready", headers={"x-api-key": "one"}).status_code == 200


def test_a_body_over_the_limit_is_refused(spelling: Server) -> None:
    big = b'{"prompt": "' + b"x" * (5 * 2**20) + b'"}'
    headers = {"content-type": "application/json"}
    # Said at once, or counted as it comes: the same words.
    chunks = (big[i : i + 65536] for i in range(0, len(big), 65536))
    for content in (big, chunks):
        response = httpx.post(spelling.url + "/generate", content=content, headers=headers)
        assert response.status_code == 413
        assert error(response)["code"] == "body_too_large"
        assert error(response)["message"] == "the body is over 4194304 bytes"


# -- crashes and signals -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_crash_answers_503_and_http_stays_up() -> None:
    with fake_server(reply="z" * 3000, context=4096, step_s=0.02) as server:
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.post, "/generate", {"prompt": "x", "speculate": False})
            body = {"messages": user(), "stream": True, "speculate": False}
            streamed = pool.submit(server.post, CHAT, body)
            server.until(lambda info: info["running"] == 2)
            worker = server.worker()
            os.kill(worker, signal.SIGSEGV)
            assert whole.result().status_code == 503
            assert error(whole.result())["code"] == "engine_crashed"
            rows = [line for line in streamed.result().text.split("\n") if line.startswith("data: ")]
            assert json.loads(rows[-2][6:])["error"]["code"] == "engine_crashed"
            assert rows[-1] == "data: [DONE]"
        assert server.get("/health").status_code == 200
        server.wait()
        assert server.worker() != worker
        assert server.get("/info").json()["restarts"] == 1
        answer = server.post("/generate", {"prompt": "x", "max_tokens": 3})
        assert answer.json()["generate_text"] == "zzz"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_drains_and_exits_with_zero() -> None:
    with fake_server(reply="w" * 3000, context=4096, step_s=0.02, drain=20.0) as server:
        body = {"prompt": "x", "max_tokens": 30, "stream": True, "speculate": False}
        with httpx.stream("POST", server.url + "/generate", json=body, timeout=30) as response:
            lines = response.iter_lines()
            first = next(lines)
            worker = server.worker()
            server.process.send_signal(signal.SIGTERM)
            rows = [line[6:] for line in [first, *lines] if line.startswith("data: ")]
        assert rows.pop() == "[DONE]"
        assert "".join(json.loads(row).get("text", "") for row in rows) == "w" * 30
        assert server.process.wait(10) == 0
        assert not psutil.pid_exists(worker)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_engine_ends_with_the_http_process() -> None:
    with fake_server() as server:
        worker = psutil.Process(server.worker())
        server.process.kill()
        assert worker.wait(5) is not None or not worker.is_running()


@pytest.mark.slow
def test_a_model_that_cannot_load_ends_the_server_with_its_reason() -> None:
    command = [sys.executable, "-m", "tests.support.fake_server", json.dumps({"slots": "x"})]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1
    assert "3 times while loading" in done.stderr
