"""OpenAI's older completions."""

from __future__ import annotations

import time

import pytest

from tests.support.fake_server import Server, events, fake_server
from tests.support.family_server import REPLY


def test_lists_of_prompts_in_the_older_interface(server: Server) -> None:
    url = "/v1/completions"
    body = {"prompt": ["ab", "cd"], "temperature": 0, "echo": True}
    whole = server.post(url, body).json()
    assert [c["text"] for c in whole["choices"]] == ["ab" + REPLY, "cd" + REPLY]
    assert whole["usage"]["prompt_tokens"] == 4
    texts = {0: "", 1: ""}
    for row in events(server.post(url, {**body, "stream": True})):
        for choice in row["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "ab" + REPLY, 1: "cd" + REPLY}
    ids = server.post(url, {"prompt": [[97, 98], [99]], "echo": True}).json()
    assert [c["text"][:2] for c in ids["choices"]] == ["ab", "c你"]
    assert server.post(url, {"prompt": "x", "echo": True, "logprobs": 1}).status_code == 400
    assert server.post(url, {"prompt": ["x"] * 33, "n": 2}).json()["error"]["param"] == "n"
    assert server.post(url, {"prompt": [[1, 999]]}).status_code == 400


@pytest.mark.slow
def test_when_one_of_many_cannot_start_none_goes_on() -> None:
    """What the engine refuses, and what cannot even be sent to it."""
    with fake_server(reply="x" * 5000, context=4096, slots=4, step_s=0.02, max_queue=64) as slow:
        for bad in ([999], [2**70], [-1]):
            body = {"prompt": [[97]] * 63 + [bad], "max_tokens": 3000, "speculate": False}
            for streamed in (False, True):
                began = time.monotonic()
                response = slow.post("/v1/completions", {**body, "stream": streamed})
                assert '"error"' in response.text
                assert streamed or response.status_code >= 400
                slow.until(lambda info: info["running"] == info["waiting"] == 0, seconds=2.0)
                assert time.monotonic() - began < 5.0


def test_u23_as_many_alternatives_as_the_chat_gives(server: Server) -> None:
    for count in (0, 10, 20):
        choice = server.post("/v1/completions", {"prompt": "x", "logprobs": count}).json()["choices"][0]
        # Pieces of characters have one text, so there may be fewer.
        assert all(len(top) <= count for top in choice["logprobs"]["top_logprobs"])
        assert any(choice["logprobs"]["top_logprobs"]) == bool(count)
    refused = server.post("/v1/completions", {"prompt": "x", "logprobs": 21})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
