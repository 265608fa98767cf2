"""Arrivals, lengths, cancels: what the property tests of the engine draw, whatever the backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass
class Plan:
    """One request. arrival, cancel: in turns of the engine."""

    arrival: int
    prompt: list[int]
    max_tokens: int
    temperature: float
    cancel: int | None
    reuse: bool


plans = st.builds(
    Plan,
    arrival=st.integers(0, 12),
    # Few different tokens, so that prompts share prefixes and prompt lookup finds drafts.
    prompt=st.lists(st.integers(97, 99), min_size=1, max_size=24),
    max_tokens=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 1.0]),
    cancel=st.none() | st.integers(0, 20),
    reuse=st.booleans(),
)


def params(plan: Plan, key: int) -> dict[str, Any]:
    """The request's parameters; the seed is its key."""
    return {
        "max_tokens": plan.max_tokens,
        "temperature": plan.temperature,
        "seed": key,
        "logprobs": 0,
        "reuse": plan.reuse,
    }
