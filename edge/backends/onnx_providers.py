"""Which of onnxruntime's execution providers a session gets, and what is missing where it is another one.

onnxruntime lists a provider as available when it was built with it; whether its libraries load is seen only
when a session is made, and then the session falls back to the processor with a mere line in the log. So what
the session really has is looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.backends import linux_pages
from edge.errors import InputError, UnavailableError, UsageError
from edge.machine import hardware
from edge.machine.doctor import missing_library, old_driver

# Short name -> (onnxruntime's name, the package that brings it).
NAMES = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "dml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime (on macOS)"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
}
DEVICES = ("auto", *NAMES)


@dataclass(frozen=True, slots=True)
class Opened:
    """A session and what it got: the provider's name, the device as people call it, why it was taken.

    memory: where keys and values lie; providers that have no memory of their own to offer compute beside it.
    unrecordable: why runs cannot be recorded (see onnx_recorded), or "" where they can.
    """

    session: Any
    provider: str
    device: str
    why: str
    memory: str = "cpu"
    unrecordable: str = "not on a card"


def library() -> Any:
    """The package onnxruntime. Raises UnavailableError where it is missing or does not load."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise UnavailableError(
            f"onnxruntime cannot be loaded: {error}", "pip install -c constraints.txt '.[serve,onnx]'"
        ) from error
    # What it says of less than an error is of no use to who serves a model.
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def choose(asked: str, available: list[str], cards: list[hardware.GPU]) -> tuple[str, str]:
    """(short name, why) for what `asked` is: auto, or a name of NAMES.

    Raises UsageError for another name, UnavailableError where this build of onnxruntime lacks it.
    """
    if asked == "auto":
        if not cards:
            return "cpu", "no NVIDIA card was found"
        if NAMES["cuda"][0] not in available:
            return "cpu", f"this build of onnxruntime has no CUDA (pip install {NAMES['cuda'][1]})"
        return "cuda", "a card was found"
    if asked not in NAMES:
        raise UsageError(f"--device {asked}: no such device", f"one of {', '.join(DEVICES)}")
    name, package = NAMES[asked]
    if name not in available:
        raise UnavailableError(
            f"--device {asked}: this build of onnxruntime has {', '.join(available)} only",
            f"pip uninstall onnxruntime, then pip install {package}; or serve with --device cpu",
        )
    return asked, "asked for"


def open_session(
    runtime: Any, path: Path, asked: str, *, threads: int, spin: bool, cache_type: str = "float32"
) -> Opened:
    """A session over `path`, whose cache is of `cache_type`, on what `asked` means here.

    Raises UnavailableError where a device that was asked for by name cannot be had, InputError where
    onnxruntime refuses the file.
    """
    cards = hardware.gpus() if asked in ("auto", "cuda") else []
    name, why = choose(asked, list(runtime.get_available_providers()), cards)
    if name == "cuda" and cache_type != "float16":
        # CUDA's attention computes in 16 bits: it would be left to the processor, cells and all.
        if asked == "cuda":
            raise InputError(
                f"{path} was exported for processors", "edge export onnx RUN --ep cuda --overwrite"
            )
        name, why = (
            "cpu",
            "a card was found, but the file was exported for processors (--ep cuda is the other)",
        )
    said = _preload(runtime) if name == "cuda" else ""
    session, unrecordable = _session(runtime, path, name, threads, spin)
    if NAMES[name][0] not in session.get_providers():
        lacks = _missing(runtime, name, said, cards)
        if asked != "auto":
            raise UnavailableError(f"--device {asked}: onnxruntime fell back to the processor: {lacks}", "")
        return Opened(session, NAMES["cpu"][0], "cpu", f"a card was found, but {lacks}")
    device = f"cuda: {cards[0].name}" if name == "cuda" and cards else name
    return Opened(session, NAMES[name][0], device, why, "cuda" if name == "cuda" else "cpu", unrecordable)


def _session(runtime: Any, path: Path, name: str, threads: int, spin: bool) -> tuple[Any, str]:
    """The session, and why its runs cannot be recorded; see Opened."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    # Plans of memory are kept for every shape of inputs, and the mask has another one at each step.
    options.enable_mem_pattern = False
    rest = [] if name == "cpu" else [NAMES["cpu"][0]]
    unrecordable = "not on a card"
    if name == "cuda":
        try:
            recording = (NAMES[name][0], {"enable_cuda_graph": "1"})
            return runtime.InferenceSession(str(path), options, providers=[recording, *rest]), ""
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            # A part of the graph that CUDA does not compute. What is wrong otherwise is so without it too.
            unrecordable = " ".join(str(error).split())[:200]
    try:
        with linux_pages.made_large() if name == "cpu" else contextlib.nullcontext():
            session = runtime.InferenceSession(str(path), options, providers=[NAMES[name][0], *rest])
        return session, unrecordable
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise InputError(
            f"onnxruntime cannot load {path}: {text}", "verify or export the file again"
        ) from error


def _preload(runtime: Any) -> str:
    """Load CUDA's libraries from the packages that bring them; what onnxruntime said about it."""
    if not hasattr(runtime, "preload_dlls"):
        return ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runtime.preload_dlls()
    return said.getvalue()


def _missing(runtime: Any, name: str, said: str, cards: list[hardware.GPU]) -> str:
    """Why the provider did not load, with the library, its version and the package that brings it."""
    if name == "cuda" and (old := old_driver(getattr(runtime, "cuda_version", "") or "", cards)):
        return old
    error = said + load_error(runtime, name)
    library = missing_library(error, cards[0].cuda if cards else "")
    if library is None:
        return f"its provider does not load ({' '.join(error.split())[-300:] or 'no reason was given'})"
    version = f"CUDA {library.cuda}" if library.cuda else "its CUDA version is not known"
    return f"{library.file} is missing ({version}): pip install {library.package}"


def load_error(runtime: Any, name: str) -> str:
    """What the system's loader says about the provider's library; empty when it loads or is not found."""
    folder = Path(runtime.__file__).parent / "capi"
    file = {"win32": f"onnxruntime_providers_{name}.dll"}.get(
        sys.platform, f"libonnxruntime_providers_{name}.so"
    )
    if not (folder / file).is_file():
        return ""
    try:
        ctypes.CDLL(str(folder / file))
    except OSError as error:
        return str(error)
    return ""
