"""The budget of reasoning, and constraints that begin behind a mark."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge.backends.fake import EOS, FakeBackend
from edge.engine import protocol as msg
from edge.engine.core import Engine
from edge.engine.grammar import Constraint
from edge.engine.sampling import Params
from edge.engine.thinking_budget import ReasoningOptions
from edge.reasoning import THINK_END


def answer(
    reply: str, reasoning: ReasoningOptions, constraint: Constraint | None = None, **given: Any
) -> tuple[str, msg.Done]:
    """The text that comes of a model that wants to say `reply`."""
    backend = FakeBackend(reply=reply, context=1024, batch=256)
    events: list[msg.Event] = []
    engine = Engine(backend, events.extend)
    params = Params(temperature=0.0, **given)
    engine.submit(msg.Submit(1, "?", params, reasoning=reasoning, constraint=constraint))
    while not any(isinstance(event, (msg.Done, msg.Refused)) for event in events):
        engine.turn()
    done = (
        events[-1] if isinstance(events[-1], msg.Done) else next(e for e in events if isinstance(e, msg.Done))
    )
    text = "".join(event.text for event in events if isinstance(event, (msg.Delta, msg.Done)))
    return text, done


@pytest.mark.parametrize(
    ("reply", "inside", "want"),
    # A token of the fake is a byte: three of the reasoning, eight of its closing tag.
    [
        ("hm.</think>7", True, 11),
        ("<think>hm.</think>7", False, 12),
        ("no thought", False, 0),
        ("hm.", True, 3),
    ],
)
def test_the_tokens_of_reasoning_are_counted_and_nothing_else_is_done(
    reply: str, inside: bool, want: int
) -> None:
    text, done = answer(reply, ReasoningOptions(inside=inside))
    assert (text, done.reasoning_tokens, done.completion_tokens) == (reply, want, len(reply) + 1)


def test_reasoning_that_was_closed_by_force_is_counted_as_it_came() -> None:
    _, done = answer("m" * 200, ReasoningOptions(inside=True, budget=5), max_tokens=40)
    # Five, and the bytes of "\n</think>" that closed it.
    assert done.reasoning_tokens == 5 + 9


SEVEN = Constraint("json_schema", json.dumps({"enum": [7]}))


def test_reasoning_within_its_budget_is_left_alone() -> None:
    text, done = answer("mm</think>yes", ReasoningOptions(inside=True, budget=50))
    assert (text, done.reason) == ("mm</think>yes", "stop")


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_reasoning_over_its_budget_is_closed(budget: int) -> None:
    # Closed by force, the fake has lost its thread: what it says then does not matter here.
    text, _ = answer("m" * 200, ReasoningOptions(inside=True, budget=budget), max_tokens=40)
    assert text.startswith("m" * budget + f"\n{THINK_END}\n\n")


def test_reasoning_that_the_model_opens_has_a_budget_too() -> None:
    text, _ = answer("<think>" + "m" * 200, ReasoningOptions(budget=10), max_tokens=40)
    reasoning, mark, _ = text.partition(f"\n{THINK_END}\n\n")
    assert mark
    # The token that completes the tag is counted: 7 bytes of it, then 9 more tokens.
    assert reasoning == "<think>" + "m" * 9


def test_an_answer_without_reasoning_has_no_budget() -> None:
    text, _ = answer("just an answer that is long", ReasoningOptions(budget=3))
    assert text == "just an answer that is long"


def test_a_schema_is_for_the_answer_not_for_the_reasoning() -> None:
    text, done = answer(
        "free thought</think>\n\n7", ReasoningOptions(inside=True, constraint_after=THINK_END), SEVEN
    )
    assert text == "free thought</think>\n\n7" or text == "free thought</think>7"
    assert done.reason == "stop"


def test_a_model_that_would_end_in_its_reasoning_must_answer() -> None:
    # It wants to stop after "hm"; the end token is masked until the answer is there.
    text, done = answer(
        "hm", ReasoningOptions(inside=True, budget=8, constraint_after=THINK_END), SEVEN, max_tokens=60
    )
    assert text.endswith("7")
    assert THINK_END in text
    assert done.reason == "stop"


def test_a_budget_and_a_schema_together() -> None:
    text, _ = answer("m" * 99, ReasoningOptions(inside=True, budget=4, constraint_after=THINK_END), SEVEN)
    assert text == f"mmmm\n{THINK_END}7"


def test_a_mark_of_many_bytes_is_found_though_tokens_cut_its_characters() -> None:
    text, _ = answer("say <｜call｜>9", ReasoningOptions(constraint_after="<｜call｜>"), SEVEN, max_tokens=60)
    assert text == "say <｜call｜>7"


def test_without_its_mark_a_constraint_never_begins() -> None:
    text, done = answer("prose only", ReasoningOptions(constraint_after="<tool_call>"), SEVEN)
    assert (text, done.reason) == ("prose only", "stop")
    assert EOS in FakeBackend().info.stop_ids
