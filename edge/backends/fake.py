"""A backend without a model, for tests: exact, instant, and strict.

Its KV cache is a chain of hashes, so that the next token depends on every token before it and on nothing
else: a wrong position, a stale prefix or a mixed-up slot changes the output.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.backends.base import Backend, BackendInfo, Cells, Logits, Row, StepInterrupted, check_rows
from edge.errors import EdgeError
from edge.prompt import AddedTokens

EOS = 256
MARKS_AT = 257
VOCAB = 260
_MASK = (1 << 64) - 1


class FakeBackend(Backend):
    """Tokens are bytes; 256 ends a turn. `pieces` replaces the bytes of token i by pieces[i]. marks: texts of
    the control tokens 257 to 259.

    reply: the answer before the end token: a text, or a function of the ids so far; None: a hash decides.
    script: pairs of texts; the second answers every prompt that contains the first.
    capacity: of a unified KV cache; None: per-slot KV buffers. embedding: length of its vectors, which count
    tokens by their ids.
    step_s: seconds of a step; token_s: for each token of it. fails_at: which step fails, 0: none.
    """

    def __init__(
        self,
        *,
        slots: int = 4,
        context: int = 64,
        capacity: int | None = None,
        batch: int = 32,
        reply: Callable[[list[int]], list[int]] | str | None = None,
        script: Sequence[Sequence[str]] = (),
        pieces: Sequence[bytes] | None = None,
        marks: Sequence[str] = (),
        chat_template: str | None = None,
        embedding: int = 16,
        step_s: float = 0.0,
        token_s: float = 0.0,
        fails_at: int = 0,
        overlaps: bool = False,
    ) -> None:
        super().__init__(slots)
        self.info = BackendInfo(
            kind="fake",
            name="fake",
            device="none",
            why="a fake for tests",
            slots=slots,
            context=context,
            capacity=slots * context if capacity is None else capacity,
            shared=capacity is not None,
            batch=batch,
            outputs=slots + 16,
            vocab=VOCAB,
            stop_ids=frozenset({EOS}),
            chat_template=chat_template,
            embedding=embedding,
            overlaps=overlaps,
            token_bytes=max(map(len, pieces or marks), default=1),
            added=AddedTokens(tuple(marks)),
        )
        self._reply = (lambda _: list(reply.encode("utf-8"))) if isinstance(reply, str) else reply
        self._script = [(part.encode("utf-8"), list(answer.encode("utf-8"))) for part, answer in script]
        self._pieces = pieces
        self._marks = {mark: MARKS_AT + i for i, mark in enumerate(marks)}
        self._step_s = step_s
        self._token_s = token_s
        self._fails_at = fails_at
        self._held: list[list[tuple[int, int, int]]] = [[] for _ in range(slots)]
        self._cells = 0
        self.steps: list[int] = []

    def encode(self, text: str, *, special: bool) -> list[int]:
        if self._pieces is None:
            found = re.split(f"({'|'.join(map(re.escape, self._marks))})", text) if self._marks else [text]
            parts = ([self._marks[part]] if part in self._marks else part.encode("utf-8") for part in found)
            return [token for part in parts for token in part]
        rest, ids = text.encode("utf-8"), []
        while rest:
            best = max((p for p in self._pieces if p and rest.startswith(p)), key=len)
            ids.append(self._pieces.index(best))
            rest = rest[len(best) :]
        return ids

    def decode(self, token: int) -> bytes:
        if self._pieces is not None:
            return self._pieces[token] if token < len(self._pieces) else b""
        return bytes([token]) if token < 256 else b""

    def step(self, rows: Sequence[Row]) -> Logits:
        total = check_rows(rows, self.info, self._lengths)
        self._interrupted = False
        until = time.monotonic() + self._step_s + self._token_s * total
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.005))
            if self._interrupted:
                raise StepInterrupted
        if self._fails_at and len(self.steps) + 1 >= self._fails_at:
            raise EdgeError(f"the fake failed in a step of {total} tokens", "its settings say so (fails_at)")
        if self.info.overlaps:
            self.meanwhile()
        out = np.zeros((sum(row.outputs for row in rows), VOCAB), np.float32)
        filled = 0
        for row in rows:
            held = self._held[row.slot]
            self._lengths[row.slot] += len(row.tokens)
            for i, token in enumerate(row.tokens):
                before = held[-1][1] if held else 0x9E3779B97F4A7C15
                self._cells += 1
                held.append((token, (before ^ (token + 1)) * 0xBF58476D1CE4E5B9 & _MASK, self._cells))
                if i >= len(row.tokens) - row.outputs:
                    self._fill(out[filled], held)
                    filled += 1
        if self.info.shared and self.used() > self.info.capacity:
            raise ValueError("the unified KV cache overflowed")
        self.steps.append(total)
        return out

    def _fill(self, logits: Logits, held: list[tuple[int, int, int]]) -> None:
        state = held[-1][1]
        # A few candidates of falling weight, so that sampling has something to choose from.
        for rank in range(4):
            logits[(state >> (8 * rank + 3)) % 256] += 8.0 / (rank + 1)
        if (state >> 40) % 23 == 0:
            logits[EOS] += 20.0
        ids = [token for token, _, _ in held] if self._reply or self._script else []
        answer = self._scripted(ids) or (self._reply(ids) if self._reply is not None else None)
        if answer is not None:
            done = next(n for n in range(len(answer), -1, -1) if ids[len(ids) - n :] == answer[:n])
            logits[:] = 0.0
            logits[answer[done] if done < len(answer) else EOS] = 20.0

    def _scripted(self, ids: list[int]) -> list[int] | None:
        if not self._script:
            return None
        text = bytes(token for token in ids if token < 256)
        return next((answer for part, answer in self._script if part in text), None)

    def used(self) -> int:
        """KV cells in use; one that several slots hold counts once."""
        return len({cell for held in self._held for _, _, cell in held})

    def _copy(self, src: int, dst: int, n: int) -> None:
        self._held[dst] = self._held[src][:n]

    def _truncate(self, slot: int, n: int) -> None:
        del self._held[slot][n:]

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        vector = np.bincount(np.asarray(tokens) % self.info.embedding, minlength=self.info.embedding)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def save(self, slot: int) -> bytes:
        return json.dumps([(token, state) for token, state, _ in self._held[slot]]).encode("ascii")

    def _restore(self, slot: int, cells: Cells, length: int) -> bool:
        rows = json.loads(bytes(cells))
        if len(rows) != length:
            raise ValueError(f"restore of {length} tokens from {len(rows)}")
        for token, state in rows:
            self._cells += 1
            self._held[slot].append((token, state, self._cells))
        return True

    def close(self) -> None:
        self._held = []
