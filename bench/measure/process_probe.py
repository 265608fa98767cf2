"""Memory and processor time of whole process trees, and how quiet the machine is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from bench.measure.metrics import percentile

# A machine with more than this is too noisy for its figures to be compared with others.
BUSY_LIMIT = 0.10
JITTER_LIMIT = 0.25


def tree(pid: int) -> list[psutil.Process]:
    """The process and all that descend from it; empty when it has gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def _total(pid: int | None, figure: Callable[[psutil.Process], float]) -> float:
    total = 0.0
    for process in tree(pid) if pid is not None else ():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += figure(process)
    return total


def tree_memory(pid: int) -> int:
    """Bytes that the tree holds: proportional (PSS, shared pages divided) where the system tells, else USS.

    Resident size would count every shared page once for each process. 0 when the tree has gone.
    """

    def held(process: psutil.Process) -> int:
        info = process.memory_full_info()
        return int(getattr(info, "pss", 0) or info.uss)

    return int(_total(pid, held))


def tree_cpu(pid: int | None) -> float:
    """Processor seconds that the tree has used, without processes that have ended. 0 without a process."""
    return _total(pid, lambda process: sum(process.cpu_times()[:2]))


class MemoryWatch:
    """Samples a tree's memory from a thread, as long as it is entered. Bytes."""

    def __init__(self, pid: int, interval: float = 1.0) -> None:
        self._pid, self._interval = pid, interval
        self._samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            if used := tree_memory(self._pid):
                self._samples.append((time.perf_counter(), used))
            self._ended.wait(self._interval)

    @property
    def peak(self) -> int:
        """The most so far, loading included; 0 before the first sample."""
        return max((used for _, used in self._samples), default=0)

    def steady(self, since: float) -> int:
        """The median from the time `since` (time.perf_counter) on: what it holds while it serves."""
        return int(percentile([used for moment, used in self._samples if moment >= since], 50) or 0)


@dataclass(frozen=True)
class Noise:
    """How quiet the machine was. busy: share of all processor time that others used while we slept.

    jitter: how much longer the 95th percentile of equal pieces of work took than the fastest; 0.1 is 10 %.
    """

    busy: float
    jitter: float

    @property
    def warning(self) -> str:
        """What a report says of it; empty on a quiet machine."""
        busy = f"other work used {self.busy:.0%} of the processors" if self.busy > BUSY_LIMIT else ""
        uneven = f"equal work took up to {self.jitter:.0%} longer" if self.jitter > JITTER_LIMIT else ""
        return "; ".join(filter(None, (busy, uneven)))


def noise(seconds: float = 1.0) -> Noise:
    """Sleep for half of `seconds` and see what others do; then spin for the other half and see how evenly."""
    psutil.cpu_percent()
    time.sleep(seconds / 2)
    busy = psutil.cpu_percent() / 100
    pieces = []
    until = time.perf_counter() + seconds / 2
    while (began := time.perf_counter()) < until:
        sum(range(20_000))
        pieces.append(time.perf_counter() - began)
    return Noise(busy, (percentile(pieces, 95) or 0.0) / min(pieces) - 1)


def warnings(before: Noise, after: Noise) -> list[str]:
    """What a report says of a machine that was not quiet."""
    return [
        f"the machine was not quiet {when}: {reading.warning}"
        for when, reading in (("before", before), ("after", after))
        if reading.warning
    ]
