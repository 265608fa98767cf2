"""OpenAI's responses."""

from __future__ import annotations

from tests.support.fake_server import Server, named_events


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


CODEX = [
    {
        "type": "custom",
        "name": "apply_patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "x"},
    },
    {"type": "web_search", "external_web_access": False},
]
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


def test_u15_tools_that_the_model_cannot_call_are_not_offered(server: Server) -> None:
    answer = server.post("/v1/responses", {"input": "hi", "tools": [*CODEX, TOOL]}).json()
    assert [tool["name"] for tool in answer["tools"]] == ["f"]
    assert server.post("/v1/responses", {"input": "hi", "tools": CODEX}).status_code == 200
    for choice in ("required", {"type": "custom", "name": "apply_patch"}, {"type": "web_search"}):
        refused = server.post("/v1/responses", {"input": "hi", "tools": CODEX, "tool_choice": choice})
        assert refused.status_code == 400, choice
    for kind in ("mcp", "file_search", "code_interpreter", "computer_use_preview"):
        refused = server.post("/v1/responses", {"input": "hi", "tools": [{"type": kind}]})
        assert refused.status_code == 400, kind


def test_u23_a_choice_among_some_of_the_tools(server: Server) -> None:
    # Open arguments may be cut off by the context before they end.
    closed = {"type": "object", "properties": {}, "additionalProperties": False}
    other = {**TOOL, "name": "other", "parameters": closed}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    body = {"input": "hi", "tools": [TOOL, other], "tool_choice": choice, "parallel_tool_calls": False}
    [call] = server.post("/v1/responses", body).json()["output"]
    assert (call["type"], call["name"]) == ("function_call", "other")
    choice["tools"] = [{"type": "function", "name": "third"}]
    assert server.post("/v1/responses", body).json()["error"]["param"] == "tool_choice"


def test_a_call_of_the_past_needs_a_name(server: Server) -> None:
    call = {"type": "function_call", "call_id": "c", "arguments": "{}", "name": "f"}
    for name in ("", None, 5, "x" * 129, ["f"]):
        response = server.post("/v1/responses", {"input": [{**call, "name": name}]})
        assert response.status_code == 400, name
        assert response.json()["error"]["param"].startswith("input[0]")
    del call["name"]
    assert server.post("/v1/responses", {"input": [call]}).status_code == 400
    # Reasoning alone makes no message.
    assert server.post("/v1/responses", {"input": [{"type": "reasoning", "summary": []}]}).status_code in (
        200,
        400,
    )
