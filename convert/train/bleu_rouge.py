"""BLEU-4 and ROUGE of an answer against its reference, as LLaMA-Factory reports them, in percent.

BLEU is over characters with NIST's smoothing (Chen and Cherry 2014, technique 3); ROUGE is the F-score over
the words that jieba finds, in Chinese as in English, ROUGE-1 and -2 over distinct n-grams.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from edge.errors import UnavailableError
from edge.setup import install_command

NAMES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
_TINY = 1e-8


def words() -> Callable[[str], list[str]]:
    """A function that splits a text into words. Raises UnavailableError without jieba."""
    if importlib.util.find_spec("jieba") is None:
        raise UnavailableError("ROUGE of Chinese needs the package 'jieba'", install_command("train"))
    with warnings.catch_warnings():
        # Its regular expressions and its way to find its dictionary are older than this Python.
        warnings.simplefilter("ignore")
        import jieba

        jieba.setLogLevel(logging.ERROR)
        jieba.initialize()

    def split(text: str) -> list[str]:
        return " ".join(jieba.cut(text)).split()

    return split


def score(answer: str, reference: str, split: Callable[[str], list[str]]) -> dict[str, float]:
    """Each of NAMES, from 0 to 100; ROUGE is 0 where either has no words."""
    scores = {"bleu-4": bleu(answer, reference)}
    ours, theirs = split(answer), split(reference)
    if not ours or not theirs:
        return {name: round(100 * scores.get(name, 0.0), 4) for name in NAMES}
    for size in (1, 2):
        mine, wanted = (set(_grams(one, size)) for one in (ours, theirs))
        scores[f"rouge-{size}"] = _f_score(len(mine & wanted), len(mine), len(wanted))
    scores["rouge-l"] = _f_score(_common(ours, theirs), len(ours), len(theirs))
    return {name: round(100 * scores[name], 4) for name in NAMES}


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU-4 over characters, from 0 to 1."""
    logs, zeros = 0.0, 0
    for size in range(1, 5):
        mine, wanted = Counter(_grams(answer, size)), Counter(_grams(reference, size))
        hits = sum(min(count, wanted[gram]) for gram, count in mine.items())
        total = max(1, sum(mine.values()))
        if size == 1 and not hits:
            return 0.0
        if not hits:
            zeros += 1
        logs += math.log(hits / total if hits else 1 / (2**zeros * total)) / 4
    short = 1.0 if len(answer) > len(reference) else math.exp(1 - len(reference) / len(answer))
    return short * math.exp(logs)


def _grams(items: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(items[at : at + size]) for at in range(len(items) - size + 1)]


def _f_score(common: int, ours: int, theirs: int) -> float:
    precision, recall = common / ours if ours else 0.0, common / theirs if theirs else 0.0
    return 2 * precision * recall / (precision + recall + _TINY)


def _common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for at, against in enumerate(other, 1):
            diagonal, row[at] = row[at], diagonal + 1 if word == against else max(row[at], row[at - 1])
    return row[-1]
