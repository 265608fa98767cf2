"""What is asked becomes a request or a clear refusal; its tokens become text when they are sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.backends.fake import EOS, FakeBackend
from edge.engine import protocol as msg
from edge.engine.grammar import Constraint, Grammars
from edge.engine.request import Request, admit, prompt_tokens
from edge.engine.sampling import Choice, Params
from edge.engine.thinking_budget import ReasoningOptions
from edge.errors import RequestError


def request(prompt: str | list[int] = "abc", *, extra: dict[str, Any] | None = None, **given: Any) -> Request:
    backend = FakeBackend()
    submit = msg.Submit(1, prompt, Params(**given), **(extra or {}))
    return admit(submit, backend, Grammars(backend), speculate=True, arrived=10.0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"logit_bias": {260: 1.0}}, "logit_bias: token id 260"),
        ({"stop_ids": [-1]}, "stop_token_ids: token id -1"),
        ({"prompt": [1, 999]}, "prompt: token id 999"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x" * 64}, "the prompt has 64 tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_field(given: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        request(**given)
    assert caught.value.status == 400 and caught.value.param


def test_a_begin_token_is_put_before_a_text_once() -> None:
    backend = FakeBackend()
    backend.info = dataclasses.replace(backend.info, bos_id=98, add_bos=True, bos_text="b")
    assert prompt_tokens(backend, "ac") == [98, 97, 99]
    assert prompt_tokens(backend, "bac") == [98, 97, 99]
    # The same characters, but no control token.
    assert prompt_tokens(backend, "bac", special=False) == [98, 98, 97, 99]
    assert prompt_tokens(backend, [97]) == [97]


@pytest.mark.parametrize(
    ("given", "extra", "free", "plain", "drafts"),
    [
        ({}, {}, True, True, True),
        ({}, {"speculate": False}, True, True, False),
        ({"stop": ["x"]}, {}, True, False, True),
        ({"logprobs": 0}, {}, True, False, True),
        ({}, {"reasoning": ReasoningOptions()}, True, False, True),
        ({}, {"reasoning": ReasoningOptions(budget=3)}, False, False, False),
        ({}, {"constraint": Constraint("regex", "a+")}, False, False, False),
    ],
)
def test_what_its_sampling_and_its_text_depend_on(
    given: dict[str, Any], extra: dict[str, Any], free: bool, plain: bool, drafts: bool
) -> None:
    made = request(extra=extra, **given)
    assert (made.free, made.plain, made.lookup is not None) == (free, plain, drafts)


def test_a_constraint_that_rules_at_once_leaves_no_reasoning_to_bound() -> None:
    options = ReasoningOptions(inside=True, budget=0)
    made = request(extra={"constraint": Constraint("regex", "ab"), "reasoning": options})
    assert made.thinking_budget is None and made.matcher is not None
    assert [made.take(Choice(token)) for token in b"ab"] == [None, "stop"]


@given(st.text(max_size=12), st.lists(st.integers(1, 5), max_size=8), st.booleans())
def test_text_is_the_same_whenever_it_is_sent(text: str, sent_after: list[int], plain: bool) -> None:
    made = request(**({} if plain else {"stop": ["\x00never"]}))
    assert made.plain == plain
    tokens, events = list(text.encode()), list[msg.Delta]()
    for count in sent_after:
        for token in tokens[:count]:
            assert made.take(Choice(token)) is None
        del tokens[:count]
        events.append(made.delta())
    for token in tokens:
        made.take(Choice(token))
    done = made.done("stop", 20.0)
    assert "".join(event.text for event in events) + done.text == text
    assert sum(event.tokens for event in events) + done.tokens == len(text.encode())
    assert done.completion_tokens == len(text.encode())
    # Half a character is never shown.
    assert not any("\ufffd" in event.text for event in events) or "\ufffd" in text


def test_the_reason_to_finish() -> None:
    made = request(max_tokens=3)
    assert [made.take(Choice(token)) for token in b"xyz"] == [None, None, "length"]
    made = request(max_tokens=3)
    assert [made.take(Choice(token)) for token in (120, EOS)] == [None, "stop"]
    assert (made.done("stop", 20.0).text, made.done("stop", 20.0).completion_tokens) == ("x", 2)
    made = request(stop=["yz"])
    assert [made.take(Choice(token)) for token in b"xyz"] == [None, None, "stop"]
    done = made.done("stop", 20.0)
    assert (done.text, done.stop) == ("x", "yz")


def test_times_are_counted_from_phase_to_phase() -> None:
    made = request(extra={"timeout_s": 5.0})
    assert made.deadline == 15.0
    made.started, made.first = 11.0, 13.0
    done = made.done("length", 17.0)
    assert (done.queue_s, done.prefill_s, done.decode_s) == (1.0, 2.0, 4.0)
    waited = request().done("cancelled", 12.0)
    assert (waited.queue_s, waited.prefill_s, waited.decode_s) == (2.0, 0.0, 0.0)
