"""The options of `edge serve` that go together, and those that do not."""

from __future__ import annotations

import pytest

from edge.errors import UsageError
from edge.server.options import parser, replicas_of


def replicas(*words: str) -> tuple[int, int]:
    return replicas_of(parser().parse_args(["run", "--replicas", *words]))


def test_replicas() -> None:
    assert replicas("2") == (2, 2)
    assert replicas("1-4", "--name", "a", "--ctx", "64", "--threads", "1") == (1, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("0",), "--replicas 0 is neither"),
        (("4-2",), "--replicas 4-2 is neither"),
        (("many",), "--replicas many is neither"),
        (("2", "--lora", "a"), "--lora does not go with --replicas"),
        (("2", "--keep-alive", "5"), "--keep-alive does not go with --replicas"),
        (("2", "--wait"), "--wait does not go with --replicas"),
    ],
)
def test_what_does_not_go_with_replicas(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replicas(*words)


def test_replicas_are_of_a_single_model() -> None:
    with pytest.raises(UsageError, match="a single model"):
        replicas_of(parser().parse_args(["a", "b", "--replicas", "2"]))
