"""A bound on the memory of this process."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def limit_memory(size: int) -> bool:
    """Let this process take `size` bytes at most; whether the system can do that."""
    if sys.platform == "win32":
        return _limit_job(size)
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ValueError, OSError):
        return False
    # macOS takes the bound, and does not keep it.
    return sys.platform != "darwin"


class _BasicLimits(ctypes.Structure):
    """JOBOBJECT_BASIC_LIMIT_INFORMATION of winnt.h."""

    _fields_ = (
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", ctypes.c_uint32),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", ctypes.c_uint32),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", ctypes.c_uint32),
        ("SchedulingClass", ctypes.c_uint32),
    )


class _ExtendedLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION of winnt.h."""

    _fields_ = (
        ("BasicLimitInformation", _BasicLimits),
        ("IoInfo", ctypes.c_uint64 * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


_LIMIT_PROCESS_MEMORY, _EXTENDED_LIMITS = 0x100, 9


def _limit_job(size: int) -> bool:
    """Put this process into a job of its own, which its handle keeps until the process ends."""
    kernel: Any = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined, unused-ignore]
    kernel.CreateJobObjectW.restype = kernel.GetCurrentProcess.restype = ctypes.c_void_p
    job = ctypes.c_void_p(kernel.CreateJobObjectW(None, None))
    limits = _ExtendedLimits(ProcessMemoryLimit=size)
    limits.BasicLimitInformation.LimitFlags = _LIMIT_PROCESS_MEMORY
    given = (ctypes.byref(limits), ctypes.c_uint32(ctypes.sizeof(limits)))
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    return bool(
        kernel.SetInformationJobObject(job, _EXTENDED_LIMITS, *given)
        and kernel.AssignProcessToJobObject(job, process)
    )
