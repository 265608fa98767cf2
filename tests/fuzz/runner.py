"""Runs one part's cases for a while: what fails is written to a file, from which it can be run again.

A case is decided by the part's name, the seed and its number. Its input is a Python literal: it is written
down before it is tried, so that one that kills the process is known, too.
"""

from __future__ import annotations

import ast
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from edge.errors import EdgeError

# CPU seconds and bytes that one case may take in this process.
LIMIT_S = 1.0
LIMIT_BYTES = 512 * 2**20
# A part that fails so often says nothing new.
MOST_FAULTS = 20

# CPU seconds by process.
Used = Callable[[], dict[int, float]]
# draw(rng) -> an input; check(input) raises where the promise is broken. Of a part that asks a server, used()
# is what the server has taken; without it what this process has.
Part = Callable[[Path], AbstractContextManager[Any]]


def own() -> dict[int, float]:
    """CPU seconds that this process has used."""
    return {0: time.process_time()}


@dataclass
class Outcome:
    """What a part came to. faults: (what was broken, the file with the input), one of each kind."""

    part: str
    cases: int = 0
    seconds: float = 0.0
    failed: int = 0
    faults: list[tuple[str, Path]] = field(default_factory=list)


def run(name: str, part: Part, folder: Path, *, seconds: float, seed: int) -> Outcome:
    """Try cases of `part` for `seconds`, at least one. folder: takes the part's files and failing inputs."""
    outcome, kinds = Outcome(name), set()
    current = folder / f"{name}-current.txt"
    began = time.monotonic()
    work = folder / name
    work.mkdir(parents=True, exist_ok=True)

    def broken(error: BaseException) -> None:
        outcome.failed += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        # A server's log ends with what is broken.
        if (kind := (frame.filename, frame.lineno, str(error).strip()[-40:])) not in kinds:
            kinds.add(kind)
            kept = folder / f"{name}-{seed}-{outcome.cases}.txt"
            kept.write_bytes(current.read_bytes())
            outcome.faults.append((_told(error), kept))

    try:
        with part(work) as (draw, check, *used):
            until = time.monotonic() + seconds
            while outcome.cases == 0 or (time.monotonic() < until and outcome.failed < MOST_FAULTS):
                given = draw(Random(f"{name} {seed} {outcome.cases}"))
                current.write_text(repr(given), encoding="ascii", errors="backslashreplace")
                outcome.cases += 1
                try:
                    with bounds(*used):
                        check(given)
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:  # a panic of native code is no Exception
                    broken(error)
    except Exception as error:  # what a part looks at when it ends; its last case is as good as any
        broken(error)
    outcome.seconds = time.monotonic() - began
    current.unlink()
    return outcome


def _told(error: BaseException) -> str:
    """Where it was raised, and what it says: a server's log ends with what is broken."""
    where = "".join(traceback.format_tb(error.__traceback__)[-4:])
    text = f"{type(error).__name__}: {error}"
    return where + (text if len(text) < 2000 else f"{text[:1000]} ... {text[-1000:]}")


def again(part: Part, folder: Path, file: Path) -> None:
    """Try the input in `file` once more; raises as the part's check does."""
    with part(folder) as (_, check, *used), bounds(*used):
        check(ast.literal_eval(file.read_text(encoding="ascii")))


@contextmanager
def sentences() -> Iterator[None]:
    """What a user is told in a sentence ends the block: an EdgeError, and a file that the system refuses."""
    try:
        yield
    except EdgeError:
        pass
    except OSError as error:
        if error.filename is None:
            raise


@contextmanager
def bounds(used: Used = own, *, limit_s: float | None = None) -> Iterator[None]:
    """Raises AssertionError where the block takes more time or memory than a case may.

    used: the processes whose time it is; one that begins or ends within the block does not count. The memory
    is that of this process. limit_s: of time, LIMIT_S where it is not given.
    """
    began, before = used(), _peak()
    yield
    taken = sum(now - began[process] for process, now in used().items() if process in began)
    grown = _peak() - before
    assert taken <= (limit_s or LIMIT_S), f"it took {taken:.1f} s of a core"
    assert grown <= LIMIT_BYTES, f"it took {grown / 2**20:.0f} MiB"


def _peak() -> int:
    """The most bytes that this process has held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * 1024
