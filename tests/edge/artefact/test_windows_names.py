"""Names that Windows refuses, as any system can judge them."""

from __future__ import annotations

import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest

from convert.train import run_lock
from edge.artefact import manifest, windows_names
from edge.errors import UsageError


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("runs/con", "'con', which is a device"),
        ("runs/NUL.txt/a", "'NUL.txt', which is a device"),
        ("runs/com1", "device"),
        ("runs/a:b", "':' in the part 'a:b'"),
        ("a:b", "the drive or stream a:"),
        ("runs/what?", "'?'"),
        ("runs/a|b", "'|'"),
        ("runs/ends.", "last character is cut off"),
        ("runs/ends ", "last character is cut off"),
        ("C:\\" + "x" * 160, "has 163 characters"),
    ],
)
def test_what_cannot_be_written_is_named(path: str, problem: str) -> None:
    assert problem in windows_names.fault(PureWindowsPath(path), long=False)


@pytest.mark.parametrize(
    "path",
    ["runs/magic-conch", r"C:\Users\王 小明\模型", "../runs/.hidden", "console", "com10", r"\\host\share\a"],
)
def test_what_can_be_is_not(path: str) -> None:
    assert windows_names.fault(PureWindowsPath(path), long=False) == ""
    assert windows_names.fault(PureWindowsPath("C:\\" + "x" * 200), long=True) == ""


def test_stages_and_trainings_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    switch = SimpleNamespace(RtlAreLongPathsEnabled=lambda: 0)
    monkeypatch.setattr(windows_names.ctypes, "windll", SimpleNamespace(ntdll=switch), raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("aux", "y" * 150):
        with (
            pytest.raises(UsageError, match=f"Windows cannot write {name}: it has"),
            manifest.publish(Path(name)),
        ):
            raise AssertionError
        with pytest.raises(UsageError, match="cannot write"), run_lock.hold(Path(name)):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []
