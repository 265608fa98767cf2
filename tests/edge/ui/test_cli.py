"""`edge ui`: its arguments and the lines that it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge.errors import UsageError
from edge.ui import cli


def test_beyond_loopback_a_key_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_API_KEY", raising=False)
    with pytest.raises(UsageError, match="EDGE_API_KEY"):
        cli.main(["--host", "0.0.0.0"])
    with pytest.raises(UsageError, match="does not begin with a /"):
        cli.main(["--root-path", "page"])


def test_the_lines_for_here_and_for_another_machine() -> None:
    here, there = cli.addresses("127.0.0.1", 7860, "/page").splitlines()
    assert here.startswith("http://127.0.0.1:7860/page/ ")
    assert re.search(r"ssh -L 7860:127\.0\.0\.1:7860 \S+$", there)
    assert cli.addresses("::1", 7860, "").startswith("http://[::1]:7860/ ")
    assert "ssh" not in cli.addresses("0.0.0.0", 7860, "")


@pytest.mark.slow
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['nicegui'] = None; from edge import cli, console\n"
    code += "sys.exit(console.guarded(cli.main, ['ui', '--port', '0']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=tmp_path, check=False
    )
    assert done.returncode == 1 and "'nicegui'" in done.stderr and "--extras ui" in done.stderr


@pytest.mark.slow
def test_no_module_of_the_page_brings_torch() -> None:
    pytest.importorskip("nicegui")
    code = "import sys; from edge.ui import app\n"
    code += "print([name for name in ('torch', 'convert', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "[]\n"
