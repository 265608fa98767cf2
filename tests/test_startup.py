"""Every verb parses its arguments before it imports what takes seconds: help and a mistake answer at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edge.cli import VERBS

HEAVY = ("torch", "transformers", "peft", "onnx", "llama_cpp", "matplotlib", "pandas", "pyarrow")
CODE = f"""
import sys
from edge import cli
from edge.console import guarded
try:
    code = guarded(cli.main, sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""
# Mistakes that argparse alone cannot find.
MISTAKES = [
    ["merge", "RUN", "--dtype", "int8"],
    ["export", "gguf", "RUN", "--quant", "Q4_K_XXL"],
    ["export", "gguf", "RUN", "--quant", "F16", "--imatrix"],
    ["export", "gguf", "RUN", "--ladder", "--gptq"],
    ["export", "gguf", "RUN", "--split-max-size", "2GiB"],
    ["export", "onnx", "RUN", "--precision", "fp16"],
]


def edge(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *argv]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)


@pytest.mark.parametrize("argv", [[verb, option] for verb in VERBS for option in ("--help", "--nonsense")])
def test_help_and_unknown_options_import_nothing_heavy(argv: list[str]) -> None:
    done = edge(*argv)
    assert done.returncode == (0 if argv[1] == "--help" else 2), done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("argv", MISTAKES, ids=" ".join)
def test_wrong_values_import_nothing_heavy(argv: list[str]) -> None:
    done = edge(*argv)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
