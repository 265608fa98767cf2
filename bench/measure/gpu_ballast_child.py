"""Leaves a part of a GPU's memory free: `python -m bench.measure.gpu_ballast_child BYTES`.

It prints the bytes that are free when it has taken the rest of the first GPU's memory, and keeps that until
its standard input ends. So a large GPU stands in for a small one's memory, not for its speed.
"""

from __future__ import annotations

import ctypes
import sys


def main(argv: list[str]) -> int:
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    def call(name: str, *arguments: object) -> None:
        if code := getattr(cuda, name)(*arguments):
            raise SystemExit(f"{name} gave {code}")

    device, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    if free.value > int(argv[0]):
        call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(free.value - int(argv[0])))
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    sys.stdout.write(f"{free.value}\n")
    sys.stdout.flush()
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
