"""llama.cpp where none is built: a library that the user names, or a stock wheel of llama-cpp-python.

Both are llama.cpp as it is: the results of edge's own build, without the kernels of edge/csrc.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge.artefact import manifest
from edge.errors import UnavailableError, UsageError
from edge.machine.llamacpp_source import BUILD, PACKAGE, VERSION, install_tools, pip, sdist
from edge.setup import PINS

# The bindings of llama-cpp-python read it, too.
VARIABLE = "LLAMA_CPP_LIB_PATH"
# Of the package's authors, for CPUs. pip's own index and mirrors are asked as well.
INDEX = "https://abetlen.github.io/llama-cpp-python/whl/cpu"
_NAMES = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}


def library_folder() -> Path | None:
    """The folder that LLAMA_CPP_LIB_PATH names; None where it names none."""
    name = os.environ.get(VARIABLE, "")
    return Path(name) if name else None


def check_library(folder: Path) -> None:
    """Raise UsageError where the folder holds no llama.cpp, or depends on where a command is run."""
    names = _NAMES.get(sys.platform, ("libllama.so",))
    if not folder.is_absolute() or not any((folder / name).is_file() for name in names):
        raise UsageError(
            f"{VARIABLE}={folder} is not the full path of a folder with {' or '.join(names)}",
            "name the folder where llama.cpp's libraries lie, or unset it",
        )


def fingerprint(folder: Path) -> str:
    """Changes where a file of the folder does; "" where it cannot be read."""
    try:
        stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return ""
    return str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def install_bindings() -> None:
    """Install the pinned bindings without a library. Raises UnavailableError."""
    if manifest.versions(PACKAGE).get(PACKAGE) == VERSION:
        return
    source = sdist()
    install_tools()
    options = ["--no-build-isolation", "--no-cache-dir", "-C", "wheel.cmake=false"]
    pip(["install", "--quiet", *options, "-c", str(PINS), str(source)], "installing the bindings")


def install_wheel() -> None:
    """Install the stock wheel of the pinned version. Raises UnavailableError where there is none."""
    options = ["--quiet", "--only-binary", PACKAGE, "--retries", "1", "--extra-index-url", INDEX]
    wanted = [*options, "-c", str(PINS), f"{PACKAGE}=={VERSION}"]
    try:
        pip(["install", "--force-reinstall", "--no-deps", *wanted], "fetching the wheel")
        pip(["install", *wanted], "installing what the wheel needs")
    except UnavailableError as error:
        conda = (Path(sys.prefix) / "conda-meta").is_dir()
        raise UnavailableError(
            f"{INDEX} cannot be reached, or has no {PACKAGE} {VERSION} for Python "
            f"{sys.version_info[0]}.{sys.version_info[1]} on {sys.platform}",
            f"conda install -c conda-forge {PACKAGE}={VERSION}, then: {BUILD}" if conda else "",
        ) from error
