"""Every field has its bound, and an error names both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge.errors import RequestError
from edge.server.request_fields import PastCall
from tests.support.fake_server import CLIENT, Server, error, user


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
        ({"prompt": "a", "unheard_of": 3}, "unheard_of"),
        ({"prompt": "a", "logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {str(2**64): 1}}, "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [2**64]}, "stop_token_ids"),
        ({"prompt": "a", "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
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
        ({"max_completion_tokens": -2}, "max_completion_tokens", "greater than or equal to 1"),
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
    failure = error(response)
    assert failure["param"] == param
    assert bound in failure["message"]


@pytest.mark.parametrize("number", [260, 2**31, 2**63, 2**64, 2**70, 10**400, -1])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"tokens": [97, "ID"]}),
        ("/v1/completions", {"prompt": [97, "ID"]}),
        ("/v1/completions", {"prompt": [[97], ["ID"]]}),
        ("/v1/embeddings", {"input": ["ID"]}),
        ("/v1/embeddings", {"input": [[97], ["ID"]]}),
        ("/generate", {"prompt": "x", "stop_token_ids": ["ID"]}),
        ("/v1/chat/completions", {"messages": user(), "stop_token_ids": ["ID"]}),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": ["ID"]}),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"ID": 1}}),
        ("/v1/chat/completions", {"messages": user(), "logit_bias": {"ID": 1}}),
        ("/generate", {"prompt": "x", "logit_bias": {"ID": 1}}),
    ],
)
def test_an_id_that_no_vocabulary_has_is_refused(
    spelling: Server, path: str, body: dict[str, Any], number: int
) -> None:
    text = json.dumps(body)
    key = text.replace('{"ID"', f'{{"{number}"').replace('"ID"', str(number))
    response = CLIENT.post(spelling.url + path, content=key)
    assert response.status_code == 400, response.text
    assert "param" in error(response)


ROLES = {"system", "developer", "user", "assistant", "tool", "function"}


@pytest.mark.parametrize("role", [*sorted(ROLES), "", "System", "x" * 100, 5, None, ["user"], "moderator"])
def test_roles_are_of_a_closed_set_on_every_family(spelling: Server, role: Any) -> None:
    turns = [{"role": role, "content": "x"}, *user()]
    for path, body in (
        ("/generate", {"messages": turns}),
        ("/tokenize", {"messages": turns}),
        ("/v1/chat/completions", {"messages": turns}),
        ("/v1/responses", {"input": turns}),
        ("/api/chat", {"model": "fake", "messages": turns, "stream": False}),
        ("/v1/messages", {"messages": turns, "max_tokens": 9}),
    ):
        known = {"user", "assistant"} if path == "/v1/messages" else ROLES
        want = 200 if isinstance(role, str) and role in known else 400
        assert spelling.post(path, body).status_code == want, (path, role)


CHOICE = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes"]}}}


@pytest.mark.parametrize(
    "given",
    [
        {"structured_outputs": {"choice": ["yes", "yess"]}},
        {"structured_outputs": {"regex": "yes"}},
        {"structured_outputs": {"grammar": 'start: "yes"'}},
        {"structured_outputs": {"grammar": 'root ::= "ye" tail\ntail ::= [s]'}},
        {"guided_choice": ["yes"]},
        {"guided_regex": "yes"},
        {"guided_grammar": 'start: "yes"'},
        {"grammar": 'root ::= "yes"'},
        {"grammar": 'start: "yes"'},
        {"ebnf": 'root ::= "yes"'},
        {"regex": "yes"},
        {"response_format": {"type": "regex", "value": "yes"}},
        {"response_format": {"type": "grammar", "grammar": 'root ::= "yes"'}},
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_a_text_is_bound_in_the_words_of_any_server(
    spelling: Server, path: str, given: dict[str, Any]
) -> None:
    prompt = {"messages": user()} if "chat" in path else {"prompt": "x"}
    assert "yes" in answer_of(spelling, path, {**prompt, **given})[:4]


@pytest.mark.parametrize(
    "given",
    [
        {"structured_outputs": {"json": {"enum": [7]}}},
        {"structured_outputs": {"json": '{"enum": [7]}', "regex": None, "disable_fallback": True}},
        {"guided_json": {"enum": [7]}},
        {"guided_json": '{"enum": [7]}'},
        {"json_schema": {"enum": [7]}},
        {"format": {"enum": [7]}},
        {"response_format": {"type": "json_object", "schema": {"enum": [7]}}},
        {"response_format": {"type": "json_schema", "schema": {"enum": [7]}}},
        {"response_format": {"type": "json", "value": {"enum": [7]}}},
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_json_is_bound_in_the_words_of_any_server(spelling: Server, path: str, given: dict[str, Any]) -> None:
    prompt = {"messages": user()} if "chat" in path else {"prompt": "x"}
    assert answer_of(spelling, path, {**prompt, **given}) == "7"


def answer_of(server: Server, path: str, body: dict[str, Any]) -> str:
    answer = server.post(path, {"temperature": 0, **body}).json()
    assert "error" not in answer, answer
    if path == "/generate":
        return str(answer["generate_text"])
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"structured_outputs": {"whitespace_pattern": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [5]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": "root ::= missing"}, "grammar"),
        ({"grammar": "other ::= [a]"}, "grammar"),
        ({"ebnf": "(" * 70_000 + "::="}, "ebnf"),
        ({"grammar": "root ::= " + "(" * 5000}, "grammar"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"response_format": {"type": "json", "value": 5}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": ["json"]}}, "response_format"),
    ],
)
def test_a_form_that_cannot_be_honoured_is_refused(
    spelling: Server, given: dict[str, Any], param: str
) -> None:
    response = spelling.post("/v1/chat/completions", {"messages": user(), **given})
    assert response.status_code == 400, response.text
    assert error(response)["param"] == param


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "[]"])
def test_past_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = PastCall.model_validate({"function": {"name": "f", "arguments": arguments}})
    with pytest.raises(RequestError, match=r"arguments (is not JSON|must be a JSON object)") as caught:
        call.flat("messages[0].tool_calls[0]")
    assert caught.value.param == "messages[0].tool_calls[0]"
