"""The installed llama.cpp's products and attention against float64, as a process of its own.

It reads jobs, one a line, and ends what it writes about each with a line `end`:

    products TYPE ROWS [ROWS ...]
    exact TYPE ROWS
    stages TYPE TYPE_OF_VALUES ROWS [ROWS ...]
    attention WIDTH HEADS CACHED_HEADS TOKENS STREAMS CELLS MASK
    pages

Products: for every number of rows `"ROWS ERROR ALIKE"`, the largest error as a share of the largest result,
and whether each row is, to the bit, what it is alone. Values are whole numbers, and each block holds 127, so
that rounding them to 8 bits changes nothing. Of Q4_1, `"none"` where no weights are repacked for AMX.

Exact: of rows of any numbers, whether results are, to the bit, what llama.cpp's arithmetic of blocks gives.

Stages: a layer without its attention, for every number of rows `"ROWS NODES ALIKE"`: how many nodes llama.cpp
computed, and whether results and caches are, to the bit, those of nodes that are computed one by one, since
each is asked for.

Attention: `"ERROR ALIKE"`, the same error, and whether two and three threads, and each token alone, give the
same to the bit. MASK: none, causal, holes. Cells that no token sees hold no numbers.

Pages: for every kind of buffer that repacks weights `"NAME ASKED"`, whether large pages were asked for.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

WIDTH, COLUMNS, HEAD = 768, 96, 32
SCALES = {
    "Q4_0": (0, 2),
    "Q8_0": (0, 2),
    "Q4_1": (0, 4),
    "Q4_K": (0, 4),
    "Q6_K": (208, 210),
}  # bytes of a block that are halves


class InitParams(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def weights(
    kind: gguf.GGMLQuantizationType, columns: int = COLUMNS, seed: int = 5
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Random rows of WIDTH values as stored, one for each column, and what they stand for."""
    random = np.random.default_rng(seed)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (columns * WIDTH // values, size), np.uint8)
    begin, end = SCALES[kind.name]
    halves = random.uniform(0.001, 0.01, (len(blocks), (end - begin) // 2)).astype("<f2")
    blocks[:, begin:end] = halves.view(np.uint8)
    stored = blocks.reshape(columns, -1)
    return stored, gguf.quants.dequantize(stored, kind).astype(np.float64)


def inputs(rows: int) -> NDArray[np.float32]:
    values = np.random.default_rng(6).integers(-126, 127, (rows, WIDTH)).astype(np.float32)
    values[:, ::32] = 127
    return values


class Ggml:
    """As much of ggml as a product and an attention take."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        name = {"win32": "{}.dll", "darwin": "lib{}.dylib"}.get(sys.platform, "lib{}.so")
        self._base = ctypes.CDLL(str(folder / name.format("ggml-base")))
        self._cpu = ctypes.CDLL(str(folder / name.format("ggml-cpu")))
        for library, functions in (
            (self._base, "ggml_init ggml_new_tensor_4d ggml_new_graph ggml_mul_mat ggml_flash_attn_ext"),
            (self._base, "ggml_rms_norm ggml_mul ggml_add ggml_rope ggml_set_rows ggml_swiglu_split"),
            (self._base, "ggml_reshape_2d ggml_reshape_3d ggml_gallocr_new ggml_graph_node"),
            (self._base, "ggml_backend_alloc_ctx_tensors_from_buft ggml_backend_dev_backend_reg"),
            (self._base, "ggml_backend_get_device ggml_backend_reg_get_proc_address"),
            (self._base, "ggml_backend_buft_alloc_buffer ggml_backend_buffer_get_base"),
            (self._cpu, "ggml_backend_cpu_init ggml_backend_cpu_buffer_type"),
        ):
            for function in functions.split():
                getattr(library, function).restype = ctypes.c_void_p
        self._base.ggml_backend_buft_name.restype = ctypes.c_char_p
        self._backend = ctypes.c_void_p(self._cpu.ggml_backend_cpu_init())
        self._memory = ctypes.c_void_p(self._cpu.ggml_backend_cpu_buffer_type())
        self.threads(2)

    def buffer_types(self) -> dict[bytes, ctypes.c_void_p]:
        """Those that repack weights."""
        device = ctypes.c_void_p(self._base.ggml_backend_get_device(self._backend))
        registry = ctypes.c_void_p(self._base.ggml_backend_dev_backend_reg(device))
        address = self._base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        give = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        kinds = itertools.takewhile(bool, give(device))
        return {
            self._base.ggml_backend_buft_name(ctypes.c_void_p(kind)): ctypes.c_void_p(kind) for kind in kinds
        }

    def laid_out(self) -> ctypes.c_void_p:
        """Where weights go that our products read."""
        kinds = self.buffer_types()
        return kinds.get(b"AMX", kinds[b"CPU_REPACK"])

    def _tensor(
        self, kind: int, shape: tuple[int, ...], where: ctypes.c_void_p, data: bytes
    ) -> ctypes.c_void_p:
        """shape: as ggml has it, the innermost first."""
        context = ctypes.c_void_p(self._base.ggml_init(InitParams(2**20, None, True)))
        sizes = [ctypes.c_int64(size) for size in (*shape, 1, 1, 1)[:4]]
        tensor = ctypes.c_void_p(self._base.ggml_new_tensor_4d(context, kind, *sizes))
        assert self._base.ggml_backend_alloc_ctx_tensors_from_buft(context, where)
        size = ctypes.c_size_t(len(data))
        self._base.ggml_backend_tensor_set(tensor, data, ctypes.c_size_t(0), size)
        return tensor

    def _plain(self, values: NDArray[Any]) -> ctypes.c_void_p:
        kind = {"float32": 0, "float16": 1, "int32": 26, "int64": 27}[values.dtype.name]
        return self._tensor(kind, values.shape[::-1], self._memory, values.tobytes())

    def _compute(self, result: ctypes.c_void_p, context: ctypes.c_void_p, out: NDArray[np.float32]) -> None:
        assert self._base.ggml_backend_alloc_ctx_tensors_from_buft(context, self._memory)
        graph = ctypes.c_void_p(self._base.ggml_new_graph(context))
        self._base.ggml_build_forward_expand(graph, result)
        assert self._base.ggml_backend_graph_compute(self._backend, graph) == 0
        self._read(result, out)

    def threads(self, count: int) -> None:
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, count)

    def weight(self, kind: int, stored: NDArray[np.uint8], where: ctypes.c_void_p) -> ctypes.c_void_p:
        return self._tensor(kind, (WIDTH, len(stored)), where, stored.tobytes())

    def _read(self, tensor: ctypes.c_void_p, out: NDArray[Any]) -> NDArray[Any]:
        to = out.ctypes.data_as(ctypes.c_void_p)
        self._base.ggml_backend_tensor_get(tensor, to, ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes))
        return out

    def place(self, size: int, where: ctypes.c_void_p) -> int:
        """Address of `size` new bytes there."""
        buffer = ctypes.c_void_p(self._base.ggml_backend_buft_alloc_buffer(where, ctypes.c_size_t(size)))
        return int(self._base.ggml_backend_buffer_get_base(buffer))

    def product(self, weight: ctypes.c_void_p, values: NDArray[np.float32]) -> NDArray[np.float32]:
        context = ctypes.c_void_p(self._base.ggml_init(InitParams(2**22, None, True)))
        result = ctypes.c_void_p(self._base.ggml_mul_mat(context, weight, self._plain(values)))
        out = np.empty((len(values), COLUMNS), np.float32)
        self._compute(result, context, out)
        return out

    def layer(
        self, weights_: dict[str, ctypes.c_void_p], values: NDArray[np.float32], *, one_by_one: bool
    ) -> tuple[int, list[NDArray[Any]]]:
        """The nodes that were computed; the result, and the caches of keys and values.

        weights_: of q, k, v, o, gate, up and down. Memory is given out as llama.cpp does it, each result's
        again after its last use, but where nodes are computed `one_by_one`.
        """
        base, rows, random = self._base, len(values), np.random.default_rng(8)
        context = ctypes.c_void_p(base.ggml_init(InitParams(2**22, None, True)))

        def op(name: str, *given: Any) -> ctypes.c_void_p:
            return ctypes.c_void_p(getattr(base, f"ggml_{name}")(context, *given))

        def sizes(*numbers: int) -> list[ctypes.c_int64]:
            return [ctypes.c_int64(number) for number in numbers]

        def vector(size: int) -> ctypes.c_void_p:
            return self._plain(random.uniform(0.5, 1.5, size).astype(np.float32))

        def normed(x: ctypes.c_void_p) -> ctypes.c_void_p:
            return op("mul", op("rms_norm", x, ctypes.c_float(1e-5)), vector(WIDTH))

        def biased(name: str, x: ctypes.c_void_p, size: int) -> ctypes.c_void_p:
            return op("add", op("mul_mat", weights_[name], x), vector(size))

        def turned(x: ctypes.c_void_p, size: int) -> ctypes.c_void_p:
            heads = op("reshape_3d", x, *sizes(HEAD, size // HEAD, rows))
            return op("reshape_2d", op("rope", heads, positions, HEAD, 2), *sizes(size, rows))

        positions = self._plain(np.arange(3, rows + 3, dtype=np.int32))
        cells = self._plain(np.arange(rows, dtype=np.int64)[::-1].copy())
        caches = [self._plain(np.zeros((rows, COLUMNS), np.float16)) for _ in range(2)]
        x = self._plain(values)
        first = normed(x)
        q = turned(biased("q", first, WIDTH), WIDTH)
        v = biased("v", first, COLUMNS)
        k = turned(biased("k", first, COLUMNS), COLUMNS)
        graph = ctypes.c_void_p(base.ggml_new_graph(context))
        for wanted in (q, v, k, *(op("set_rows", *one, cells) for one in zip(caches, (k, v), strict=True))):
            base.ggml_build_forward_expand(graph, wanted)
        y = op("add", op("mul_mat", weights_["o"], q), x)
        second = normed(y)
        gate, up = (op("mul_mat", weights_[name], second) for name in ("gate", "up"))
        last = op("add", op("mul_mat", weights_["down"], op("swiglu_split", gate, up)), y)
        base.ggml_build_forward_expand(graph, last)
        base.ggml_set_output(last)
        for i in range(base.ggml_graph_n_nodes(graph) if one_by_one else 0):
            base.ggml_set_output(ctypes.c_void_p(base.ggml_graph_node(graph, i)))
        assert base.ggml_gallocr_alloc_graph(ctypes.c_void_p(base.ggml_gallocr_new(self._memory)), graph)
        computed = 0

        def count(_: object) -> bool:
            nonlocal computed
            computed += 1
            return False

        counting = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(count)
        self._cpu.ggml_backend_cpu_set_abort_callback(self._backend, counting, None)
        assert base.ggml_backend_graph_compute(self._backend, graph) == 0
        self._cpu.ggml_backend_cpu_set_abort_callback(self._backend, None, None)
        results = [self._read(cache, np.empty((rows, COLUMNS), np.float16)) for cache in caches]
        return computed, [self._read(last, np.empty((rows, WIDTH), np.float32)), *results]

    def attention(
        self,
        queries: NDArray[np.float32],
        keys: NDArray[np.float16],
        values: NDArray[np.float16],
        mask: NDArray[np.float16] | None,
    ) -> NDArray[np.float32]:
        """queries `[streams, heads, tokens, width]`, keys and values `[streams, cached heads, cells, width]`,
        mask `[streams, 1, tokens, cells]` -> `[streams, tokens, heads, width]`.
        """
        context = ctypes.c_void_p(self._base.ggml_init(InitParams(2**22, None, True)))
        streams, heads, tokens, width = queries.shape
        given = [self._plain(queries), self._plain(keys), self._plain(values)]
        given.append(ctypes.c_void_p() if mask is None else self._plain(mask))
        numbers = [ctypes.c_float(width**-0.5), ctypes.c_float(0), ctypes.c_float(0)]
        result = ctypes.c_void_p(self._base.ggml_flash_attn_ext(context, *given, *numbers))
        out = np.empty((streams, tokens, heads, width), np.float32)
        self._compute(result, context, out)
        return out


def attended(
    queries: NDArray[np.float32],
    keys: NDArray[np.float16],
    values: NDArray[np.float16],
    mask: NDArray[np.float16] | None,
) -> NDArray[np.float64]:
    """What `Ggml.attention` should give; a token that sees nothing gets zeros."""
    shared = queries.shape[1] // keys.shape[1]
    wide = [np.repeat(np.nan_to_num(one.astype(np.float64)), shared, axis=1) for one in (keys, values)]
    scores = np.einsum("shtd,shcd->shtc", queries.astype(np.float64), wide[0]) * queries.shape[3] ** -0.5
    if mask is not None:
        scores = scores + mask.astype(np.float64)
    highest = scores.max(axis=3, keepdims=True)
    weights_ = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    whole = weights_.sum(axis=3, keepdims=True)
    weights_ /= np.where(whole == 0, 1, whole)
    return np.einsum("shtc,shcd->sthd", weights_, wide[1])


def attention(width: int, heads: int, cached: int, tokens: int, streams: int, cells: int, kind: str) -> None:
    random = np.random.default_rng(7)
    queries = random.normal(0, 2, (streams, heads, tokens, width)).astype(np.float32)
    keys, values = (random.normal(0, 1, (streams, cached, cells, width)).astype(np.float16) for _ in range(2))
    mask = None
    if kind != "none":
        seen = np.tri(tokens, cells, cells - tokens, dtype=bool)[None, None].repeat(streams, axis=0)
        if kind == "holes":
            seen &= random.random((streams, 1, tokens, cells)) < 0.3
            seen[..., cells // 4 : cells // 2] = False
            seen[0, 0, 0] = False
        mask = np.where(seen, np.float16(0), np.float16(-np.inf))
        unseen = ~seen.any(axis=(1, 2))
        for stream in range(streams):
            keys[stream][:, unseen[stream]] = np.nan
            values[stream][:, unseen[stream]] = np.nan
    ggml = Ggml()
    found = ggml.attention(queries, keys, values, mask)
    ggml.threads(3)
    alike = np.array_equal(ggml.attention(queries, keys, values, mask), found)
    for token in range(tokens):
        part = slice(token, token + 1)
        own = None if mask is None else mask[:, :, part].copy()
        one = ggml.attention(queries[:, :, part].copy(), keys, values, own)
        alike &= np.array_equal(one, found[:, part])
    right = attended(queries, keys, values, mask)
    error = np.abs(found - right).max() / max(float(np.abs(right).max()), 1e-9)
    sys.stdout.write(f"{error:.3e} {alike}\n")


def products(name: str, *counts: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    ggml = Ggml()
    if name == "Q4_1" and b"AMX" not in ggml.buffer_types():
        sys.stdout.write("none\n")
        return
    stored, meant = weights(kind)
    weight = ggml.weight(kind.value, stored, ggml.laid_out())
    values = inputs(max(map(int, counts)))
    alone = np.concatenate([ggml.product(weight, values[row : row + 1]) for row in range(len(values))])
    for count in map(int, counts):
        found = ggml.product(weight, values[:count])
        right = values[:count].astype(np.float64) @ meant.T
        error = np.abs(found - right).max() / np.abs(right).max()
        sys.stdout.write(f"{count} {error:.3e} {np.array_equal(found, alone[:count])}\n")


def in_order(name: str, stored: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Products of blocks of 32 that are rounded to 8 bits, added up in order and rounded to float32 each."""
    blocks = stored.reshape(COLUMNS, WIDTH // 32, -1)
    scales = blocks[:, :, :2].copy().view("<f2")[:, :, 0].astype(np.float32)
    codes = blocks[:, :, 2:]
    if name == "Q4_0":
        numbers = np.concatenate([codes & 15, codes >> 4], axis=2).astype(np.int64) - 8
    else:
        numbers = codes.view(np.int8).astype(np.int64)
    parts = values.reshape(len(values), WIDTH // 32, 32)
    most = np.abs(parts).max(axis=2)
    rounded = np.rint(parts * (np.float32(127) / most)[:, :, None]).astype(np.int64)
    by = (most / np.float32(127)).astype(np.float16).astype(np.float32)
    total = np.zeros((len(values), COLUMNS), np.float32)
    for i in range(WIDTH // 32):
        dots = (rounded[:, i] @ numbers[:, i].T).astype(np.longdouble)
        total = (dots * (by[:, i, None] * scales[:, i]).astype(np.longdouble) + total).astype(np.float32)
    return total


def exact(name: str, count: str) -> None:
    ggml = Ggml()
    kind = gguf.GGMLQuantizationType[name]
    stored, _ = weights(kind)
    values = np.random.default_rng(10).normal(0, 1, (int(count), WIDTH)).astype(np.float32)
    found = ggml.product(ggml.weight(kind.value, stored, ggml.laid_out()), values)
    sys.stdout.write(f"{np.array_equal(found, in_order(name, stored, values))}\n")


def stages(name: str, name_of_values: str, *counts: str) -> None:
    ggml = Ggml()
    weights_ = {}
    for seed, one in enumerate(("q", "k", "v", "o", "gate", "up", "down")):
        kind = gguf.GGMLQuantizationType[name_of_values if one == "v" else name]
        stored, _ = weights(kind, COLUMNS if one in ("k", "v") else WIDTH, seed)
        weights_[one] = ggml.weight(kind.value, stored, ggml.laid_out())
    values = np.random.default_rng(9).normal(0, 1, (max(map(int, counts)), WIDTH)).astype(np.float32)
    for count in map(int, counts):
        _, right = ggml.layer(weights_, values[:count], one_by_one=True)
        alike = True
        for threads in (1, 2, 3):
            ggml.threads(threads)
            nodes, found = ggml.layer(weights_, values[:count], one_by_one=False)
            alike &= all(map(np.array_equal, found, right))
        sys.stdout.write(f"{count} {nodes} {alike}\n")


def pages() -> None:
    size = 16 * 2**20
    ggml = Ggml()
    for name, where in ggml.buffer_types().items():
        middle = ggml.place(size, where) + size // 2
        found, asked = False, False
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                found = int(span[1], 16) <= middle < int(span[2], 16)
            elif found and line.startswith("VmFlags:"):
                asked = "hg" in line.split()
        sys.stdout.write(f"{name.decode('utf-8')} {asked}\n")


if __name__ == "__main__":
    for line in sys.stdin:
        job, *given = line.split()
        if job == "attention":
            attention(*map(int, given[:6]), given[6])
        else:
            {"products": products, "exact": exact, "stages": stages, "pages": pages}[job](*given)
        sys.stdout.write("end\n")
        sys.stdout.flush()
