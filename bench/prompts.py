"""Prompts for measuring: seeded, all different from their first words on, from text that stands here."""

from __future__ import annotations

import random

from bench.load import Job

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


def make(count: int, tokens: int, *, seed: int, first: int = 0) -> list[Job]:
    """`count` jobs of some 80 prompt tokens each, which force `tokens` output tokens; numbered from `first`.

    The same seed gives the same jobs. Different numbers begin differently, so that no server can reuse the
    beginning of another prompt.
    """
    jobs = []
    for index in range(first, first + count):
        # Seeded by text: random takes no tuples.
        draw = random.Random(f"{seed}/{index}")
        opening = f"{draw.randrange(1000, 10000)}. {draw.choice(_OPENINGS)}:"
        jobs.append(Job(" ".join([opening, *draw.sample(_SENTENCES, 4)]), index, tokens))
    return jobs
