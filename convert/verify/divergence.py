"""How far apart the next-token distributions of two models are, gathered position by position.

KL(a || b) = sum_t a(t) * (log a(t) - log b(t)), in nats, for each position; mean and 99th percentile
top-1: the share of positions whose most probable token is the same
perplexity: exp of the mean negative log likelihood of the answers' tokens
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
# Rows of a vocabulary of 150,000 in float64: 20 MB each of half a dozen arrays at once.
_ROWS = 16


@dataclass
class Divergence:
    """What `add` has seen. nll: (a, b) sums over `answered` tokens. equal_greedy: tokens of each answer."""

    kl: list[float] = field(default_factory=list)
    same: int = 0
    nll: list[float] = field(default_factory=lambda: [0.0, 0.0])
    answered: int = 0
    equal_greedy: list[int] = field(default_factory=list)
    greedy: int = 0
    not_numbers: int = 0

    def add(self, a: Logits, b: Logits, answer: list[int], *, made: bool | None) -> None:
        """a, b: (n, vocabulary) at the positions that predict `answer`, of n tokens.

        made: a greedy answer of one of them, else the data set's; None: neither, only divergence counts.
        Columns that only one has are left out.
        """
        columns = min(a.shape[1], b.shape[1])
        equal = True
        matching = 0
        for at in range(0, len(answer), _ROWS):
            tokens = np.asarray(answer[at : at + _ROWS])
            p, q = (log_softmax(part[at : at + _ROWS, :columns]) for part in (a, b))
            if not (np.isfinite(p).all() and np.isfinite(q).all()):
                self.not_numbers += len(tokens)
                equal = False
                continue
            # A divergence is never below zero; rounding may take it there.
            self.kl += np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0).tolist()
            tops = p.argmax(axis=1), q.argmax(axis=1)
            self.same += int((tops[0] == tops[1]).sum())
            if made:
                for hit in (tops[0] == tokens) & (tops[1] == tokens):
                    equal = equal and bool(hit)
                    matching += equal
            elif made is not None:
                rows = np.arange(len(tokens))
                self.nll[0] -= float(p[rows, tokens].sum())
                self.nll[1] -= float(q[rows, tokens].sum())
                self.answered += len(tokens)
        if made:
            self.equal_greedy.append(matching)
            self.greedy += len(answer)

    def numbers(self) -> dict[str, Any]:
        """For the report; empty where nothing was compared."""
        if not self.kl and not self.not_numbers:
            return {}
        if not self.kl:
            return {"positions": 0, "not_numbers": self.not_numbers}
        kl = np.asarray(self.kl)
        found: dict[str, Any] = {
            "positions": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "top1": self.same / len(kl),
        }
        if self.not_numbers:
            found["not_numbers"] = self.not_numbers
        if self.equal_greedy:
            found["greedy_equal"] = sum(self.equal_greedy)
            found["greedy_tokens"] = self.greedy
        if self.answered:
            found["perplexity"] = [float(np.exp(total / self.answered)) for total in self.nll]
        return found


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Over the last axis, in float64: sums of float32 over a vocabulary lose what small divergences are."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
