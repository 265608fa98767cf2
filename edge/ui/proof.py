"""What was compared of a stage with the one before it, in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge.ui.texts import Texts

# What must be the same, and what it means that it is. The keys are those of the report in edge.json.
_EXACT = {
    "chat_template": (
        "Chat template", "The model is shown a conversation in the form that it was trained on."
    ),
    "token_ids": ("Token ids", "A text becomes the same numbers."),
    "round_trip": ("Text to ids and back", "No character is lost on the way."),
    "stops": ("Stop tokens", "An answer ends where it should."),
}  # fmt: skip


def rows(verify: dict[str, Any], t: Texts) -> list[dict[str, str]]:
    """Rows of a table of what was compared: name, result and meaning. verify: the report in edge.json."""
    return [
        {"name": t(name), "result": result, "meaning": t(meaning)}
        for name, result, meaning in (*_exact(verify, t), *_near(verify.get("logits") or {}))
    ]


def _exact(verify: dict[str, Any], t: Texts) -> Iterator[tuple[str, str, str]]:
    for key, (name, meaning) in _EXACT.items():
        if key in verify:
            yield name, t("the same") if verify[key] == "equal" else t("different"), meaning


def _near(logits: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Of the probabilities: weights of fewer bits move them a little."""
    if "kl_mean" not in logits:
        return
    yield (
        "Most likely next token", f"{logits['top1']:.1%}",
        "How often both would go on with the same token.",
    )  # fmt: skip
    if "greedy_tokens" in logits:
        equal = f"{logits['greedy_equal']} / {logits['greedy_tokens']}"
        yield "Tokens of whole answers", equal, "How many are the same when both answer without chance."
    yield (
        "KL divergence, mean", f"{logits['kl_mean']:.2g}",
        "How far all probabilities have moved: 0 is not at all, four bits are usually below 0.1.",
    )  # fmt: skip
    if "perplexity" in logits:
        before, after = logits["perplexity"]
        yield (
            "Perplexity", f"{before:.2f} → {after:.2f}",
            "How surprised the model is by the answers of the data set: nearly equal is good.",
        )  # fmt: skip
