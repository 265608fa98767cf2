"""Products of the installed llama.cpp with repacked weights against float64, as a process of its own.

    python native_products.py TYPE ROWS [ROWS ...]

For every number of rows: `"ROWS ERROR ALIKE"`, the largest error as a share of the largest result, and whether
each row is, to the bit, what it is alone. Values are whole numbers, and each block holds 127, so that rounding
them to 8 bits changes nothing and the result is known. `"none"` where no weights are repacked for AMX.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

WIDTH, COLUMNS = 768, 96
SCALES = {
    "Q4_0": (0, 2),
    "Q8_0": (0, 2),
    "Q4_1": (0, 4),
    "Q4_K": (0, 4),
    "Q6_K": (208, 210),
}  # bytes of a block that are halves


class InitParams(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def weights(kind: gguf.GGMLQuantizationType) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """COLUMNS random rows of WIDTH values as stored, and what they stand for."""
    random = np.random.default_rng(5)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (COLUMNS * WIDTH // values, size), np.uint8)
    begin, end = SCALES[kind.name]
    halves = random.uniform(0.001, 0.01, (len(blocks), (end - begin) // 2)).astype("<f2")
    blocks[:, begin:end] = halves.view(np.uint8)
    stored = blocks.reshape(COLUMNS, -1)
    return stored, gguf.quants.dequantize(stored, kind).astype(np.float64)


def inputs(rows: int) -> NDArray[np.float32]:
    values = np.random.default_rng(6).integers(-126, 127, (rows, WIDTH)).astype(np.float32)
    values[:, ::32] = 127
    return values


class Ggml:
    """As much of ggml as one product takes."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        name = {"win32": "{}.dll", "darwin": "lib{}.dylib"}.get(sys.platform, "lib{}.so")
        self._base = ctypes.CDLL(str(folder / name.format("ggml-base")))
        self._cpu = ctypes.CDLL(str(folder / name.format("ggml-cpu")))
        for library, functions in (
            (self._base, "ggml_init ggml_new_tensor_2d ggml_mul_mat ggml_new_graph ggml_get_data"),
            (self._base, "ggml_backend_alloc_ctx_tensors_from_buft ggml_backend_dev_backend_reg"),
            (self._base, "ggml_backend_get_device ggml_backend_reg_get_proc_address ggml_backend_buft_name"),
            (self._cpu, "ggml_backend_cpu_init ggml_backend_cpu_buffer_type"),
        ):
            for function in functions.split():
                getattr(library, function).restype = ctypes.c_void_p
        self._base.ggml_backend_buft_name.restype = ctypes.c_char_p
        self._backend = ctypes.c_void_p(self._cpu.ggml_backend_cpu_init())
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, 2)

    def buffer_type(self, name: bytes) -> ctypes.c_void_p | None:
        device = ctypes.c_void_p(self._base.ggml_backend_get_device(self._backend))
        registry = ctypes.c_void_p(self._base.ggml_backend_dev_backend_reg(device))
        address = self._base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        give = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        for kind in give(device):
            if not kind:
                return None
            if self._base.ggml_backend_buft_name(ctypes.c_void_p(kind)) == name:
                return ctypes.c_void_p(kind)
        return None

    def _tensor(
        self, kind: int, width: int, rows: int, where: ctypes.c_void_p, data: bytes
    ) -> ctypes.c_void_p:
        context = ctypes.c_void_p(self._base.ggml_init(InitParams(2**20, None, True)))
        made = self._base.ggml_new_tensor_2d(context, kind, ctypes.c_int64(width), ctypes.c_int64(rows))
        tensor = ctypes.c_void_p(made)
        assert self._base.ggml_backend_alloc_ctx_tensors_from_buft(context, where)
        size = ctypes.c_size_t(len(data))
        self._base.ggml_backend_tensor_set(tensor, data, ctypes.c_size_t(0), size)
        return tensor

    def weight(self, kind: int, stored: NDArray[np.uint8], where: ctypes.c_void_p) -> ctypes.c_void_p:
        return self._tensor(kind, WIDTH, COLUMNS, where, stored.tobytes())

    def product(self, weight: ctypes.c_void_p, values: NDArray[np.float32]) -> NDArray[np.float32]:
        plain = ctypes.c_void_p(self._cpu.ggml_backend_cpu_buffer_type())
        given = self._tensor(0, WIDTH, len(values), plain, values.tobytes())
        context = ctypes.c_void_p(self._base.ggml_init(InitParams(2**22, None, True)))
        result = ctypes.c_void_p(self._base.ggml_mul_mat(context, weight, given))
        assert self._base.ggml_backend_alloc_ctx_tensors_from_buft(context, plain)
        graph = ctypes.c_void_p(self._base.ggml_new_graph(context))
        self._base.ggml_build_forward_expand(graph, result)
        assert self._base.ggml_backend_graph_compute(self._backend, graph) == 0
        out = np.empty((len(values), COLUMNS), np.float32)
        to = out.ctypes.data_as(ctypes.c_void_p)
        self._base.ggml_backend_tensor_get(result, to, ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes))
        return out


def main(name: str, *counts: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    ggml = Ggml()
    where = ggml.buffer_type(b"AMX")
    if where is None:
        sys.stdout.write("none\n")
        return
    stored, meant = weights(kind)
    weight = ggml.weight(kind.value, stored, where)
    values = inputs(max(map(int, counts)))
    alone = np.concatenate([ggml.product(weight, values[row : row + 1]) for row in range(len(values))])
    for count in map(int, counts):
        found = ggml.product(weight, values[:count])
        right = values[:count].astype(np.float64) @ meant.T
        error = np.abs(found - right).max() / np.abs(right).max()
        sys.stdout.write(f"{count} {error:.3e} {np.array_equal(found, alone[:count])}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
