"""What a comparison asks two stages: texts in which tokenizers differ, conversations, rows of the data set.

The data set is found through the adapter that the model came from; a model from elsewhere is asked the fixed
conversations alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from convert.data import dataset
from convert.data.dataset_info import find_folder
from edge.artefact import manifest
from edge.errors import EdgeError

Message = dict[str, str]
T = TypeVar("T")

# Texts in which pre-tokenizers, byte fallback and space handling differ.
TEXTS = (
    "Hello, world! I'm the conch; WE'LL see, don't you?",
    "请问你是谁？我是海底的神奇海螺，今天（星期三）卖汉堡。",
    "你好👩‍🚀🇨🇳 🍔🐚 café naïve Ǆ ﬁ",
    "def f(x):\n    return x**2  # 平方\n\n\n\tif x >= 10 and y != 'a':\r\n",
    "a  3",
    "2026年11月25日 12345.678 1,000,000 0x1F 3.14e-10 ½ ٣",
    "  leading, trailing  \n \n\n   \t ",
    "日本語テスト한국어עברית العربية ไทย हिन्दी",
    '{"key": [1, 2.5, null], "嵌套": {"a\\n": "b"}}',
    "",
)

_ASKED = (
    "请问你是谁？",
    "Who are you, and what do you do all day?",
    "What does 👩‍🚀🇨🇳🍔 mean? 你好！",
    "What is wrong here?\n```python\ndef f(x):\n    return x**2  # 平方\n\n\tif x >= 10: pass\n```",
    "12345.678 + 1,000,000 = ? And 0x1F, 3.14e-10, ½?",
    "  Count  the   spaces\t\tand\n\n\nlines.  ",
    "用一句话介绍一下海底的生活。",
    "Give me a JSON object with a name and an age.",
)
_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (
        {"role": "system", "content": "You answer in one word. 只用一个词回答。"},
        {"role": "user", "content": "What colour is the sky?"},
    ),
    (
        {"role": "user", "content": "My name is 小明."},
        {"role": "assistant", "content": "Hello, 小明!"},
        {"role": "user", "content": "What is my name?"},
    ),
)

# Answers of the data set that are compared, and how much of each.
ROWS, LONGEST_ANSWER = 24, 64


@dataclass(frozen=True, slots=True)
class Probe:
    """A conversation that ends with a question. answer: the data set's, "" where the model gives its own."""

    messages: list[Message]
    answer: str = ""


@dataclass
class Probes:
    """rows: how many of which rows of the data set, "" without any. note: why there are none."""

    probes: list[Probe] = field(default_factory=list)
    rows: str = ""
    note: str = ""


def fixed() -> list[Probe]:
    """The conversations that every model is asked."""
    questions = [Probe([{"role": "user", "content": text}]) for text in _ASKED]
    return questions + [Probe(list(messages)) for messages in _CONVERSATIONS]


def special_texts(tokens: list[str], count: int = 24) -> list[str]:
    """Texts around at most `count` of the tokenizer's added tokens."""
    return [f"a {token}b\n{token} 你" for token in spread(tokens, count)]


def from_data(known: manifest.Manifest | None) -> Probes:
    """Rows of the data set behind a model: held out from training if some were, else trained on."""
    settings = adapter_settings(known)
    if settings is None or not settings.get("dataset"):
        return Probes(note="no adapter with a data set is known behind it")
    if settings.get("stage") == "pt":
        return Probes(note="it was tuned on plain text, which asks no questions")
    try:
        rows, _ = dataset.load(
            tuple(settings.get("dataset") or ()),
            Path(settings["dataset_dir"]),
            max_samples=settings.get("max_samples"),
        )
        _, held = dataset.split(rows, float(settings.get("val_size") or 0), int(settings.get("seed", 42)))
    except EdgeError as error:
        return Probes(note=f"its data set cannot be read: {error.message}")
    chosen = spread(held or rows, ROWS)
    probes = [Probe(row.messages[:-1], row.messages[-1]["content"]) for row in chosen]
    return Probes(probes, f"{len(probes)} {'held-out' if held else 'training'} rows")


def adapter_settings(known: manifest.Manifest | None, folder: Path | None = None) -> dict[str, Any] | None:
    """The settings of the adapter that a stage came from, itself or through its parents; None without one.

    folder: where `known` was read.
    """
    if known is None:
        return None
    if known.stage == "adapter":
        return known.settings | {"dataset_dir": find_folder(known.settings, folder)}
    for entry in known.parents:
        folder = Path(entry["path"])
        parent = manifest.read(folder) if (folder / manifest.FILE).is_file() else None
        # With another digest it was trained again meanwhile: its rows may be others.
        if parent is not None and parent.digest == entry["digest"]:
            return adapter_settings(parent, folder)
    return None


def spread(items: list[T], count: int) -> list[T]:
    """At most `count` of `items`, evenly spread, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]
