"""Workloads: kinds of requests, made by seed from the sentences below.

Prompts of one workload differ from their first words on, so that no server can reuse another prompt's prefix,
unless the workload is about that.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from edge.errors import UsageError


@dataclass(frozen=True)
class Job:
    """One request to make: the prompt, its number in the workload, and the output tokens to force.

    reuse, speculate: whether the server may take over what it computed before, and look ahead.
    """

    prompt: str
    index: int
    tokens: int
    reuse: bool = False
    speculate: bool = False


@dataclass(frozen=True)
class Plan:
    """What to measure. budget_s: seconds that the measured rounds may take; at most `rounds` of each case.

    Where one round of each does not fit, answers are shortened to no less than `least` tokens. targets:
    names, or NAME=URL for servers that run already.
    """

    tokens: int = 64
    least: int = 16
    clients: tuple[int, ...] = (1, 8)
    workloads: tuple[str, ...] = ("mixed",)
    targets: tuple[str, ...] = ("baseline", "edge")
    rounds: int = 5
    budget_s: float = 100.0
    sweep: bool = False


_OPENINGS = (
    "A traveller from the north asked the keeper of the lighthouse",
    "In the kitchen behind the harbour the cook explained",
    "The report of the expedition begins with",
    "小镇边上的书店老板常常说起",
    "Every morning before school the twins discussed",
    "An old engineer wrote in her notebook",
    "海边的渔夫在黄昏时告诉孩子们",
    "The second chapter of the manual describes",
)
_SENTENCES = (
    "The tide comes in twice a day, and nobody has ever managed to argue with it.",
    "It takes about twenty minutes to walk from the station to the old bridge.",
    "Fresh bread should cool for an hour before it is cut.",
    "A good map shows where the water is, and an excellent one shows where it was.",
    "The library opens at nine, except on days when the librarian has lost her key.",
    "Copper turns green with age, iron turns red, and gold does not care.",
    "They counted forty-one boats in the bay, three of which were sinking.",
    "The recipe asks for salt twice, which is not a mistake.",
    "Nobody knew who had planted the pear trees along the northern wall.",
    "When the wind turns to the west, the windows on the upper floor begin to sing.",
    "The clock in the square has been seven minutes late for thirty years.",
    "To repair a net, begin at the largest hole and work outwards.",
    "雨停了以后，街上的石板像镜子一样亮。",
    "厨房里的水壶响了三声，谁也没有站起来。",
    "从山顶往下看，河流好像一条银色的带子。",
    "The shop sells maps, lamps, and a soup that is famous in two villages.",
)


_QUESTIONS = (
    "What should one bring to the lighthouse?",
    "Why does the clock run late?",
    "Who repairs the nets?",
    "今天的汤是什么味道？",
    "海边几点退潮？",
    "How far is the bridge?",
)
# The assistant's part of conversations, which are sent again with each turn.
_REPLIES = (
    "The keeper says to ask again after the tide has turned.",
    "Nobody is certain, but the librarian has a map of it.",
    "看门人说，等潮水退了再来问。",
    "Twice a day, as far as anyone has counted.",
)
TURNS = 3


@dataclass(frozen=True)
class Workload:
    """A kind of request. make(count, tokens, seed=, first=): jobs of `count` clients, numbered from `first`.

    reuse, speculate: whether servers that can may reuse prefixes and look ahead by prompt lookup.
    """

    name: str
    about: str
    make: Callable[..., list[Job]]
    reuse: bool = False
    speculate: bool = False

    def jobs(self, count: int, tokens: int, *, seed: int, first: int = 0) -> list[Job]:
        jobs = self.make(count, tokens, seed=seed, first=first)
        return [replace(job, reuse=self.reuse, speculate=self.speculate) for job in jobs]


def counts(text: str) -> list[int]:
    """`"1,8"` -> [1, 8]. Raises UsageError for anything but positive whole numbers."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"'{text}' is not a list of positive whole numbers such as 1,8")
    return [int(word) for word in words]


def _each(write: Callable[[random.Random, str], str]) -> Callable[..., list[Job]]:
    """Jobs of one prompt each: `write` is given the job's own random numbers and a head nobody else has.

    The same seed gives the same jobs. Different numbers begin differently, so that no server can reuse the
    beginning of another prompt.
    """

    def jobs(count: int, tokens: int, *, seed: int, first: int = 0) -> list[Job]:
        result = []
        for index in range(first, first + count):
            # Seeded by text: random takes no tuples.
            draw = random.Random(f"{seed}/{index}")
            result.append(Job(write(draw, f"{draw.randrange(1000, 10000)}."), index, tokens))
        return result

    return jobs


def _mixed(draw: random.Random, head: str) -> str:
    return " ".join([f"{head} {draw.choice(_OPENINGS)}:", *draw.sample(_SENTENCES, 4)])


# `count` jobs of some 80 prompt tokens each, which force `tokens` output tokens; numbered from `first`.
make = _each(_mixed)


def _chinese(draw: random.Random, head: str) -> str:
    own = [text for text in (*_OPENINGS, *_SENTENCES) if not text.isascii()]
    return head + "".join(draw.choice(own) for _ in range(5))


def _long(draw: random.Random, head: str) -> str:
    return f"{head} " + " ".join(draw.choice(_SENTENCES) for _ in range(60))


def _edit(draw: random.Random, head: str) -> str:
    text = " ".join(draw.sample(_SENTENCES, 6))
    return f"{head} Write this text again, word for word:\n{text}\n{text}\n"


def _short(draw: random.Random, head: str) -> str:
    return f"{head} {draw.choice(_QUESTIONS)}"


def _shared(draw: random.Random, head: str) -> str:
    system = "You keep the archive of a harbour town. " + " ".join(_SENTENCES * 2)
    return f"{system}\n{_short(draw, head)}"


def _chat(count: int, tokens: int, *, seed: int, first: int) -> list[Job]:
    """Each client's conversation, sent again with one more turn: all first turns, then all second ones."""
    jobs = []
    texts = [""] * count
    for turn in range(TURNS):
        for client in range(count):
            index = first + turn * count + client
            draw = random.Random(f"{seed}/{first + client}/{turn}")
            head = f"{draw.randrange(1000, 10000)}. " if not turn else ""
            texts[client] += f"{head}User: {draw.choice(_QUESTIONS)}\nAssistant:"
            jobs.append(Job(texts[client], index, tokens))
            texts[client] += f" {draw.choice(_REPLIES)}\n"
    return jobs


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "mixed",
            "prompts of some 80 tokens in English and Chinese, each asked once",
            lambda count, tokens, **numbers: make(count, tokens, **numbers),
        ),
        Workload("short", "one short question", _each(_short)),
        Workload("long", "prompts of some 1000 tokens, each asked once", _each(_long)),
        Workload("chinese", "prompts in Chinese alone", _each(_chinese)),
        Workload("shared", "one text of some 500 tokens before a question each", _each(_shared), reuse=True),
        Workload(
            "chat",
            f"conversations of {TURNS} turns, each told again from the beginning",
            _chat,
            reuse=True,
        ),
        Workload("edit", "a text to be written again", _each(_edit), speculate=True),
    )
}
