"""The report that a user sends: everything is in it, and nothing personal."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from edge.machine import doctor, report

PASSED = {"stage": "train", "seconds": 6.5, "digest": "sha256:1f", "problem": ""}


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user with a name in Chinese on a machine with a name, in a folder with a blank."""
    home = tmp_path / "李 伟"
    (home / "my work").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(platform, "node", lambda: "LIWEI-Laptop")
    monkeypatch.setenv("USER", "liwei")
    monkeypatch.setattr("getpass.getuser", lambda: "liwei")
    monkeypatch.chdir(home / "my work")
    return home


def test_nothing_personal_is_left(somebody: Path) -> None:
    text = (
        f"{somebody}/.cache/edge can be written; {sys.executable}, {somebody / 'my work'}/runs/x\n"
        "LIWEI-Laptop liwei: C:\\Users\\liwei\\x.py D:/data/a.json /srv/models/secret/x.gguf:12\n"
        "\\\\nas\\team\\b.gguf and 'C:\\\\Users\\\\liwei\\\\y' fe80::1c2d:3 2001:db8:0:5::9 std::vector\n"
        "via http://user:word@proxy.corp:3128/ and li.wei@example.org at 10.1.2.3\n"
        "20 tokens/s, and/or, 3.11.7, driver 576.02, Intel(R) Core(TM) i7-1260P"
    )
    left = report.impersonal(text, report.personal())
    for word in (
        "liwei",
        "李",
        "my work",
        "Users",
        "secret",
        "corp",
        "word@",
        "example",
        "10.1.2.3",
        "data",
        "nas",
        "1c2d",
        "db8",
    ):
        assert word.lower() not in left.lower(), (word, left)
    for word in (
        "can be written",
        "std::vector",
        "20 tokens/s, and/or, 3.11.7, driver 576.02, Intel(R) Core(TM) i7-1260P",
    ):
        assert word in left


def test_the_report_has_the_machine_and_each_stage(somebody: Path) -> None:
    failed = {"stage": "merge", "seconds": 1.0, "digest": "", "problem": f"no such file:\n  {somebody}/run"}
    rows = [("machine", "Python", f"3.11.7, {sys.executable}", ""), ("onnx", "ONNX Runtime", "1.31", "do it")]
    lines = report.text(rows, [PASSED, failed]).splitlines()
    assert "machine    Python: 3.11.7, <path>" in lines
    assert "onnx       ONNX Runtime: 1.31  -> do it" in lines
    assert any(re.fullmatch(r"train +6\.5 s  sha256:1f", line) for line in lines)
    assert any(re.fullmatch(r"merge +1\.0 s  FAILED: no such file: <path>", line) for line in lines)


def test_the_doctor_writes_it(
    somebody: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: list[dict[str, Any]] = [PASSED]
    monkeypatch.setattr(report, "self_test", lambda: outcomes)
    monkeypatch.setattr(doctor, "items", lambda: [doctor.Item("machine", "system", "x")])
    assert doctor.main(["--report"]) == 0
    assert "machine    system: x" in Path(report.FILE).read_text(encoding="utf-8")
    outcomes[0] = PASSED | {"problem": "it broke"}
    assert doctor.main(["--report"]) == 1
    assert "1 failed: train" in capsys.readouterr().out


def test_a_self_test_without_an_outcome_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SELF_TEST", "this")  # a module that prints no JSON
    [outcome] = report.self_test()
    assert "no outcome" in outcome["problem"]


@pytest.mark.matrix
def test_the_real_self_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("torch", "llama_cpp", "onnxruntime_genai"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    assert doctor.main(["--report"]) == 0
    text = Path(report.FILE).read_text(encoding="utf-8")
    assert text.count("sha256:") == 5 and "FAILED" not in text
    for word in report.personal():
        assert not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE), word
