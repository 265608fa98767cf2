"""Giving freed memory back to the system: glibc's malloc keeps it until `malloc_trim` is called."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil

# Freed bytes that may gather while a checkpointed model is trained. Less costs time: pages that are given
# back fault when they are used again.
SLACK = 256 * 2**20


@functools.cache
def malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, None where there is none."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Give back what loading has freed: hundreds of megabytes that glibc would keep."""
    gc.collect()
    if give := malloc_trim():
        give(0)


class _Layer:
    """Entered where a layer begins: gives freed memory back once SLACK of it may have gathered."""

    def __init__(self, give: Callable[[int], int]) -> None:
        self._give, self._resident = give, psutil.Process().memory_info
        self._least = sys.maxsize

    def __enter__(self) -> None:
        now = self._resident().rss
        if now > self._least + SLACK:
            self._give(0)
            now = self._least = self._resident().rss
        self._least = min(self._least, now)

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        pass


def checkpointing(device: str) -> dict[str, Any]:
    """Keywords for activation checkpointing that keep a CPU's memory near what tensors need.

    Each layer leaves free chunks that the next one's tensors do not fit into: 1.3 to 1.9 GiB from run to run
    where 1.0 would do.
    """
    give = malloc_trim()
    if device != "cpu" or give is None:
        return {}
    layer = _Layer(give)
    # For the forward pass, and for the recomputation.
    return {"context_fn": lambda: (layer, layer)}
