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
from edge.progress import add_progress_option, result

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


def pieces(chat: Any, sample: Any) -> list[dict[str, Any]]:
    """The sample's tokens: text, id, whether it has loss, and whether a row of a pack begins with it."""
    learnt = {index for start, end in sample.spans for index in range(start, end)}
    found = []
    for index, token in enumerate(sample.ids):
        text = chat.tokenizer.decode([token], skip_special_tokens=False)
        text = text.replace("�", f"<{chat.tokenizer.id_to_token(token)}>")
        begins = index in sample.starts[1:]
        found.append({"text": text, "id": token, "loss": index in learnt, "begins": begins})
    return found


def coloured(tokens: list[dict[str, Any]]) -> Text:
    """The tokens, each with its id; green where it has loss, dim where not."""
    text = Text()
    for index, token in enumerate(tokens):
        if token["begins"]:
            text.append("\n-- next row of the pack --\n", style="yellow")
        style = ("black on green" if index % 2 else "black on bright_green") if token["loss"] else "dim"
        text.append(token["text"].replace("\n", "\\n"), style=style)
        text.append(f"{token['id']} ", style="green" if token["loss"] else "dim italic")
    return text


def show(config: TrainConfig, console: Console, *, rows: int) -> None:
    """Print everything about the data of `config`, and `rows` of its rows token by token."""
    from convert.data import prepare
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
    samples = []
    for name, sample in (one for item in items[:rows] for one in _sides(item)):
        console.print(f"\n{name}: {len(sample.ids)} tokens, {sample.learnt} with loss", style="bold")
        shown = pieces(chat, sample)
        samples.append({"source": name, "tokens": shown})
        console.print(coloured(shown))
    result(
        rows=report.rows,
        trained=data.rows,
        held_out=data.held_rows,
        left_out=report.bad,
        notes=[*data.notes, *report.lines()],
        lengths=[item.size for item in items],
        cut=len(report.cut),
        tokens=tokens,
        tokens_with_loss=learnt,
        samples=samples,
    )


def _sides(item: Any) -> list[tuple[str, Any]]:
    """(name, sample) of a row, of both answers of a pair, or of one that was judged."""
    from convert.data.encode import Pair, Sample

    names: tuple[str, ...] = ("",)
    if not isinstance(item, Sample):
        names = (
            (", chosen", ", rejected") if isinstance(item, Pair) else (", good" if item.good else ", bad",)
        )
    return [(f"{item.source}{name}", part) for name, part in zip(names, item.parts, strict=False)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge data", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="as for `edge train`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--rows", type=int, default=3, help="rows to show token by token (%(default)s)")
    add_progress_option(parser)
    options = parser.parse_intermixed_args(argv)
    config = load_train_config(options.config, options.overrides)
    show(config, Console(highlight=False, markup=False, soft_wrap=True), rows=max(0, options.rows))
    return 0
