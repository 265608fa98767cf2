"""What llama.cpp was built with in place of its own: edge/csrc."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.machine import hardware

pytest.importorskip("llama_cpp")

COUNTS = ("1", "2", "3", "4", "5", "7", "8", "9", "15", "16", "17", "31", "64", "80", "150")
ours = pytest.mark.skipif(
    sys.platform == "win32"
    or platform.machine() not in ("x86_64", "AMD64")
    or "avx2" not in hardware.cpu_flags(everything=True),
    reason="attention and products of our own are for CPUs with AVX2, and not for Windows",
)


class Native:
    """A process that computes, for what it runs may end it; after that the next job starts another."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, *job: str) -> list[list[str]]:
        if self._child is None:
            script = Path(__file__).parents[2] / "support" / "native_ops.py"
            with self._log.open("wb") as log:
                self._child = subprocess.Popen(
                    [sys.executable, str(script)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(" ".join(job) + "\n")
        self._child.stdin.flush()
        lines: list[list[str]] = []
        for line in self._child.stdout:
            if line == "end\n":
                return lines
            lines.append(line.split())
        self.close()
        raise AssertionError(f"{job}: the process ended: {self._log.read_text('utf-8', 'replace')[-2000:]}")

    def close(self) -> None:
        if self._child is not None:
            self._child.communicate(timeout=60)
            self._child = None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Native]:
    native = Native(tmp_path_factory.mktemp("native") / "log.txt")
    yield native
    native.close()


@pytest.mark.slow
def test_a_job_that_ends_the_process_is_told_and_the_next_has_another(run: Native) -> None:
    with pytest.raises(AssertionError, match="KeyError: 'nonsense'"):
        run("nonsense")
    assert run("attention", "64", "9", "3", "1", "1", "1", "none")


@ours
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q4_1"])
def test_products_are_right_and_rows_do_not_depend_on_their_neighbours(run: Native, kind: str) -> None:
    """For few rows, several groups of 16, and a last group that is not whole; Q4_1 is llama.cpp's own."""
    found = run("products", kind, *COUNTS)
    if found == [["none"]]:
        pytest.skip("no weights are repacked for AMX here")
    assert [count for count, _, _ in found] == list(COUNTS)
    assert max(float(error) for _, error, _ in found) < 1e-6
    assert all(alike == "True" for _, _, alike in found)


@ours
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_products_are_the_sums_of_their_blocks_to_the_bit(run: Native, kind: str) -> None:
    assert run("exact", kind, "21") == [["True"]]


@ours
@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("Q4_0", "Q4_0"), ("Q8_0", "Q8_0"), ("Q4_K", "Q6_K"), ("Q4_0", "Q8_0")], ids="-".join
)
def test_nodes_that_are_put_together_give_what_they_give_one_by_one(
    run: Native, kinds: tuple[str, str]
) -> None:
    """21 nodes: three products with a norm and biases, rotations and caches, a sum, gate and up, a sum."""
    found = run("stages", *kinds, "1", "2", "5", "9", "16", "17", "40")
    assert [nodes for _, nodes, _ in found] == ["5"] * 5 + ["8"] * 2
    assert all(alike == "True" for _, _, alike in found)


@ours
@pytest.mark.parametrize(
    "case",
    [
        "64 9 3 1 1 300 none",
        "64 9 3 1 3 257 holes",
        "128 12 2 1 1 1000 causal",
        "128 12 2 5 2 333 holes",
        pytest.param("64 14 2 33 1 64 holes", marks=pytest.mark.slow),
        "128 8 8 2 2 31 causal",
        "192 4 1 3 1 70 holes",
        "256 8 1 1 1 70 causal",
        "64 9 3 1 1 1 none",
        pytest.param("64 4 2 70 2 128 causal", marks=pytest.mark.slow),
    ],
)
def test_attention_is_right_and_tokens_do_not_depend_on_their_neighbours(run: Native, case: str) -> None:
    """Widths, heads that share a cache, several tokens and streams; hidden cells hold no numbers."""
    [[error, alike]] = run("attention", *case.split())
    assert float(error) < 3e-6
    assert alike == "True"


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="large pages are asked for on Linux"
)
def test_repacked_weights_lie_in_large_pages(run: Native) -> None:
    found = run("pages")
    assert found and all(asked == "True" for _, asked in found)
