"""Memory and processor time of whole process trees, and how quiet the machine is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
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


def tree_memory(pid: int) -> int:
    """Bytes that the tree holds: proportional (PSS, shared pages divided) where the system tells, else USS.

    Resident size would count every shared page once for each process. 0 when the tree has gone.
    """
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            info = process.memory_full_info()
            total += getattr(info, "pss", 0) or info.uss
    return total


def tree_cpu(pid: int | None) -> float:
    """Processor seconds the tree has used; processes that have ended are not in it. 0 without a process."""
    total = 0.0
    for process in tree(pid) if pid is not None else ():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class MemoryWatch:
    """Samples a tree's memory from a thread, from `start` on. Bytes."""

    def __init__(self, pid: int, interval: float = 1.0) -> None:
        self._pid, self._interval = pid, interval
        self._samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            if used := tree_memory(self._pid):
                self._samples.append((time.perf_counter(), used))
            self._ended.wait(self._interval)

    @property
    def peak(self) -> int:
        """The most since `start`, loading included; 0 before the first sample."""
        return max((used for _, used in self._samples), default=0)

    def steady(self, since: float) -> int:
        """The median from the time `since` (time.perf_counter) on: what it holds while it serves."""
        found = percentile([used for at, used in self._samples if at >= since], 50)
        return int(found or 0)


@contextlib.contextmanager
def watched(pid: int, really: bool = True) -> Iterator[MemoryWatch]:
    watch = MemoryWatch(pid)
    if really:
        watch.start()
    try:
        yield watch
    finally:
        if really:
            watch.stop()


@dataclass(frozen=True)
class Noise:
    """How quiet the machine was. busy: share of all processor time that others used while we slept.

    jitter: how much longer the 95th percentile of equal pieces of work took than the fastest; 0.1 is 10 %.
    """

    busy: float
    jitter: float

    @property
    def warning(self) -> str:
        """What to say of it; empty on a quiet machine."""
        said = []
        if self.busy > BUSY_LIMIT:
            said.append(f"other work used {self.busy:.0%} of the processors")
        if self.jitter > JITTER_LIMIT:
            said.append(f"equal work took up to {self.jitter:.0%} longer")
        return "; ".join(said)


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
    slow = percentile(pieces, 95) or 0.0
    return Noise(busy, slow / min(pieces) - 1)


def warnings(before: Noise, after: Noise) -> list[str]:
    """What a report says of a machine that was not quiet."""
    return [
        f"the machine was not quiet {when}: {reading.warning}"
        for when, reading in (("before", before), ("after", after))
        if reading.warning
    ]
