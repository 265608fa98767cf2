"""Reasoning told apart from answers, and its tokens counted, however a text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.reasoning import ReasoningCounter, ReasoningSplitter


def joined(text: str, inside: bool, size: int) -> tuple[str, str]:
    """(reasoning, answer) of a text that comes in pieces of `size` characters."""
    split = ReasoningSplitter(inside=inside)
    parts = [split.push(text[i : i + size]) for i in range(0, len(text), size)] + [split.finish()]
    return "".join(reasoning for reasoning, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize(
    ("text", "inside", "want"),
    [
        ("a</think>b", True, ("a", "b")),
        ("a\n</think>\n\nb\n", True, ("a", "b\n")),
        ("<think>\na\n</think>\n\nb", False, ("a", "b")),
        ("\n<think>a</think>b", False, ("a", "b")),
        ("<think>", False, ("", "")),
        ("just an answer", False, ("", "just an answer")),
        ("  spaced", False, ("", "  spaced")),
        ("cut off in thought", True, ("cut off in thought", "")),
        ("a </thin", True, ("a </thin", "")),
        ("\n\n</think>\n\nb", True, ("", "b")),
        ("<th", False, ("", "<th")),
        ("answer with <think> in it</think>", False, ("", "answer with <think> in it</think>")),
    ],
)
def test_s9_the_split_streamed_or_not(text: str, inside: bool, want: tuple[str, str]) -> None:
    for size in (1, 2, 3, 7, 100):
        assert joined(text, inside, size) == want, size


@given(st.text("<think>/ \nab", max_size=30), st.booleans(), st.integers(1, 6))
def test_any_chunking_gives_the_same_split(text: str, inside: bool, size: int) -> None:
    assert joined(text, inside, size) == joined(text, inside, 1000)


@pytest.mark.parametrize(
    ("pieces", "inside", "tokens", "thinking"),
    [
        (["hm", ".", "</think>", "7"], True, 3, False),
        (["<think>", "hm", "</think>7", "8"], False, 3, False),
        (["\n", "<thi", "nk>a", "b"], False, 2, True),
        (["no", " reasoning"], False, 0, False),
        ([" ", "<th"], False, 0, None),
    ],
)
def test_tokens_are_counted_from_tag_to_tag(
    pieces: list[str], inside: bool, tokens: int, thinking: bool | None
) -> None:
    counter = ReasoningCounter(inside=inside)
    for piece in pieces:
        counter.take(piece.encode())
    assert (counter.tokens, counter.thinking) == (tokens, thinking)
