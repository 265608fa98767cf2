"""The logits of one stage, kept, and how far others are from them.

The rows are the data set's answers, and what the quicker of two stages says to the fixed prompts: greedy
texts are equal for as long as the other finds each token of it the most probable.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.verify import probes
from convert.verify.divergence import Divergence, Logits
from convert.verify.reader import Reader
from edge.artefact import manifest

GREEDY = 24  # tokens of a model's own answer
LONGEST_PROMPT = 512


@dataclass
class _Row:
    """ids: a prompt and its answer but for the last token, which predicts nothing.

    made: the answer is a model's own. None: there is no answer, it is the end of the prompt.
    """

    ids: list[int]
    answer: list[int]
    made: bool | None


class Reference:
    """The logits of one stage, computed once and kept on disk for as many comparisons as are wanted.

    a: the stage; its weights are let go of afterwards. speaker: what it is compared with, or is near to it.
    Raises InputError where the memory or the disk does not suffice.
    """

    def __init__(self, a: Reader, speaker: Reader) -> None:
        self.notes: list[str] = []
        found = probes.from_data(a.known or speaker.known)
        self.named = found.rows
        if found.note:
            self.notes.append(f"only the fixed prompts are compared: {found.note}")
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "logits"
        try:
            self._rows = [*_answers(a, found.probes), *self._continued(a, speaker)]
            self._columns = self._keep(a)
        except BaseException:
            self.close()
            raise
        finally:
            a.close()

    def against(self, b: Reader) -> dict[str, Any]:
        """The divergence of `b` from the reference, as in edge.json."""
        divergence = Divergence()
        for row, kept, logits in zip(self._rows, self._kept(), self._logits(b), strict=True):
            divergence.add(kept, logits, row.answer, made=row.made)
        numbers = divergence.numbers()
        return {**numbers, "rows": self.named} if "perplexity" in numbers else numbers

    def close(self) -> None:
        self._folder.cleanup()

    def _continued(self, a: Reader, speaker: Reader) -> list[_Row]:
        rows = []
        quick = min((speaker, a), key=lambda reader: reader.slowness)
        for prompt in a.encode([a.prompt(probe.messages) for probe in probes.fixed()]):
            made = quick.greedy(prompt, GREEDY)
            if made is not None:
                rows.append(_Row((prompt + made)[:-1], made, True))
            elif len(prompt) > 1:
                rows.append(_Row(prompt[:-1], prompt[1:][-GREEDY:], None))
        if any(row.made is None for row in rows):
            self.notes.append("no greedy text is compared: both models are too large to write one quickly")
        return rows

    def _logits(self, reader: Reader) -> Iterator[Logits]:
        return reader.all_logits([row.ids for row in self._rows], [len(row.answer) for row in self._rows])

    def _keep(self, reader: Reader) -> int:
        """Write the logits of `reader` to the file, row after row; their columns."""
        columns = 0
        # Written and read, not mapped: mapped pages would count as memory of this process.
        with self._path.open("wb") as file:
            for found in self._logits(reader):
                if not columns:
                    columns = found.shape[1]
                    total = sum(len(row.answer) for row in self._rows)
                    manifest.check_free(self._path.parent, 4 * total * columns)
                file.write(np.ascontiguousarray(found, np.float32).data)
        return columns

    def _kept(self) -> Iterator[Logits]:
        with self._path.open("rb") as file:
            for row in self._rows:
                count = len(row.answer) * self._columns
                yield np.fromfile(file, np.float32, count).reshape(len(row.answer), self._columns)


def _answers(reader: Reader, asked: list[probes.Probe]) -> list[_Row]:
    prompts = reader.encode([reader.prompt(probe.messages) for probe in asked])
    answers = reader.encode([probe.answer for probe in asked])
    return [
        _Row((prompt + answer[: probes.LONGEST_ANSWER])[:-1], answer[: probes.LONGEST_ANSWER], False)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer and len(prompt) <= LONGEST_PROMPT
    ]
