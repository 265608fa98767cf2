"""Every verb parses its arguments before it imports what takes seconds: help and a mistake answer at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edge.cli import VERBS

HEAVY = ("torch", "transformers", "peft", "onnx", "llama_cpp", "matplotlib", "pandas", "pyarrow")
# One interpreter for all: of each it tells the code, and what it imported before any other did.
CODE = f"""
import json, sys
from edge import cli
from edge.console import guarded
for argv in json.loads(sys.argv[1]):
    before = set(sys.modules)
    try:
        code = guarded(cli.main, argv)
    except SystemExit as stopped:
        code = stopped.code
    print()
    print(json.dumps(["end", code, sorted((sys.modules.keys() - before) & set({HEAVY}))]))
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


WORDS = [[verb, option] for verb in VERBS for option in ("--help", "--nonsense")]


Ends = dict[tuple[str, ...], tuple[int, list[str]]]


@pytest.fixture(scope="module")
def ends() -> Ends:
    """By its words: the exit code of a call, and the heavy modules that it imported."""
    calls = [*WORDS, *MISTAKES]
    command = [sys.executable, "-c", CODE, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["end"')]
    assert len(rows) == len(calls), done.stderr
    return {tuple(call): (code, heavy) for call, (_, code, heavy) in zip(calls, rows, strict=True)}


@pytest.mark.parametrize("argv", WORDS, ids=" ".join)
def test_help_and_unknown_options_import_nothing_heavy(ends: Ends, argv: list[str]) -> None:
    assert ends[tuple(argv)] == (0 if argv[1] == "--help" else 2, [])


@pytest.mark.parametrize("argv", MISTAKES, ids=" ".join)
def test_wrong_values_import_nothing_heavy(ends: Ends, argv: list[str]) -> None:
    assert ends[tuple(argv)] == (2, [])
