"""Puts a report's table into texts, and its pictures into a folder.

python -m bench.report.update_readme REPORT.json README.md README.zh.md --pictures docs/pictures
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.report import html, table
from edge.console import guarded
from edge.errors import InputError

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.update_readme", description=__doc__.splitlines()[0]
    )
    parser.add_argument("report", type=Path, help="report.json of a run")
    parser.add_argument("readme", type=Path, nargs="+")
    parser.add_argument("--pictures", type=Path, help="a folder for the report's charts, as SVG")
    args = parser.parse_args(argv)
    try:
        report = json.loads(args.report.read_text(encoding="utf-8"))
        text_table = table.block(report, brief=True)
        pictures = html.pictures(report) if args.pictures else {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{args.report} is not a report: {error}", "give RUN/report.json") from error
    for path in args.readme:
        head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not end or BEGIN in rest or END in head + tail:
            raise InputError(f"{path} needs one {BEGIN} and, after it, one {END}")
        path.write_text(f"{head}{BEGIN}\n{text_table}{END}{tail}", encoding="utf-8")
    if pictures:
        table.write_files({f"{name}.svg": svg for name, svg in pictures.items()}, args.pictures, keep=False)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
