"""The report of a comparison in plain words."""

from __future__ import annotations

import pytest

from edge.ui import proof
from edge.ui.texts import Texts

REPORT = {
    "chat_template": "equal", "token_ids": "unequal", "texts": 40, "round_trip": "equal", "stops": "equal",
    "logits": {"positions": 9, "kl_mean": 0.0123, "top1": 0.968, "greedy_equal": 30, "greedy_tokens": 32,
               "perplexity": [5.2, 5.31]},
}  # fmt: skip


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_comparison_is_a_row_with_its_meaning(language: str) -> None:
    rows = proof.rows(REPORT, Texts(language))
    results = [row["result"] for row in rows]
    same, different = (("the same", "different"), ("相同", "不同"))[language == "zh"]
    assert results == [same, different, same, same, "96.8%", "30 / 32", "0.012", "5.20 → 5.31"]
    assert all(row["meaning"] and row["name"] for row in rows)


def test_what_was_not_compared_is_no_row() -> None:
    assert proof.rows({}, Texts("en")) == []
    assert len(proof.rows({"stops": "equal", "logits": {"positions": 0}}, Texts("en"))) == 1
