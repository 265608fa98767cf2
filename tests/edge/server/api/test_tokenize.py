"""Token ids of texts, and back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_server import Server, fake_server, user


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
