"""Token ids of texts, and back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_server import Server, error, fake_server, user


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with fake_server(reply="x", context=256, slots=4) as started:
        yield started


def test_tokens_and_back(server: Server) -> None:
    given = server.post("/tokenize", {"text": "你a"}).json()
    assert (given["tokens"], given["count"]) == ([228, 189, 160, 97], 4)
    assert server.post("/detokenize", {"tokens": given["tokens"]}).json()["text"] == "你a"
    turned = server.post("/tokenize", {"messages": user("hi")}).json()
    assert bytes(turned["tokens"]).decode() == "<user>hi<assistant>"
    assert server.post("/detokenize", {"tokens": [260]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400


def test_a_text_has_a_size(server: Server) -> None:
    limit = 2**20
    assert server.post("/tokenize", {"text": "é" * (limit // 2)}).json()["count"] == limit
    for body in ({"text": "é" * (limit // 2) + "a"}, {"messages": user("a" * limit)}):
        refused = server.post("/tokenize", body)
        assert (refused.status_code, error(refused)["code"]) == (413, "text_too_long")
        assert str(limit) in error(refused)["message"]
    counted = server.post("/v1/messages/count_tokens", {"messages": user("a" * limit)})
    assert counted.status_code == 413
