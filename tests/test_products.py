"""The matrix products of our own (edge/csrc/products.cpp) that the installed llama.cpp was built with."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")

COUNTS = ("1", "2", "7", "10", "11", "16", "17", "31", "64", "80", "150")


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q4_1"])
def test_products_are_right_and_rows_do_not_depend_on_their_neighbours(kind: str) -> None:
    """For few rows, several groups of 16, and a last group that is not whole; Q4_1 is llama.cpp's own."""
    script = Path(__file__).with_name("native_products.py")
    done = subprocess.run(
        [sys.executable, str(script), kind, *COUNTS], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    lines = done.stdout.decode("utf-8").split("\n")[:-1]
    if lines == ["none"]:
        pytest.skip("no weights are repacked for AMX here")
    found = [line.split() for line in lines]
    assert [count for count, _, _ in found] == list(COUNTS)
    assert max(float(error) for _, error, _ in found) < 1e-6
    assert all(alike == "True" for _, _, alike in found)
