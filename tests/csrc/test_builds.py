"""edge/csrc by two small programs: in the installed library, and built for other processors and systems."""

import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge.machine import build_check
from tests.csrc import builds

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Build:
    """needs: what the processor must have, whatever emulates the rest."""

    name: str
    defines: dict[str, str]
    needs: str = ""
    emulator: tuple[str, ...] = ()
    programs: tuple[str, ...] = ("operators",)


QEMU = ("qemu-x86_64", "-cpu", "max")
WINE = ("/usr/lib/wine/wine64",)
LIBRARIES = builds.WINDOWS | {"BUILD_SHARED_LIBS": "ON"}
ALL = [
    Build("avx2", builds.AVX2, "avx2"),
    Build("avx2-emulated", builds.AVX2, emulator=QEMU),
    Build("avx-vnni", builds.AVX_VNNI, "avx_vnni"),
    Build("avx-vnni-of-512", builds.AVX_VNNI_OF_512, "avx512_vnni"),
    Build("avx512-vnni", builds.AVX512, "avx512_vnni"),
    Build("amx", builds.AMX, "amx_int8"),
    Build("windows-libraries", builds.AVX2 | LIBRARIES, "avx2", WINE, ("operators", "decode")),
    Build("windows-avx512-vnni", builds.AVX512 | builds.WINDOWS, "avx512_vnni", WINE),
    Build("arm", builds.ARM, emulator=("qemu-aarch64", "-cpu", "max"), programs=("decode",)),
]


def skip_without(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.gguf"
    build_check.write_model(path)
    return path


@pytest.mark.skipif(
    sys.platform == "win32" or platform.machine() not in ("x86_64", "AMD64") or "avx2" not in builds.CPU,
    reason="attention and products of our own are for CPUs with AVX2",
)
def test_operators_of_the_installed_library(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    skip_without("g++")
    builds.run([str(builds.installed("operators", tmp_path))])


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("build", ALL, ids=lambda build: build.name)
def test_programs_of_other_builds(build: Build, toy: Path, tmp_path: Path) -> None:
    """Operators are right; the toy's most likely tokens are those of the installed library."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("compilers for other systems are taken from Linux on x86-64")
    if build.needs and build.needs not in builds.CPU:
        pytest.skip(f"this processor has no {build.needs}, and nothing here emulates it")
    pytest.importorskip("llama_cpp")
    skip_without("g++", build.defines.get("CMAKE_CXX_COMPILER", "g++"), *build.emulator[:1])
    folder = builds.built(build.name, build.defines, *build.programs)
    suffix = ".exe" if build.emulator == WINE else ""
    # Not in the source tree: Wine links z: to /, and setuptools follows links when it looks for packages.
    wine = {"WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    if "operators" in build.programs:
        builds.run([*build.emulator, str(folder / f"operators{suffix}")], **wine)
    if "decode" in build.programs:
        found = builds.run([*build.emulator, str(folder / f"decode{suffix}"), str(toy)], **wine)
        assert found.split() == builds.run([str(builds.installed("decode", tmp_path)), str(toy)]).split()
