"""Token ids of texts, and back."""

from __future__ import annotations

import pytest

from tests.support.fake_server import Server, error, user


def test_tokens_and_back(spelling: Server) -> None:
    given = spelling.post("/tokenize", {"text": "你a"}).json()
    assert (given["tokens"], given["count"]) == ([228, 189, 160, 97], 4)
    assert spelling.post("/detokenize", {"tokens": given["tokens"]}).json()["text"] == "你a"
    turned = spelling.post("/tokenize", {"messages": user("hi")}).json()
    assert bytes(turned["tokens"]).decode() == "<user>hi<assistant>"
    assert spelling.post("/detokenize", {"tokens": [260]}).status_code == 400
    assert spelling.post("/tokenize", {}).status_code == 400


@pytest.mark.slow
def test_a_text_has_a_size(spelling: Server) -> None:
    limit = 2**20
    assert spelling.post("/tokenize", {"text": "é" * (limit // 2)}).json()["count"] == limit
    for body in ({"text": "é" * (limit // 2) + "a"}, {"messages": user("a" * limit)}):
        refused = spelling.post("/tokenize", body)
        assert (refused.status_code, error(refused)["code"]) == (413, "text_too_long")
        assert str(limit) in error(refused)["message"]
    counted = spelling.post("/v1/messages/count_tokens", {"messages": user("a" * limit)})
    assert counted.status_code == 413
