"""`edge data CONFIG`: what the data of a configuration holds, and what is trained on, without training.

Counts, rows left out with their reasons, a histogram of the lengths, duplicates, placeholders, what is cut
and how; and the exact tokens of a few rows, those with loss in colour.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from convert.config import TrainConfig, load_train_config

_BARS = 12
_WIDTH = 40
_POLICY = (
    "policy: an answer that passes cutoff_len is cut at its end, a row whose prompt alone does is left out; "
    "nothing is cut in the middle"
)


def histogram(lengths: list[int], cutoff: int) -> list[str]:
    """How many rows are how long, as bars; lengths in tokens. The last bar ends with the longest row."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, math.ceil((high - low + 1) / _BARS))
    counts = [0] * math.ceil((high - low + 1) / width)
    for length in lengths:
        counts[(length - low) // width] += 1
    most = max(counts)
    digits = len(str(high))
    lines = []
    for start, count in zip(range(low, high + 1, width), counts, strict=True):
        end = min(high, start + width - 1)
        bar = "█" * round(_WIDTH * count / most) or ("▏" if count else "")
        mark = "  <- cutoff_len" if start <= cutoff <= end else ""
        lines.append(f"{start:>{digits}} - {end:>{digits}}  {bar} {count}{mark}")
    order = sorted(lengths)
    shown = ", ".join(
        f"{share} % {order[min(len(order) - 1, len(order) * share // 100)]}" for share in (50, 90, 99)
    )
    return [*lines, f"median and more: {shown}, longest {high}"]


def coloured(chat: Any, sample: Any) -> Text:
    """The sample's tokens, each with its id; green where it has loss, dim where not."""
    learnt = {index for start, end in sample.spans for index in range(start, end)}
    text = Text()
    for index, token in enumerate(sample.ids):
        if index in sample.starts[1:]:
            text.append("\n-- next row of the pack --\n", style="yellow")
        piece = chat.tokenizer.decode([token], skip_special_tokens=False)
        piece = piece.replace("\n", "\\n").replace("�", f"<{chat.tokenizer.id_to_token(token)}>")
        style = ("black on green" if index % 2 else "black on bright_green") if index in learnt else "dim"
        text.append(piece, style=style)
        text.append(f"{token} ", style="green" if index in learnt else "dim italic")
    return text


def show(config: TrainConfig, console: Console, *, rows: int) -> None:
    """Print everything about the data of `config`, and `rows` of its rows token by token."""
    from convert.data import prepare
    from convert.data.encode import Pair, Sample
    from convert.model import hub

    began = time.monotonic()
    base = hub.resolve(config.model_name_or_path, config.model_revision, config.cache_dir)
    chat = prepare.chat_of(config, base)
    for line in (*config.warnings, *chat.warnings):
        console.print(f"note: {line}", style="yellow")
    data = prepare.prepare(config, chat)
    report, items = data.report, data.train
    kind = "pairs" if config.stage == "dpo" else "rows"
    console.print(
        f"{', '.join(config.dataset)}: {report.rows:,} rows read, {len(report.bad):,} left out, "
        f"{data.rows:,} {kind} to train on, {data.held_rows:,} held out ({time.monotonic() - began:.1f} s)"
    )
    for line in [*data.notes, *report.lines()]:
        console.print(f"note: {line}", style="yellow")
    for row, earlier in report.twins[1:]:
        console.print(f"  also {row} is {earlier}")
    tokens, learnt = sum(item.tokens for item in items), sum(item.learnt for item in items)
    console.print(
        f"{tokens:,} tokens in one epoch, {learnt:,} of them with loss ({learnt / max(1, tokens):.0%})"
    )
    console.print("tokens in a sequence:" if config.packs else "tokens in a row:")
    for line in histogram([item.size for item in items], config.cutoff_len):
        console.print(f"  {line}")
    console.print(f"{len(report.cut):,} rows are cut; {_POLICY}")
    for item in items[:rows]:
        names: tuple[str, ...] = ("",)
        if not isinstance(item, Sample):
            names = (
                (", chosen", ", rejected")
                if isinstance(item, Pair)
                else (", good" if item.good else ", bad",)
            )
        for name, sample in zip(names, item.parts, strict=False):
            console.print(
                f"\n{item.source}{name}: {len(sample.ids)} tokens, {sample.learnt} with loss", style="bold"
            )
            console.print(coloured(chat, sample))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge data", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="as for `edge train`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--rows", type=int, default=3, help="rows to show token by token (%(default)s)")
    options = parser.parse_intermixed_args(argv)
    config = load_train_config(options.config, options.overrides)
    show(config, Console(highlight=False, markup=False, soft_wrap=True), rows=max(0, options.rows))
    return 0
