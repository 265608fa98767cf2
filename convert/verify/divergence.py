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

from edge.backends.base import Logits

# Rows of a vocabulary of 150,000 in float64: 20 MB each of half a dozen arrays at once.
_ROWS = 16


@dataclass
class Divergence:
    """What was added. nll: (a, b) sums over `answered` tokens. greedy, equal_greedy: of greedy answers."""

    kl: list[float] = field(default_factory=list)
    same: int = 0
    nll: list[float] = field(default_factory=lambda: [0.0, 0.0])
    answered: int = 0
    equal_greedy: int = 0
    greedy: int = 0
    not_numbers: int = 0

    def add(self, a: Logits, b: Logits, answer: list[int], *, greedy: bool | None) -> None:
        """a, b: (n, vocabulary) at the positions that predict `answer`, of n tokens.

        greedy: the answer is one of the models' own, else the data set's; None: neither, only divergence
        counts. Columns that only one has are left out.
        """
        columns = min(a.shape[1], b.shape[1])
        equal = True
        for start in range(0, len(answer), _ROWS):
            tokens = np.asarray(answer[start : start + _ROWS])
            p, q = (log_softmax(part[start : start + _ROWS, :columns]) for part in (a, b))
            if not (np.isfinite(p).all() and np.isfinite(q).all()):
                self.not_numbers += len(tokens)
                equal = False
                continue
            # A divergence is never below zero; rounding may take it there.
            self.kl += np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0).tolist()
            tops = p.argmax(axis=1), q.argmax(axis=1)
            self.same += int((tops[0] == tops[1]).sum())
            if greedy:
                for hit in (tops[0] == tokens) & (tops[1] == tokens):
                    equal = equal and bool(hit)
                    self.equal_greedy += equal
            elif greedy is not None:
                rows = np.arange(len(tokens))
                self.nll[0] -= float(p[rows, tokens].sum())
                self.nll[1] -= float(q[rows, tokens].sum())
                self.answered += len(tokens)
        if greedy:
            self.greedy += len(answer)

    def numbers(self) -> dict[str, Any]:
        """For the report; empty where nothing was compared."""
        if not self.kl:
            return {"positions": 0, "not_numbers": self.not_numbers} if self.not_numbers else {}
        kl = np.asarray(self.kl)
        numbers: dict[str, Any] = {
            "positions": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "top1": self.same / len(kl),
        }
        if self.not_numbers:
            numbers["not_numbers"] = self.not_numbers
        if self.greedy:
            numbers |= {"greedy_equal": self.equal_greedy, "greedy_tokens": self.greedy}
        if self.answered:
            numbers["perplexity"] = [float(np.exp(total / self.answered)) for total in self.nll]
        return numbers


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Over the last axis, in float64: sums of float32 over a vocabulary lose what small divergences are."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
