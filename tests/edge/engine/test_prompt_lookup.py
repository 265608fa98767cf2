"""Drafts: what followed the newest n-gram before, and only as much of it as pays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge.engine.prompt_lookup import Lookup


def free(_: int) -> float:
    """Drafted rows cost nothing."""
    return 1.0


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 20))
def test_a_draft_is_what_followed_the_last_time(tokens: list[int], most: int) -> None:
    lookup = Lookup(tokens[:5])
    for token in tokens[5:]:
        lookup.extend(token)
    draft = lookup.draft(most, 1, free)
    places = [i for i in range(3, len(tokens)) if tokens[i - 3 : i] == tokens[-3:]]
    if not places:
        assert draft == []
        return
    # The text after the newest place; it is continued by itself where it reaches the end.
    text = list(tokens)
    for token in draft:
        assert token == text[places[-1] + len(text) - len(tokens)]
        text.append(token)
    assert 1 <= len(draft) <= min(most, 15)


@given(
    st.lists(st.tuples(st.integers(1, 15), st.floats(0, 1)), max_size=30),
    st.integers(1, 15),
    st.integers(1, 8),
    st.floats(0, 2),
)
def test_a_draft_is_never_longer_than_asked_or_than_free_rows_would_have_it(
    history: list[tuple[int, float]], most: int, streams: int, cost: float
) -> None:
    def drafted(row: float) -> int:
        lookup = Lookup([1, 2, 3, 9, 8, 7, 1, 2, 3])
        lookup.draft(1, 1, free)
        for count, share in history:
            lookup.learn(count, int(share * count))
        return len(lookup.draft(most, streams, lambda more: 1 + row * more))

    assert drafted(cost) <= drafted(0.0) <= most


def test_a_draft_is_as_wide_as_pays() -> None:
    def width(chance: float, cost: float, streams: int = 1) -> int:
        lookup = Lookup([1, 2, 3, 9, 8, 7, 6, 5, 1, 2, 3])
        lookup.short.right, lookup.short.tried = 10 * chance, 10
        return len(lookup.draft(40, streams, lambda more: 1 + cost * more))

    # For nothing: all that is there; where every row costs as much as it may bring: none.
    assert width(1.0, 0.0) == 15
    assert width(1.0, 1.0) == width(0.5, 0.6) == 0
    assert 1 <= width(0.5, 0.1) < width(0.9, 0.1) < 15
    # What one draft adds to a step is spread over all that run.
    assert width(0.7, 0.2) > width(0.7, 0.2, streams=4) == 0


def test_long_matches_are_trusted_apart_from_short_ones() -> None:
    def drafts(tokens: list[int]) -> int:
        lookup = Lookup(tokens)
        return len(lookup.draft(15, 1, lambda more: 1 + 0.35 * more))

    # Three tokens in common, and six.
    assert drafts([9, 9, 9, 1, 2, 3, 4, 8, 8, 8, 1, 2, 3]) == 1
    assert drafts([9, 9, 9, 1, 2, 3, 4, 9, 9, 9, 1, 2, 3]) > 1


def test_speculation_rests_where_it_does_not_pay_and_tries_again() -> None:
    lookup = Lookup([1, 2, 3, 9, 1, 2, 3])
    tried = []
    for step in range(3000):
        if draft := lookup.draft(8, 1, lambda more: 1 + 0.15 * more):
            tried.append(step)
            lookup.learn(len(draft), 0)
    assert tried[0] == 0 and len([step for step in tried if step < 200]) < 12
    assert tried[-1] > 200
