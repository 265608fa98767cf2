"""Which of onnxruntime's execution providers a session gets, and what is missing where it is another one.

onnxruntime lists a provider as available when it was built with it. Whether its libraries load shows only
when a session is created; then the session falls back to the CPU with a mere line in the log. So the
providers that the session really has are checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.backends import linux_memory
from edge.errors import InputError, UnavailableError, UsageError
from edge.machine import hardware
from edge.machine.cuda_libraries import missing_library, old_driver
from edge.setup import install_command, pip_command

# Short name -> (onnxruntime's name, the package that brings it).
NAMES = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "dml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime (on macOS)"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
}
DEVICES = ("auto", *NAMES)
_NO_GPU = "not on a GPU"


@dataclass(frozen=True, slots=True)
class Opened:
    """A session and what it got: the provider's name, the device as people call it, why it was taken.

    memory: where the KV cache lies: "cuda", or "cpu" for every provider without a memory that it offers.
    no_graphs: why runs cannot be captured as CUDA graphs, or "" where they can.
    """

    session: Any
    provider: str
    device: str
    why: str
    memory: str = "cpu"
    no_graphs: str = _NO_GPU


def library() -> Any:
    """The package onnxruntime. Raises UnavailableError where it is missing or does not load."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise UnavailableError(
            f"onnxruntime cannot be loaded: {error}", install_command("serve", "onnx")
        ) from error
    # Errors only: its warnings are of no use to someone who serves a model.
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def choose(asked: str, available: list[str], gpus: list[hardware.GPU]) -> tuple[str, str]:
    """(short name, why) for `asked`: auto, or a name of NAMES.

    Raises UsageError for another name, UnavailableError where this build of onnxruntime lacks it.
    """
    if asked == "auto":
        if not gpus:
            return "cpu", "no NVIDIA GPU was found"
        if NAMES["cuda"][0] not in available:
            return "cpu", "this build of onnxruntime has no CUDA: it is not onnxruntime-gpu (see edge doctor)"
        return "cuda", "a GPU was found"
    if asked not in NAMES:
        raise UsageError(f"--device {asked}: no such device", f"one of {', '.join(DEVICES)}")
    name, package = NAMES[asked]
    if name not in available:
        swap = f"{pip_command('uninstall', 'onnxruntime')}, then {pip_command('install', package)}"
        command = f"{install_command('onnx')} --cuda (onnxruntime-gpu)" if asked == "cuda" else swap
        raise UnavailableError(
            f"--device {asked}: this build of onnxruntime has {', '.join(available)} only",
            f"{command}; or serve with --device cpu",
        )
    return asked, "asked for"


def open_session(
    runtime: Any, path: Path, asked: str, *, threads: int, spin: bool, cache_type: str = "float32"
) -> Opened:
    """A session over `path`, whose cache is of `cache_type`, on what `asked` means here.

    Raises UnavailableError where a device that was asked for by name cannot be had, InputError where
    onnxruntime refuses the file.
    """
    gpus = hardware.gpus() if asked in ("auto", "cuda") else []
    name, why = choose(asked, list(runtime.get_available_providers()), gpus)
    if name == "cuda" and cache_type != "float16":
        # CUDA's attention computes in 16 bits: onnxruntime would leave it to the CPU, KV cache included.
        if asked == "cuda":
            raise InputError(f"{path} was exported for CPUs", "edge export onnx RUN --ep cuda --overwrite")
        name, why = "cpu", "a GPU was found, but the file was exported for CPUs (--ep cuda exports for GPUs)"
    log = _preload(runtime) if name == "cuda" else ""
    session, no_graphs = _session(runtime, path, name, threads, spin)
    if NAMES[name][0] not in session.get_providers():
        problem = _missing(runtime, name, log, gpus)
        if asked != "auto":
            raise UnavailableError(f"--device {asked}: onnxruntime fell back to the CPU: {problem}", "")
        return Opened(session, NAMES["cpu"][0], "cpu", f"a GPU was found, but {problem}")
    device = f"cuda: {gpus[0].name}" if name == "cuda" and gpus else name
    return Opened(session, NAMES[name][0], device, why, "cuda" if name == "cuda" else "cpu", no_graphs)


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """The path for a library that writes every path in UTF-8, as Linux under a locale like GBK does not.

    Raises InputError where the file's own name is written otherwise.
    """
    if os.fsencode(path) == str(path).encode("utf-8", "surrogateescape"):
        yield str(path)
        return
    if not path.name.isascii():
        encoding = sys.getfilesystemencoding()
        raise InputError(
            f"{path}: onnxruntime opens names in UTF-8 alone, and this locale writes them in {encoding}",
            "give the file a name in ASCII, or use a locale of UTF-8: LC_ALL=C.UTF-8",
        )
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _session(runtime: Any, path: Path, name: str, threads: int, spin: bool) -> tuple[Any, str]:
    """The session, and why its runs cannot be captured; see Opened."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    # Memory plans are kept for every shape of inputs, and the mask has another one at each step.
    options.enable_mem_pattern = False
    rest = [] if name == "cpu" else [NAMES["cpu"][0]]
    no_graphs = _NO_GPU
    if name == "cuda":
        try:
            capturing = (NAMES[name][0], {"enable_cuda_graph": "1"})
            with utf8_path(path) as file:
                return runtime.InferenceSession(file, options, providers=[capturing, *rest]), ""
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            # A part of the graph that CUDA does not compute. Any other error comes again below.
            no_graphs = " ".join(str(error).split())[:200]
    try:
        huge = linux_memory.use_huge_pages() if name == "cpu" else contextlib.nullcontext()
        with huge, utf8_path(path) as file:
            session = runtime.InferenceSession(file, options, providers=[NAMES[name][0], *rest])
        return session, no_graphs
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise InputError(
            f"onnxruntime cannot load {path}: {text}", "verify or export the file again"
        ) from error


def _preload(runtime: Any) -> str:
    """Load CUDA's libraries from the packages that bring them; returns what onnxruntime printed meanwhile."""
    if not hasattr(runtime, "preload_dlls"):
        return ""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runtime.preload_dlls()
    return output.getvalue()


def _missing(runtime: Any, name: str, log: str, gpus: list[hardware.GPU]) -> str:
    """Why the provider did not load, with the library, its version and the package that brings it."""
    if name == "cuda" and (old := old_driver(getattr(runtime, "cuda_version", "") or "", gpus)):
        return old
    error = log + load_error(runtime, name)
    library = missing_library(error, gpus)
    if library is None:
        return f"its provider does not load ({' '.join(error.split())[-300:] or 'no reason was given'})"
    version = f"CUDA {library.cuda}" if library.cuda else "CUDA version unknown"
    return f"{library.file} is missing ({version}): {pip_command('install', library.package)}"


def load_error(runtime: Any, name: str) -> str:
    """The system loader's message about the provider's library; "" where it loads or is not there."""
    pattern = "onnxruntime_providers_{}.dll" if sys.platform == "win32" else "libonnxruntime_providers_{}.so"
    library = Path(runtime.__file__).parent / "capi" / pattern.format(name)
    if not library.is_file():
        return ""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return ""
