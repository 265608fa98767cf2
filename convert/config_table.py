"""The table of every key in docs/training.md, made of the key table.

python -m convert.config_table docs/training.md
"""

from __future__ import annotations

import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from convert.config_keys import FIELDS, plain
from convert.config_unused import UNUSED, Unused

BEGIN, END = "<!-- keys -->\n", "<!-- end of keys -->\n"


def table() -> str:
    """The three lists in Markdown: keys that are honoured, taken without effect, and refused."""
    lines = ["### Honoured", "", "| key | default | what it does |", "| --- | --- | --- |"]
    for name, key in FIELDS.items():
        default = "must be given" if key.default is MISSING else f"`{_yaml(plain(key.default))}`"
        choices = ", ".join(f"`{choice}`" for choice in key.choices or key.names)
        more = f"; one of {choices}" * bool(choices) + " (not in LLaMA-Factory)" * key.ours
        lines.append(f"| `{name}` | {default} | {key.help}{more} |")
    lines += ["", "### Taken, without effect", "", "A note says so where * stands.", ""]
    lines += ["| keys | why |", "| --- | --- |"]
    for unused, names in _alike(taken=True).items():
        lines.append(f"| {names}{'*' * unused.warn} | {unused.reason} |")
    lines += [
        "",
        "### Refused",
        "",
        "| keys | taken all the same | why, or what to do |",
        "| --- | --- | --- |",
    ]
    for unused, names in _alike(taken=False).items():
        values = ", ".join(f"`{_yaml(value)}`" for value in unused.values or (None,))
        lines.append(f"| {names} | {values} | {unused.reason} |")
    return "\n".join(lines) + "\n"


def _alike(*, taken: bool) -> dict[Unused, str]:
    """The names of the keys that share an entry, as code."""
    alike: dict[Unused, list[str]] = {}
    for name, unused in UNUSED.items():
        if (unused.values is None) == taken:
            alike.setdefault(unused, []).append(f"`{name}`")
    return {unused: ", ".join(names) for unused, names in alike.items()}


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, allow_unicode=True)).split("\n")[0]


def main(argv: list[str]) -> int:
    path = Path(argv[0])
    text = path.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
