"""What is sent to a running server: who gets in, how messages are told apart, and every route's bodies."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import httpx
import psutil
from fastapi.routing import APIRoute

from edge.errors import RequestError
from edge.server.app import FAMILIES
from edge.server.error_body import ErrorBody
from tests.fuzz import mutate
from tests.fuzz.runner import Used
from tests.support.fake_server import Server, launch

Draw = Callable[[Random], Any]
Check = Callable[[Any], None]
KEY, ADMIN = "key-one", "admin-one"
ORIGIN = "https://app.example"


class Watched:
    """A running server whose log is read as it grows."""

    def __init__(self, server: Server, log: Path, key: str) -> None:
        self.server = server
        self.port = int(server.url.rsplit(":", 1)[1])
        self.client = httpx.Client(base_url=server.url, timeout=30, headers={"x-api-key": key} if key else {})
        self.log = log.open(encoding="utf-8", errors="replace")
        self._processes: list[psutil.Process] = []

    def used(self) -> dict[int, float]:
        """CPU seconds of the server, its engine and its renderer."""
        try:
            return {process.pid: sum(process.cpu_times()[:2]) for process in self._processes}
        except psutil.NoSuchProcess:
            self.find_processes()
            return self.used()

    def find_processes(self) -> None:
        server = psutil.Process(self.server.process.pid)
        self._processes = [server, *server.children()]

    def check_log(self) -> None:
        text = self.log.read()
        assert "Traceback" not in text, text

    def check_answers(self) -> None:
        """It serves as before, and nothing is left running."""
        answer = self.client.post("/generate", json={"prompt": "x", "max_tokens": 2})
        assert answer.status_code == 200 and answer.json()["generate_text"] == "ok", answer.text
        until = time.monotonic() + 10
        while (info := self.client.get("/info").json())["busy_slots"] or info["waiting"]:
            assert time.monotonic() < until, info
            time.sleep(0.02)
        assert info["restarts"] == 0, info
        assert self.client.get("/ready").status_code == 200

    def send(self, data: bytes, quiet_s: float) -> bytes:
        """All that is answered to `data` until the connection is closed, or nothing came for `quiet_s`."""
        received = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as client:
            client.settimeout(quiet_s)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(data)
            while piece := client.recv(65536):
                received += piece
        return received


@contextlib.contextmanager
def watched(folder: Path, *, key: str = "", lasting: bool = True, **settings: Any) -> Iterator[Watched]:
    """A ready server over the fake backend. lasting: at the end it answers as before, by the same engine."""
    settings = {"reply": "ok, " * 5, "context": 256, "slots": 4, "batch": 64, **settings}
    command = [sys.executable, "-m", "tests.support.fake_server", json.dumps(settings)]
    with (folder / "log").open("w", encoding="utf-8") as log, launch(command, log=log) as server:
        watch = Watched(server, folder / "log", key)
        with watch.client, watch.log:
            until = time.monotonic() + 30
            while watch.client.get("/ready").status_code != 200:
                assert time.monotonic() < until
                time.sleep(0.05)
            watch.find_processes()
            yield watch
            if lasting:
                watch.check_answers()
            watch.check_log()


def routes() -> list[tuple[str, str, ErrorBody]]:
    """(method, path, the family's error body) of every route, those without /v1 included."""
    rows = []
    for router, form in FAMILIES:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            paths = [route.path, *([route.path.removeprefix("/v1")] if router.prefix == "/v1" else [])]
            rows += [(method, path, form) for method in sorted(route.methods or ()) for path in paths]
    return rows


ROUTES = routes()
# -- who gets in -----------------------------------------------------------------------------------------

_WRONG_KEYS = [
    "", "key", "key-on", "key-one1", "KEY-ONE", "key-one,key-one", "admin", "null", "undefined", "*",
    "%6bey-one", "key-one\x00", "é", "\xff" * 3, "x" * 5000, "key-two",
]  # fmt: skip
_FOREIGN = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:80", "0.0.0.0",
    "[::]", "1", "127.0.0.1@evil.example", "evil.example@", "localhost@evil.example", "[::1",
    "::ffff:1.2.3.4",
    "2130706434", "127.0.0.2.nip.io", "", " ", "localhost\\@evil.example", "localhost#.evil.example",
    "evil.example#localhost", "10.0.0.1", "169.254.169.254", "localhost,evil.example",
]  # fmt: skip
_ORIGINS = [
    "null", "https://evil.example", "http://localhost.evil.example", "http://localhost:1", "https://app.example.evil",
    "http://app.example", "https://app.example:444", "https://app.example/", "file://", "", "https://APP.example",
    "chrome-extension://x", "http://127.0.0.1:1@evil.example", "*",
]  # fmt: skip
_METHODS = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "get", "FOO"]


def _spelled(rng: Random, path: str) -> str:
    """A path as somebody writes it who wants it to be taken for another."""
    return rng.choice(
        [
            path,
            path.replace("/", "//"),
            "/health/.." + path,
            "/health%2f.." + path,
            "/health;" + path,
            path + "/",
            path + "?health",
            path + "%00",
            path + "#/health",
            path.upper(),
            "".join(f"%{ord(char):02x}" if char != "/" and rng.random() < 0.3 else char for char in path),
            "http://127.0.0.1" + path,
            "http://evil.example" + path,
            "/." + path,
            path.replace("/", "\\"),
            path + "?key=" + KEY + "&api_key=" + KEY,
        ]
    )


def _refused_by_key(rng: Random) -> list[str]:
    key = rng.choice(_WRONG_KEYS)
    headers = ["Host: " + rng.choice(["localhost", "evil.example"])]
    for _ in range(rng.randrange(3)):
        scheme = rng.choice(["Bearer", "bearer", "Basic", "Token", "Digest", ""])
        headers.append(
            rng.choice(
                [f"Authorization: {scheme} {key}", f"x-api-key: {key}", f"Cookie: x-api-key={KEY}",
                 f"key: {KEY}", f"Authorization: {scheme}{KEY}x", f"Proxy-Authorization: Bearer {KEY}",
                 "X-Forwarded-For: 127.0.0.1"]
            )
        )  # fmt: skip
    return headers


def _refused_by_host(rng: Random) -> list[str]:
    how = rng.randrange(4)
    if how == 0:
        return ["Host: " + rng.choice(_FOREIGN)]
    if how == 1:
        return ["Host: 127.0.0.1", "Origin: " + rng.choice(_ORIGINS)]
    if how == 2:
        hosts = ["Host: localhost", "Host: " + rng.choice(_FOREIGN)]
        return rng.sample(hosts, 2)
    return ["Host: localhost", "Sec-Fetch-Site: " + rng.choice(["cross-site", "same-site"])]


@contextlib.contextmanager
def access(folder: Path) -> Iterator[tuple[Draw, Check, Used]]:
    """Attempts to get in without a key, from another host's page, or by another spelling of a path."""
    (folder / "keyed").mkdir(exist_ok=True)
    (folder / "open").mkdir(exist_ok=True)

    def draw(rng: Random) -> tuple[str, bytes]:
        kind = rng.choice(["keyed", "open", "admin"])
        method, path, _ = rng.choice(ROUTES)
        if kind == "admin":
            path = rng.choice([path for _, path, _ in ROUTES if path.startswith("/admin")])
            headers = ["Host: localhost", f"x-api-key: {KEY}", f"Authorization: Bearer {KEY}"]
        else:
            headers = _refused_by_key(rng) if kind == "keyed" else _refused_by_host(rng)
        method = method if rng.random() < 0.7 else rng.choice(_METHODS)
        if rng.random() < 0.2:
            headers.append("Access-Control-Request-Method: POST")
        body = b"{}" if rng.random() < 0.5 else b""
        lines = [
            f"{method} {_spelled(rng, path)} HTTP/1.1",
            *headers,
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        return kind, "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    with (
        watched(folder / "keyed", key=KEY, keys=[KEY], admin_keys=[ADMIN]) as keyed,
        watched(folder / "open", origins=[ORIGIN]) as opened,
    ):

        def check(given: tuple[str, bytes]) -> None:
            kind, request = given
            watch = opened if kind == "open" else keyed
            answer = watch.send(request, 10.0)
            watch.check_log()
            head, _, body = answer.partition(b"\r\n\r\n")
            assert answer.count(b"HTTP/1.1 ") == 1, answer
            status = int(head.split(b" ", 2)[1])
            assert status < 500, answer
            if status < 400:
                # A link of another site to a page.
                harmless = (
                    kind == "open" and b"Sec-Fetch-Site" in request and b"content-type: text/html" in head
                )
                assert harmless or _is_open(kind, body), answer
            assert b"access-control-allow-origin" not in head.lower(), answer

        yield draw, check, lambda: keyed.used() | opened.used()


def _is_open(kind: str, body: bytes) -> bool:
    """Whether it is the answer of /health, which needs no key."""
    return kind != "open" and (not body or (b'"status"' in body and b'"models"' in body))


# -- how messages are told apart --------------------------------------------------------------------------

_INNER = b"GET /inner HTTP/1.1\r\nHost: localhost\r\n\r\n"
_LENGTH, _CHUNKED = b"Content-Length: %d\r\n", b"Transfer-Encoding: chunked\r\n"
_END = b"0\r\n\r\n"
# (headers, body) of a message whose end two readers may see in two places. %d: the whole body's length.
SMUGGLING = [
    (_LENGTH + _CHUNKED, _END + _INNER),
    (_CHUNKED + _LENGTH, _END + _INNER),
    (_LENGTH + b"Content-Length: 0\r\n", _INNER),
    (b"Content-Length: 0\r\n" + _LENGTH, _INNER),
    (b"Content-Length: 0, %d\r\n", _INNER),
    (b"Content-Length: +0\r\n", _INNER),
    (b"Content-Length: -0\r\n", _INNER),
    (b"Content-Length: 0x0\r\n", _INNER),
    (b"Content-Length: 0 0\r\n", _INNER),
    (b"Content-Length : 0\r\n", _INNER),
    (b"Content-Length: 18446744073709551616\r\n", _INNER),
    (b"Content-Length: \x0b0\r\n", _INNER),
    (b"Content-Length:\r\n 0\r\n", _INNER),
    (_LENGTH + b"Transfer-Encoding: xchunked\r\n", _END + _INNER),
    (_LENGTH + b"Transfer-Encoding: chunked, identity\r\n", _END + _INNER),
    (_LENGTH + b"Transfer-Encoding: identity, chunked\r\n", _END + _INNER),
    (_LENGTH + b"Transfer-Encoding:\x0bchunked\r\n", _END + _INNER),
    (_LENGTH + b"Transfer-Encoding : chunked\r\n", _END + _INNER),
    (_LENGTH + b"X: y\nTransfer-Encoding: chunked\r\n", _END + _INNER),
    (_LENGTH + b"Transfer-Encoding:\r\n chunked\r\n", _END + _INNER),
    (_LENGTH + _CHUNKED + b"Transfer-Encoding: identity\r\n", _END + _INNER),
    (_LENGTH + b"Transfer-Encoding: \"chunked\"\r\n", _END + _INNER),
    (_CHUNKED, b"0x0\r\n\r\n" + _INNER),
    (_CHUNKED, b"-0\r\n\r\n" + _INNER),
    (_CHUNKED, b"0;\n\r\n\r\n" + _INNER),
    (_CHUNKED, b"1\r\naX0\r\n\r\n" + _INNER),
    (_CHUNKED, b"ffffffffffffffff0\r\n\r\n" + _INNER),
    (_CHUNKED, b"0\n\n" + _INNER),
    (_CHUNKED, b" 0\r\n\r\n" + _INNER),
]  # fmt: skip


@contextlib.contextmanager
def smuggling(folder: Path) -> Iterator[tuple[Draw, Check, Used]]:
    """Messages of which a second one may be read out of the first; and heads that are damaged or too long."""

    def draw(rng: Random) -> tuple[str, bytes]:
        extra = [b"X-A: b\r\n", b"Accept: */*\r\n", b"User-Agent: x\r\n"]
        some = b"".join(rng.sample(extra, rng.randrange(4)))
        if rng.random() < 0.5:
            headers, body = rng.choice(SMUGGLING)
            headers = headers.replace(b"%d", str(len(body)).encode())
            if rng.random() < 0.3:
                headers = headers.swapcase()
            method, path = (
                rng.choice([b"POST", b"GET", b"DELETE"]),
                rng.choice([b"/generate", b"/none", b"/health"]),
            )
            return (
                "smuggling",
                method + b" " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + some + headers + b"\r\n" + body,
            )
        whole = (
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
            + some
            + _LENGTH % 12
            + b"\r\n"
            + b'{"text":"a"}'
        )
        if rng.random() < 0.2:
            long = rng.choice([b"X-Long: %s\r\n", b"%s: x\r\n"]) % (
                b"x" * rng.choice((60_000, 66_000, 10**6))
            )
            many = b"x: y\r\n" * rng.choice((9_000, 12_000, 200_000))
            head, _, rest = whole.partition(b"\r\n\r\n")
            whole = head + b"\r\n" + rng.choice((long, many)) + b"\r\n" + rest
            if len(whole) > 128 * 1024:
                return "long", whole
        else:
            whole = mutate.data(rng, whole)
        return "damaged", whole

    with watched(folder) as watch:

        def check(given: tuple[str, bytes]) -> None:
            kind, request = given
            answer = watch.send(request, 0.3)
            watch.check_log()
            statuses = [int(row[:3]) for row in answer.split(b"HTTP/1.1 ")[1:]]
            assert all(status < 500 for status in statuses), answer
            if kind == "smuggling":
                assert len(statuses) <= 1 and b"/inner" not in answer, answer
            if kind == "long":
                assert statuses in ([431], []), answer

        yield draw, check, watch.used


# -- bodies ----------------------------------------------------------------------------------------------

# One body of each route that is taken, so that what is changed lies behind the first checks.
_USER = [{"role": "user", "content": "hi"}]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "hi", "json_schema": None, "regex": None, "logit_bias": {"1": 0},
                  "stop_token_ids": [1], "messages": None},
    "/v1/chat/completions": {
        "messages": [*_USER, {"role": "assistant", "content": "a", "tool_calls": []}, *_USER], "n": 1,
        "logprobs": True, "top_logprobs": 1, "tools": [_TOOL], "tool_choice": "auto", "thinking_budget": 3,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "chat_template_kwargs": {"a": 1}, "logit_bias": {"1": 1},
    },
    "/v1/completions": {"prompt": ["a", "b"], "echo": False, "n": 1, "logprobs": 1, "logit_bias": {"1": 0}},
    "/v1/embeddings": {"input": [[1, 2], [3]], "encoding_format": "float", "dimensions": 16},
    "/v1/responses": {
        "input": [*_USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "1"}],
        "text": {"format": {"type": "text"}}, "tools": [{"type": "function", **_TOOL["function"]}],
        "instructions": "s", "reasoning": {"effort": "low"},
    },
    "/v1/messages": {
        "messages": [
            *_USER,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]},
        ],
        "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {"messages": _USER, "system": "s", "tools": []},
    "/api/chat": {"model": "fake", "messages": _USER, "tools": [_TOOL], "format": {"type": "object"},
                  "options": {"seed": 1}},
    "/api/generate": {"model": "fake", "prompt": "hi", "system": "s", "options": {"stop": ["x"]},
                      "keep_alive": "5m"},
    "/api/embed": {"model": "fake", "input": ["a"], "truncate": True},
    "/api/embeddings": {"model": "fake", "prompt": "a"},
    "/api/show": {"model": "fake"},
    "/tokenize": {"text": "a", "special": True},
    "/detokenize": {"tokens": [97]},
    "/admin/reload": {"model": "fake"},
}  # fmt: skip
# Not 500: a fault. 307: a slash too many. 503 while a model is loaded again.
ANSWERS = frozenset({200, 204, 307, 400, 401, 403, 404, 405, 408, 413, 414, 422, 429, 431, 503})


def from_schema(rng: Random, schema: Any, parts: dict[str, Any], depth: int = 6) -> Any:
    """A value that an OpenAPI schema describes, in most places. parts: the document's named schemas."""
    if depth == 0 or not isinstance(schema, dict) or rng.random() < 0.05:
        return mutate.value(rng, 2)
    if "$ref" in schema:
        return from_schema(rng, parts[schema["$ref"].rpartition("/")[2]], parts, depth)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return from_schema(rng, rng.choice(schema[key]), parts, depth - 1)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else rng.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        known = schema.get("properties", {})
        required = schema.get("required", [])
        names = [name for name in known if name in required or rng.random() < 0.25]
        values = {name: from_schema(rng, known[name], parts, depth - 1) for name in names}
        if not known:
            values |= {rng.choice(mutate.NAMES): mutate.value(rng, 2) for _ in range(rng.randrange(3))}
        return values
    if kind == "array":
        return [from_schema(rng, schema.get("items"), parts, depth - 1) for _ in range(rng.randint(1, 3))]
    if kind in ("integer", "number"):
        near = [
            schema[key]
            for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
            if key in schema
        ]
        return rng.choice([1, *near, *(number + 1 for number in near), *(number - 1 for number in near)])
    return {"string": rng.choice(["a", *mutate.TEXTS]), "boolean": rng.random() < 0.5, "null": None}.get(
        kind, mutate.value(rng, 2)
    )


def _shape(value: Any) -> Any:
    """What two error bodies of one form have in common."""
    return {key: _shape(inner) for key, inner in value.items()} if isinstance(value, dict) else None


@contextlib.contextmanager
def bodies(folder: Path) -> Iterator[tuple[Draw, Check, Used]]:
    """Every route of every API family with bodies and parameters of any kind, as JSON or nearly."""
    with watched(folder, key=ADMIN, keys=[KEY], admin_keys=[ADMIN]) as watch:
        document = watch.client.get("/openapi.json").json()
        parts = document["components"]["schemas"]
        posts = [number for number, (method, _, _) in enumerate(ROUTES) if method == "POST"]

        def draw(rng: Random) -> tuple[int, str, bytes]:
            number = rng.choice(posts if rng.random() < 0.9 else range(len(ROUTES)))
            method, path, _ = ROUTES[number]
            # The pages are not in the document.
            about = document["paths"].get(path) or document["paths"].get("/v1" + path) or {}
            about = about.get(method.lower(), {})
            for name in ("model", "name", "path"):
                path = path.replace(
                    "{" + name + "}", quote(rng.choice(["fake", *mutate.TEXTS]), errors="replace", safe="")
                )
            query = {
                parameter["name"]: from_schema(rng, parameter["schema"], parts, 2)
                for parameter in about.get("parameters", [])
                if parameter["in"] == "query" and rng.random() < 0.7
            }
            url = path + (
                "?" + "&".join(f"{k}={quote(str(v), errors='replace')[:500]}" for k, v in query.items())
                if query
                else ""
            )
            if "requestBody" not in about:
                return number, url, b""
            good = GOOD.get(ROUTES[number][1]) or GOOD.get("/v1" + ROUTES[number][1])
            if good is not None and rng.random() < 0.6:
                body = mutate.inside(rng, good)
            else:
                body = from_schema(rng, about["requestBody"]["content"]["application/json"]["schema"], parts)
            if isinstance(body, dict) and rng.random() < 0.3:
                body["stream"] = True
            return number, url, mutate.text_of(rng, body)

        def check(given: tuple[int, str, bytes]) -> None:
            number, url, body = given
            method, path, form = ROUTES[number]
            answer = watch.client.request(method, url, content=body)
            watch.check_log()
            assert answer.status_code in ANSWERS, (answer.status_code, answer.text)
            if answer.status_code >= 400:
                assert _shape(answer.json()) == _shape(form(RequestError("x"))), (path, answer.text)
            assert '"code":"internal"' not in answer.text and "fault of the server" not in answer.text, (
                answer.text
            )

        yield draw, check, watch.used


# -- clients that leave ----------------------------------------------------------------------------------


@contextlib.contextmanager
def leaving(folder: Path) -> Iterator[tuple[Draw, Check, Used]]:
    """Clients that send less than they said, read less than they get, and go without a goodbye."""

    def draw(rng: Random) -> tuple[bytes, list[int], bool]:
        path = rng.choice([path for path in GOOD if not path.startswith("/admin")])
        body = json.dumps({**GOOD[path], "stream": rng.random() < 0.8}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sent = (head + body)[: rng.choice((None, None, None, rng.randrange(len(head + body))))]
        return sent, [rng.choice((1, 10, 400)) for _ in range(rng.randrange(4))], rng.random() < 0.5

    with watched(folder) as watch:

        def check(given: tuple[bytes, list[int], bool]) -> None:
            sent, reads, reset = given
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", watch.port)) as client:
                client.settimeout(0.05)
                client.sendall(sent)
                for size in reads:
                    client.recv(size)
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            watch.check_log()

        yield draw, check, watch.used
