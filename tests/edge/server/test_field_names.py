"""Fields of other servers are honoured under our names, ignored as hints, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel

from edge.errors import RequestError
from edge.server.app import FAMILIES
from edge.server.field_names import resolved
from edge.server.request_fields import Body
from tests.support.fake_server import CHAT, Server, error, fake_server, user

FIELDS = {"max_tokens": 1, "repetition_penalty": 1, "stop": 1, "seed": 1}
# One asked-for body of each family.
ROUTES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": user()},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": user(), "max_tokens": 5},
    "/api/chat": {"model": "fake", "messages": user(), "stream": False},
    "/generate": {"prompt": "x"},
}
REFUSED: dict[str, Any] = {
    "allowed_token_ids": [1], "bad_words": ["x"], "chat_template": "x", "truncate_prompt_tokens": 5,
    "documents": [{"text": "x"}], "mirostat": 2, "typical_p": 0.5, "dry_multiplier": 0.8,
    "xtc_probability": 0.5, "no_repeat_ngram_size": 2, "use_beam_search": True, "functions": [{"name":
    "f"}], "web_search_options": {"a": 1}, "modalities": ["audio"], "prompt_logprobs": 1,
    "guided_whitespace_pattern": "x", "structural_tag": {"a": 1}, "logits_processors": ["x"],
    "best_of_beams": 3, "length_penalty": 2, "skip_special_tokens": False, "top_a": 0.5, "dynatemp_range":
    0.5, "sampling_params": {"temperature": 0}, "extra_body": {"top_k": 1}, "return_tokens_as_token_ids":
    True, "mcp_servers": [{"url": "x"}], "negative_prompt": "x",
}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "mirostat": 0, "typical_p": 1.0, "dry_multiplier": 0, "xtc_probability": 0.0, "length_penalty": 1.0,
    "use_beam_search": False, "bad_words": [], "suffix": "", "skip_special_tokens": True, "modalities":
    ["text"], "repeat_last_n": 64, "function_call": "none", "documents": None,
}  # fmt: skip
HINTS: dict[str, Any] = {
    "prediction": {"type": "content", "content": "x"}, "user": "u", "metadata": {"a": "b"},
    "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "mirostat_tau": 5.0,
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_could_change_the_answer_is_refused_by_name(spelling: Server, route: str, name: str) -> None:
    response = spelling.post(route, {**ROUTES[route], name: REFUSED[name]})
    assert response.status_code == 400
    assert name in response.text


@pytest.mark.parametrize("route", ROUTES)
def test_what_asks_for_nothing_and_hints_pass(spelling: Server, route: str) -> None:
    response = spelling.post(route, {**ROUTES[route], **NEUTRAL, **HINTS})
    assert response.status_code == 200, response.text
    assert "x-edge-ignored" not in response.headers


def test_a_field_that_nothing_knows_is_ignored_and_the_answer_says_so(spelling: Server) -> None:
    for route in list(ROUTES)[:-1]:
        response = spelling.post(route, {**ROUTES[route], "zeta": 1, "alpha": {}, "a\r\nb": 1})
        assert (response.status_code, response.headers["x-edge-ignored"]) == (200, "alpha, zeta")
    response = spelling.post("/generate", {"prompt": "x", "zeta": 1})
    assert (response.status_code, error(response)["param"]) == (400, "zeta")


@pytest.mark.parametrize("name", ["max_new_tokens", "n_predict", "num_predict", "max_completion_tokens"])
@pytest.mark.parametrize("route", [CHAT, "/v1/completions", "/generate"])
def test_other_names_of_the_limit_are_honoured(spelling: Server, route: str, name: str) -> None:
    body = spelling.post(route, {**ROUTES[route], name: 2}).json()
    assert body["usage"]["completion_tokens"] == 2
    unbounded = spelling.post(route, {**ROUTES[route], name: -1})
    assert unbounded.status_code == 200


@pytest.mark.slow
def test_minus_one_means_no_bound() -> None:
    with fake_server(reply="word " * 200, context=1024, slots=1) as long:
        answer = long.post("/generate", {"prompt": "x", "max_tokens": -1, "top_k": -1}).json()
    assert answer["usage"]["completion_tokens"] == 1001


def test_minus_one_is_taken_and_no_other_negative_number(spelling: Server) -> None:
    unbounded = {"messages": user(), "max_tokens": -1, "top_k": -1}
    assert spelling.post("/v1/messages", unbounded).status_code == 200
    for bad in ({"max_tokens": -2}, {"max_tokens": "-1"}, {"top_k": -2}):
        assert spelling.post(CHAT, {"messages": user(), **bad}).status_code == 400, bad


def test_names_of_one_meaning() -> None:
    assert resolved({"repeat_penalty": 1.1, "random_seed": 3, "stop_sequences": ["x"]}, FIELDS) == {
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop": ["x"],
    }
    assert resolved({"n_predict": 5, "max_tokens": 5, "seed": None}, FIELDS) == {"max_tokens": 5}
    with pytest.raises(RequestError, match="mean the same"):
        resolved({"n_predict": 5, "max_tokens": 6}, FIELDS)
    with pytest.raises(RequestError, match="repeat_last_n is not supported: the penalty looks at everything"):
        resolved({"repeat_penalty": 1.1, "repeat_last_n": 64}, FIELDS)
    with pytest.raises(RequestError, match="stop is not supported"):
        resolved({"stop": "x"}, {"input"})


def test_no_route_takes_a_body_around_the_table() -> None:
    bodies: set[type[BaseModel]] = set()
    for router, _ in FAMILIES:
        for route in router.routes:
            if isinstance(route, APIRoute) and route.body_field is not None:
                bodies.add(route.body_field.field_info.annotation)  # type: ignore[arg-type]
    assert len(bodies) > 8
    assert [body for body in bodies if not issubclass(body, Body)] == []
