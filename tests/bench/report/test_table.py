"""Files of a report: an earlier one is kept under the time at which it was written."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.report import table


def test_an_earlier_report_is_kept_by_its_time(tmp_path: Path) -> None:
    folder = tmp_path / "运行"
    assert table.write_files({"report.json": "1", "report.md": "one"}, folder) == ""
    when = time.mktime((2026, 11, 27, 10, 15, 0, 0, 0, -1))
    os.utime(folder / "report.json", (when, when))
    assert table.write_files({"report.json": "2", "report.md": "two"}, folder) == "20261127-101500"
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert texts == {
        "report.json": "2",
        "report.md": "two",
        "report-20261127-101500.json": "1",
        "report-20261127-101500.md": "one",
    }
    # Pictures of a text are replaced.
    assert table.write_files({"report.json": "3"}, folder, keep=False) == ""
    assert len(list(folder.iterdir())) == 4 and (folder / "report.json").read_text() == "3"
