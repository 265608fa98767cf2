"""The logits of one stage, kept on disk, and how far the logits of others are from them.

The rows are the data set's answers, and greedy answers of the faster reader to the fixed prompts: another
stage's greedy text is equal for as long as it finds each of their tokens the most probable.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.verify import probes
from convert.verify.divergence import Divergence
from convert.verify.reader import Reader
from edge.artefact import manifest
from edge.backends.base import Logits
from edge.progress import counted

GREEDY = 24  # tokens of a model's own answer
LONGEST_PROMPT = 512


@dataclass
class _Row:
    """ids: a prompt and its answer but for the last token, which predicts nothing.

    greedy: the answer is a model's own, not the data set's. None: there is no answer, it is the prompt's end.
    """

    ids: list[int]
    answer: list[int]
    greedy: bool | None


class Reference:
    """The logits of the stage `a`, computed once and kept on disk for as many comparisons as are wanted.

    a: its weights are let go of afterwards. speaker: what it is compared with, or is near to it.
    Raises InputError where the memory or the disk does not suffice.
    """

    def __init__(self, a: Reader, speaker: Reader) -> None:
        self.notes: list[str] = []
        data = probes.from_data(a.manifest or speaker.manifest)
        self._data_rows = data.rows
        if data.note:
            self.notes.append(f"only the fixed prompts are compared: {data.note}")
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "logits"
        try:
            self._rows = [*_answers(a, data.probes), *self._continued(a, speaker)]
            self._keep(a)
        except BaseException:
            self.close()
            raise
        finally:
            a.close()

    def against(self, b: Reader) -> dict[str, Any]:
        """The divergence of `b` from the reference, as in edge.json."""
        divergence = Divergence()
        for row, kept, logits in zip(
            counted(self._rows, "texts"), self._kept(), self._logits(b), strict=True
        ):
            divergence.add(kept, logits, row.answer, greedy=row.greedy)
        numbers = divergence.numbers()
        return {**numbers, "rows": self._data_rows} if "perplexity" in numbers else numbers

    def close(self) -> None:
        self._folder.cleanup()

    def _continued(self, a: Reader, speaker: Reader) -> list[_Row]:
        rows = []
        faster = min((speaker, a), key=lambda reader: reader.slowness)
        prompts = a.prompt_ids(probe.messages for probe in probes.fixed())
        for prompt, answer in zip(prompts, faster.greedy_of_all(prompts, GREEDY), strict=True):
            if answer is not None:
                rows.append(_Row((prompt + answer)[:-1], answer, True))
            elif len(prompt) > 1:
                rows.append(_Row(prompt[:-1], prompt[1:][-GREEDY:], None))
        if any(row.greedy is None for row in rows):
            self.notes.append("no greedy text is compared: both models are too large to write one quickly")
        return rows

    def _logits(self, reader: Reader) -> Iterator[Logits]:
        return reader.all_logits([row.ids for row in self._rows], [len(row.answer) for row in self._rows])

    def _keep(self, reader: Reader) -> None:
        """Write the logits of `reader` to the file, row after row."""
        positions = sum(len(row.answer) for row in self._rows)
        manifest.check_free(self._path.parent, 4 * positions * reader.vocab)
        # Written and read, not mapped: mapped pages would count as memory of this process.
        with self._path.open("wb") as file:
            for _, logits in zip(counted(self._rows, "texts"), self._logits(reader), strict=True):
                np.save(file, np.asarray(logits, np.float32))

    def _kept(self) -> Iterator[Logits]:
        with self._path.open("rb") as file:
            yield from (np.load(file) for _ in self._rows)


def _answers(reader: Reader, asked: list[probes.Probe]) -> list[_Row]:
    prompts = reader.prompt_ids(probe.messages for probe in asked)
    answers = reader.answer_ids(probe.answer for probe in asked)
    return [
        _Row((prompt + answer[: probes.LONGEST_ANSWER])[:-1], answer[: probes.LONGEST_ANSWER], False)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer and len(prompt) <= LONGEST_PROMPT
    ]
