"""`--progress json`: stdout holds JSON lines alone, and the last one is the result or the error."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from edge import console, progress
from edge.errors import UsageError

ARGV = ["x", "--progress", "json"]


def lines(
    capfd: pytest.CaptureFixture[str], run: Callable[[], object], code: int = 0
) -> list[dict[str, Any]]:
    def command(argv: list[str]) -> int:
        run()
        return 0

    assert console.guarded(command, ARGV) == code
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_words_of_python_and_of_child_processes_go_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        sys.stdout.write("python\n")
        os.write(1, b"native\n")
        subprocess.run([sys.executable, "-S", "-c", "print('child')"], check=True)
        progress.result(path="模型/x")

    assert console.guarded(lambda argv: (run(), 0)[1], ARGV) == 0
    out, err = capfd.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [{"result": {"path": "模型/x"}, "exit_code": 0}]
    assert {"python", "native", "child"} <= set(err.split())
    # It was for this command alone.
    progress.report("after")
    os.write(1, b"stdout again\n")
    assert capfd.readouterr().out == "stdout again\n"


def test_a_phase_counts(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))

    def run() -> None:
        with progress.phase(console.plain_console(), "merging"):
            assert list(progress.counted(["a", "b", "c"], "tensors")) == ["a", "b", "c"]
        assert list(progress.counted([1], "outside of any phase")) == [1]

    began, *counts, last = lines(capfd, run)
    assert began == {"stage": "merging", "done": None, "total": None, "seconds_left": None}
    assert [(line["done"], line["total"], line["unit"]) for line in counts] == [
        (0, 3, "tensors"),
        (1, 3, "tensors"),
        (2, 3, "tensors"),
    ]
    # The clock ticks once a line: two ticks for the first tensor, the phase's own line being one of them.
    assert [line["seconds_left"] for line in counts] == [None, 4.0, 1.5]
    assert last == {"result": {}, "exit_code": 0}


def test_quick_lines_are_thinned_but_not_those_of_steps(capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        for done in range(500):
            progress.report("downloading", done, 499)
        for step in range(5):
            progress.report("training", step, 5, step=step, loss=math.nan, seconds_left=math.inf)

    found = lines(capfd, run)
    loads = [line["done"] for line in found if line.get("stage") == "downloading"]
    assert (loads[0], loads[-1]) == (0, 499) and len(loads) < 50
    steps = [line for line in found if line.get("stage") == "training"]
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4]
    assert steps[0]["loss"] is None and steps[0]["seconds_left"] is None


def test_the_last_line_is_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    def refused() -> None:
        raise UsageError("bad", "better")

    def wrong() -> None:
        raise ZeroDivisionError("planted")

    assert lines(capfd, refused, 2) == [{"error": "bad", "hint": "better", "exit_code": 2}]
    with pytest.raises(ZeroDivisionError):
        lines(capfd, wrong)
    last = json.loads(capfd.readouterr().out)
    assert last == {"error": "ZeroDivisionError: planted", "hint": "", "exit_code": 1}


def test_a_wrong_argument_is_a_last_line_too(capfd: pytest.CaptureFixture[str]) -> None:
    from edge.cli import main

    with pytest.raises(SystemExit):
        console.guarded(main, ["verify", "a", "--nonsense", "--progress=json"])
    out, err = capfd.readouterr()
    assert json.loads(out)["exit_code"] == 2
    assert "usage: edge verify" in err


def test_a_child_writes_the_lines_in_our_place(capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        code = 'print(\'{"result": {"by": "child"}}\')'
        subprocess.run([sys.executable, "-S", "-c", code], stdout=progress.stdout_of_child(), check=True)

    assert lines(capfd, run) == [{"result": {"by": "child"}}]
    assert progress.stdout_of_child() is None
