"""What is drawn of a training, and what it warns of."""

from __future__ import annotations

import pytest

from edge.ui.curves import Curve, options, thinned

NAMES = ("loss", "smooth", "eval")


def curve(losses: list[float], evals: list[float] | None = None) -> Curve:
    return Curve(
        [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        + [{"current_steps": 10 * step, "eval_loss": loss} for step, loss in enumerate(evals or [], 1)]
    )


def test_the_log_and_the_progress_are_one_curve() -> None:
    lines = [
        {"current_steps": 1, "loss": 4.0, "lr": 1e-3},
        {"current_steps": 2, "eval_loss": 3.5},
        {"stage": "training", "step": 2, "loss": 2.0},
        {"stage": "training", "step": 3, "loss": None},
        {"result": {}, "exit_code": 0},
    ]
    drawn = Curve(lines)
    assert drawn.loss == {1: 4.0, 2: 2.0} and drawn.eval_loss == {2: 3.5}
    # Of two values the later one weighs 1, the earlier one 0.9.
    assert drawn.smooth == pytest.approx({1: 4.0, 2: (0.9 * 4 + 2) / 1.9})
    names = [line["name"] for line in options({"": drawn}, NAMES)["series"]]
    assert names == ["loss", "smooth", "eval"]
    both = options({"a": drawn, "b": curve([1.0])}, NAMES)["series"]
    assert [line["name"] for line in both] == ["a: loss", "a: smooth", "a: eval", "b: loss", "b: smooth"]


def test_a_long_curve_is_thinned_to_its_end() -> None:
    points = thinned({step: float(step) for step in range(1, 5001)})
    assert len(points) <= 601 and points[0] == [1, 1.0] and points[-1] == [5000, 5000.0]
    assert thinned({}) == [] and thinned({3: 1.0, 1: 2.0}) == [[1, 2.0], [3, 1.0]]


@pytest.mark.parametrize(
    ("losses", "evals", "word"),
    [
        ([5 - 0.05 * n for n in range(60)], [3.0, 2.0, 1.5], None),
        ([2.0] * 60, [], "flat"),
        ([2.0] * 10, [], None),
        ([2.0 * 0.7**n for n in range(60)], [], "almost zero"),
        ([5 - 0.05 * n for n in range(60)], [2.0, 2.1, 2.2], "validation loss rises"),
        ([5 - 0.05 * n for n in range(60)], [2.0, 2.2, 2.1], None),
    ],
)
def test_warnings(losses: list[float], evals: list[float], word: str | None) -> None:
    found = curve(losses, evals).warnings()
    assert (not found) if word is None else (len(found) == 1 and word in found[0])
