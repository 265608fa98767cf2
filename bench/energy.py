"""Energy and graphics cards, where the machine tells: RAPL counters of the processors, NVML or nvidia-smi.

All of it is the whole machine's, not one process's: what idle servers and the load generator take is in it.
Intel's and AMD's counters lie under /sys/class/powercap and are often readable by root alone; then nothing is
said. A card's power is sampled and integrated by the trapezium rule.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
INTERVAL_S = 0.25
_QUERY = "power.draw,utilization.gpu,memory.used"


class Rapl:
    """Energy counters of the processor packages. `joules` of two readings knows that counters start again."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._counters: list[tuple[Path, int]] = []
        for folder in sorted(root.glob("intel-rapl:*")):
            # intel-rapl:0 is a package, intel-rapl:0:0 a part of it; psys holds the packages once more.
            with contextlib.suppress(OSError, ValueError):
                if folder.name.count(":") == 1 and _text(folder / "name").startswith("package"):
                    most = int(_text(folder / "max_energy_range_uj"))
                    int(_text(folder / "energy_uj"))
                    self._counters.append((folder / "energy_uj", most))

    def read(self) -> list[int]:
        """Microjoules of each package; empty where there is none that may be read."""
        return [int(_text(path)) for path, _ in self._counters]

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float | None:
        """Between two readings less than one turn of a counter apart; None without counters."""
        if not self._counters:
            return None
        pairs = zip(before, after, self._counters, strict=True)
        return sum((b - a) % (most + 1) for a, b, (_, most) in pairs) / 1e6


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Reading:
    """All cards at one time (time.perf_counter): watts and bytes summed, the busiest one's share of time."""

    at: float
    watts: float | None
    busy: float
    memory: int


class Cards:
    """Watches the NVIDIA cards from a thread; without one, or without NVML and nvidia-smi, knows nothing."""

    def __init__(self) -> None:
        self._readings: list[Reading] = []
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Cards:
        source = _nvml() or self._nvidia_smi()
        if source is not None:
            self._thread = threading.Thread(target=self._run, args=(source,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._thread is not None:
            self._thread.join()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()

    def _run(self, source: Iterator[Reading]) -> None:
        for reading in source:
            self._readings.append(reading)
            if self._ended.is_set():
                return

    def _nvidia_smi(self) -> Iterator[Reading] | None:
        program = shutil.which("nvidia-smi")
        if program is None:
            return None
        every = str(int(INTERVAL_S * 1000))
        command = [program, f"--query-gpu=index,{_QUERY}", "--format=csv,noheader,nounits", "-lms", every]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None
        return parse(line.decode("utf-8", "replace") for line in self._process.stdout)

    def joules(self, since: float, until: float) -> float | None:
        """Between two times; None where no card says its power at least twice."""
        power = [(r.at, r.watts) for r in self._readings if since <= r.at <= until and r.watts is not None]
        if len(power) < 2:
            return None
        area = sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in itertools.pairwise(power))
        # Before the first and after the last reading as between them.
        return area * (until - since) / (power[-1][0] - power[0][0])

    def busy(self, since: float, until: float) -> float | None:
        """Mean share of time in which a kernel ran (NVML's utilisation), 0 to 1."""
        found = [r.busy for r in self._readings if since <= r.at <= until]
        return sum(found) / len(found) if found else None

    def memory(self) -> int | None:
        """Bytes used on all cards at the last reading."""
        return self._readings[-1].memory if self._readings else None


def parse(lines: Iterator[str]) -> Iterator[Reading]:
    """Readings of nvidia-smi's lines `index, watts, percent, MiB`; one ends when its first index returns."""
    group: dict[str, list[str]] = {}
    at = 0.0
    for line in lines:
        index, *values = [part.strip() for part in line.split(",")]
        if len(values) != 3:
            continue
        if index in group:
            yield _reading(at, group.values())
            group = {}
        at = at if group else time.perf_counter()
        group[index] = values


def _reading(at: float, rows: Iterable[list[str]]) -> Reading:
    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:  # "[N/A]"
            return None

    watts, busy, memory = zip(*([number(text) for text in row] for row in rows), strict=True)
    known = [one for one in watts if one is not None]
    return Reading(
        at,
        sum(known) if known else None,
        max(one or 0.0 for one in busy) / 100,
        int(sum(one or 0.0 for one in memory) * 2**20),
    )


def _nvml() -> Iterator[Reading] | None:
    """Readings by NVIDIA's Python binding, where it happens to be installed."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        cards = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # absent, or a driver that it cannot talk to: its errors are classes of its own
        return None
    return _nvml_readings(nvml, cards) if cards else None


def _nvml_readings(nvml: Any, cards: Sequence[Any]) -> Iterator[Reading]:
    while True:
        watts: list[float] = []
        for card in cards:
            with contextlib.suppress(nvml.NVMLError):
                watts.append(nvml.nvmlDeviceGetPowerUsage(card) / 1000)
        yield Reading(
            time.perf_counter(),
            sum(watts) if watts else None,
            max(nvml.nvmlDeviceGetUtilizationRates(card).gpu for card in cards) / 100,
            sum(nvml.nvmlDeviceGetMemoryInfo(card).used for card in cards),
        )
        time.sleep(INTERVAL_S)
