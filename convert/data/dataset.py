"""Data sets as LLaMA-Factory's users have them, read row by row with a reason for each one that is left out.

dataset_info.json -> rows of messages (alpaca, sharegpt, openai, ranking) -> training and validation rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.data.dataset_info import Entry, Row, read_info
from convert.data.read_files import BadRow
from edge.errors import InputError, UsageError

_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_]\w*\s*\}\}")
# Braces in code are meant: `{{ name }}` is an answer about Jinja, not a forgotten placeholder.
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


@dataclass
class Report:
    """What reading and encoding the data met. bad: (row, reason) of each row left out. twins: (duplicate, the
    earlier row), the first ten. cut: rows longer than cutoff_len. marked: rows whose own texts hold control
    tokens. seen: digests of rows."""

    rows: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    placeholders: Counter[str] = field(default_factory=Counter)
    placeholder_rows: int = 0
    first_placeholder: str = ""
    duplicates: int = 0
    twins: list[tuple[str, str]] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)
    thoughts_removed: int = 0
    seen: dict[bytes, str] = field(default_factory=dict, repr=False)

    def lines(self) -> list[str]:
        """Warnings in words, worst first; empty where there is nothing to say."""
        lines = []
        if self.bad:
            shown = [f"  {source}: {reason}" for source, reason in self.bad[:10]]
            more = [f"  ... and {len(self.bad) - 10} more"] if len(self.bad) > 10 else []
            lines.append("\n".join([f"{len(self.bad)} of {self.rows} rows are left out:", *shown, *more]))
        if self.cut:
            lines.append(
                f"{len(self.cut)} rows are longer than cutoff_len: their answers are cut at the end and do "
                f"not learn to stop there (first: {self.cut[0]})"
            )
        if self.placeholders:
            names = ", ".join(f"{name} x {count}" for name, count in self.placeholders.most_common(5))
            lines.append(
                f"{self.placeholder_rows} rows hold placeholders that nothing fills in: {names} "
                f"(first: {self.first_placeholder})"
            )
        if self.duplicates:
            row, earlier = self.twins[0]
            lines.append(
                f"{self.duplicates} rows are duplicates of an earlier one; they are kept "
                f"(first: {row} is {earlier})"
            )
        if self.marked:
            lines.append(
                f"{len(self.marked)} rows hold control tokens in their texts, learnt as plain text, as they "
                f"are served (first: {self.marked[0]}); parse_control_tokens: true learns them as tokens"
            )
        if self.thoughts_removed:
            lines.append(f"{self.thoughts_removed} rows had reasoning, left out by enable_thinking: false")
        return lines

    def numbers(self) -> dict[str, Any]:
        """Counts for the manifest."""
        return {
            "rows": self.rows,
            "left_out": len(self.bad),
            "cut": len(self.cut),
            "with_control_tokens": len(self.marked),
            "duplicates": self.duplicates,
            "with_placeholders": self.placeholder_rows,
        }


def stream(entry: Entry, report: Report, *, max_samples: int | None = None) -> Iterator[Row]:
    """The usable ones among the first `max_samples` rows of one data set; `report` learns of the others."""
    for number, raw in itertools.islice(entry.rows(), max_samples):
        report.rows += 1
        source = f"{entry.name}, row {number}"
        try:
            if isinstance(raw, BadRow):
                raise raw
            row = entry.row(source, raw)
        except BadRow as reason:
            report.bad.append((source, str(reason)))
            continue
        _inspect(row, report)
        yield row


def load(
    names: tuple[str, ...],
    folder: Path,
    *,
    max_samples: int | None = None,
    strict: bool = False,
    plain: bool = False,
) -> tuple[list[Row], Report]:
    """All rows of the data sets `names` in `folder`, the first `max_samples` of each. plain: as `read_info`.

    Raises InputError for missing or unreadable files, where no row is usable, and with `strict` for any bad
    row; UsageError for a name or an entry of dataset_info.json that cannot be used.
    """
    report = Report()
    entries = read_info(str(folder), names, plain=plain)
    rows = [row for name in names for row in stream(entries[name], report, max_samples=max_samples)]
    check(names, len(rows), report, strict=strict)
    return rows, report


def check(names: tuple[str, ...], usable: int, report: Report, *, strict: bool) -> None:
    """Raise InputError where no row of `names` is usable, and with `strict` for any bad row."""
    if report.bad and strict:
        raise InputError(report.lines()[0], "correct these rows, or leave `strict` out to go on without them")
    if not usable:
        reasons = "; ".join(f"{source}: {reason}" for source, reason in report.bad[:3])
        plain = bool(report.bad) and all("stage: pt" in reason for _, reason in report.bad)
        raise InputError(
            f"no usable row in {', '.join(names)}" + (f" ({reasons})" if reasons else ": no rows at all"),
            "train with stage: pt"
            if plain
            else "an alpaca row has `instruction` and `output`; dataset_info.json can name other columns",
        )


def held_out(count: int, val_size: float, seed: int) -> set[int]:
    """Which of `count` rows are held out, at least one; none for val_size 0.

    Raises UsageError where `val_size` (below 1 a fraction, from 1 a count) leaves nothing to train on.
    """
    if not val_size:
        return set()
    held = max(1, round(val_size * count)) if val_size < 1 else int(val_size)
    if held >= count:
        raise UsageError(
            f"val_size: {val_size:g} holds out {held} of {count} rows, which leaves none to train on",
            f"give at most {count - 1}, or 0 for none" if count > 1 else "give 0",
        )
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return set(order[:held])


def split(rows: list[Row], val_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows), at least one of each; none held out for val_size 0."""
    chosen = held_out(len(rows), val_size, seed)
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [row for number, row in enumerate(rows) if number in chosen],
    )


def _inspect(row: Row, report: Report) -> None:
    """Note whether `row` repeats an earlier one, or holds placeholders."""
    whole = json.dumps([row.messages, row.chosen, row.rejected, row.tools])
    digest = hashlib.blake2b(whole.encode("utf-8"), digest_size=12).digest()
    earlier = report.seen.setdefault(digest, row.source)
    if earlier != row.source:
        report.duplicates += 1
        if len(report.twins) < 10:
            report.twins.append((row.source, earlier))
    texts = [*(message["content"] for message in row.messages), row.chosen, row.rejected]
    placeholders = [
        match.replace(" ", "")
        for text in texts
        if "{{" in text
        for match in _PLACEHOLDER.findall(_CODE.sub("", text))
    ]
    if placeholders:
        report.first_placeholder = report.first_placeholder or row.source
        report.placeholders.update(placeholders)
        report.placeholder_rows += 1
