"""Why a GPU cannot be used: which CUDA library a loader did not find, or how old the driver is.

Knows the package that brings each library, so that every message says what to install.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge.machine import hardware
from edge.machine.llamacpp_source import BUILD
from edge.setup import pip_command

# CUDA library -> package, and what to add to the number in its file name for the CUDA major (None: unknown).
_LIBRARIES: dict[str, tuple[str, int | None]] = {
    "cudart": ("nvidia-cuda-runtime", 0),
    "cublas": ("nvidia-cublas", 0),
    "cublaslt": ("nvidia-cublas", 0),
    "nvrtc": ("nvidia-cuda-nvrtc", 0),
    "nvjitlink": ("nvidia-nvjitlink", 0),
    "cufft": ("nvidia-cufft", 1),
    "cusparse": ("nvidia-cusparse", None),
    "cusolver": ("nvidia-cusolver", None),
    "curand": ("nvidia-curand", None),
    "cudnn": ("nvidia-cudnn", None),
    "nccl": ("nvidia-nccl", None),
}
_SUFFIX_FROM_13 = ("nvidia-cudnn", "nvidia-nccl")  # the other packages lost theirs with CUDA 13


@dataclass(frozen=True)
class MissingLibrary:
    """A CUDA library that a loader did not find: its file, its CUDA major ("": unknown), and its package."""

    file: str
    cuda: str
    package: str

    @property
    def install(self) -> str:
        return f"{pip_command('install', self.package)}  (CUDA {self.cuda or 'major unknown'})"


def missing_library(error: str, gpus: list[hardware.GPU]) -> MissingLibrary | None:
    """The CUDA library that a loader's message names; None where it names none.

    Understands `libcublas.so.13: cannot open shared object file` and `... cublas64_13.dll ...`. Where the
    number of the file is not CUDA's, the major is the newest that the GPU's driver supports.
    """
    match = re.search(r"lib(\w+?)\.so\.(\d+)[\d.]*", error) or re.search(r"\b(\w+?)64_(\d+)\w*\.dll", error)
    if not match or match[1].lower() not in _LIBRARIES:
        return None
    package, add = _LIBRARIES[match[1].lower()]
    driver_major = gpus[0].cuda.split(".")[0] if gpus else ""
    cuda = driver_major if add is None else str(int(match[2]) + add)
    if cuda and (int(cuda) < 13 or package in _SUFFIX_FROM_13):
        package += f"-cu{cuda}"
    return MissingLibrary(match[0], cuda, package)


def gpu_remedy(problem: str, gpus: list[hardware.GPU]) -> str:
    """What to do where a GPU cannot be used, from CUDA's own message; "" where that tells nothing."""
    if "driver version is insufficient" in problem:
        supports = f" ({gpus[0].driver} supports CUDA up to {gpus[0].cuda or 'unknown'})" if gpus else ""
        return f"install a newer NVIDIA driver{supports}, or build for its CUDA: {BUILD} --cuda --force"
    if "busy or unavailable" in problem:
        return "another process has exclusive use of the GPU: `nvidia-smi` names it"
    if "no CUDA-capable device" in problem:
        return "CUDA_VISIBLE_DEVICES may hide the GPU: unset it"
    library = missing_library(problem, gpus)
    return library.install if library else ""


def old_driver(built_for: str, gpus: list[hardware.GPU]) -> str:
    """The message where the driver's CUDA is older than the major that a library was built for, or ""."""
    wanted = built_for.partition(".")[0]
    supported = gpus[0].cuda.partition(".")[0] if gpus else ""
    if not (wanted.isdigit() and supported.isdigit()) or int(supported) >= int(wanted):
        return ""
    return (
        f"it is built for CUDA {built_for}, and the driver {gpus[0].driver} supports CUDA up to "
        f"{gpus[0].cuda}: install a newer NVIDIA driver"
    )
