"""OpenAI's responses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_server import Server, fake_server, named_events

THINKER = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    common = {"context": 256, "slots": 4}
    models = {
        "fake": {**common, "reply": "你好, world!"},
        "thinker": {**common, "reply": "well</think>\n\nseven", "chat_template": THINKER},
    }
    with fake_server(models=models) as started:
        yield started


def test_responses_are_stateless_and_in_order(server: Server) -> None:
    url = "/v1/responses"
    whole = server.post(url, {"model": "thinker", "input": "hi"}).json()
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message"]
    assert whole["output"][1]["content"][0]["text"] == "seven"
    assert whole["status"] == "completed"
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": len("well</think>")}
    rows = named_events(server.post(url, {"model": "thinker", "input": "hi", "stream": True}))
    kinds = [row["type"] for row in rows]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert [row["sequence_number"] for row in rows] == list(range(len(rows)))
    assert "".join(r["delta"] for r in rows if r["type"] == "response.output_text.delta") == "seven"
    assert rows[-1]["response"]["output"][1]["content"] == whole["output"][1]["content"]
    short = server.post(url, {"input": "hi", "max_output_tokens": 3}).json()
    assert short["incomplete_details"] == {"reason": "max_output_tokens"}
    for name, value in (("previous_response_id", "resp_1"), ("store", True), ("background", True)):
        refused = server.post(url, {"input": "hi", name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
