"""Bounded fuzzing: `python -m tests.fuzz [PART ...] [--seconds N] [--seed S]`, or `PART --input FILE`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tests.fuzz import PARTS, sizes
from tests.fuzz.runner import Outcome, again, run


def _run_apart(name: str, folder: Path, seconds: float, seed: int) -> Outcome:
    """A part in a process of its own: native code may end it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run, name, PARTS[name], folder, seconds=seconds, seed=seed).result()
        except BrokenProcessPool:
            return Outcome(name, failed=1, faults=[("it ended the process", folder / f"{name}-current.txt")])


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--input", type=Path, help="try the input in this file once more, with the part given"
    )
    parser.add_argument("--sizes", action="store_true", help="instead: texts by size, and how long they take")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(unknown)}")
    folder = Path(tempfile.mkdtemp(prefix="edge-fuzz-"))
    if given.input is not None:
        again(PARTS[given.parts[0]], folder, given.input)
        write("it holds")
        return 0
    if given.sizes:
        write(f"{'text':<12}{'bytes':>10}{'status':>8}{'ms':>9}{'gap ms':>9}")
        for text, size, status, taken, gap in sizes.rows(folder):
            write(f"{text:<12}{size:>10,}{status:>8}{taken:>9.1f}{gap:>9.1f}")
        return 0
    outcomes = []
    for name in given.parts or PARTS:
        outcome = _run_apart(name, folder, given.seconds, given.seed)
        outcomes.append(outcome)
        for what, file in outcome.faults:
            write(f"\n{what}\nagain: python -m tests.fuzz {name} --input {file}")
    write(f"\nseed {given.seed}\n{'part':<14}{'cases':>9}{'seconds':>9}{'faults':>8}")
    for outcome in outcomes:
        write(f"{outcome.part:<14}{outcome.cases:>9,}{outcome.seconds:>9.1f}{outcome.failed:>8}")
    write(f"{'':<14}{sum(outcome.cases for outcome in outcomes):>9,}")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
