"""llama.cpp with edge/csrc and a program of this folder, for this processor and others."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from edge.machine import build_llamacpp, hardware, llamacpp_source

SOURCES = Path(__file__).parent
BUILDS = SOURCES.parents[1] / "build" / "csrc"
CPU = hardware.cpu_flags(everything=True)

OFF = dict.fromkeys((*build_llamacpp.OFF, "BUILD_SHARED_LIBS", "GGML_NATIVE"), "OFF")
AVX2 = dict.fromkeys(("GGML_AVX", "GGML_AVX2", "GGML_FMA", "GGML_F16C", "GGML_BMI2"), "ON")
AVX_VNNI = AVX2 | {"GGML_AVX_VNNI": "ON"}
AVX512 = AVX2 | dict.fromkeys(("GGML_AVX512", "GGML_AVX512_VBMI", "GGML_AVX512_VNNI"), "ON")
AMX = AVX512 | dict.fromkeys(("GGML_AMX_TILE", "GGML_AMX_INT8"), "ON")
# AVX-VNNI's code with AVX512-VNNI's instructions of its width, for the processors that have but those.
AVX_VNNI_OF_512 = AVX512 | {"CMAKE_CXX_FLAGS": "-DEDGE_AVX2"}

WINDOWS = {
    "CMAKE_SYSTEM_NAME": "Windows",
    "CMAKE_SYSTEM_PROCESSOR": "x86_64",
    "CMAKE_C_COMPILER": "x86_64-w64-mingw32-gcc-posix",
    "CMAKE_CXX_COMPILER": "x86_64-w64-mingw32-g++-posix",
    "CMAKE_EXE_LINKER_FLAGS": "-static",
    "CMAKE_SHARED_LINKER_FLAGS": build_llamacpp.WHOLE,
    # Debian's headers do not know all of Windows 8, which llama.cpp asks for.
    **dict.fromkeys(("CMAKE_C_FLAGS", "CMAKE_CXX_FLAGS"), "-D_WIN32_WINNT=0x0601"),
}
ARM = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": "aarch64-linux-gnu-gcc",
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
    "CMAKE_EXE_LINKER_FLAGS": "-static",
    "GGML_CPU_ARM_ARCH": "armv8.2-a+dotprod+i8mm",
}


def run(command: list[str], **given: str) -> str:
    """What the command wrote. given: variables of its environment."""
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False, env=os.environ | given
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def installed(program: str, folder: Path) -> Path:
    """The program, for the installed library."""
    [package] = importlib.util.find_spec("llama_cpp").submodule_search_locations
    library = Path(package) / "lib"
    sources = llamacpp_source.sdist() / "vendor" / "llama.cpp"
    include = [f"-I{sources / part}" for part in ("include", "ggml/include")]
    names = [f"-l{name}" for name in ("llama", "ggml", "ggml-cpu", "ggml-base")]
    command = ["g++", "-std=c++17", "-O1", *include, str(SOURCES / f"{program}.cpp"), f"-L{library}", *names]
    run([*command, f"-Wl,-rpath,{library}", "-o", str(folder / program)])
    return folder / program


def built(name: str, defines: dict[str, str], *programs: str) -> Path:
    """The folder of the programs, in build/csrc; what was compiled before is kept."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not all(shutil.which(tool, path=places) for tool in ("cmake", "ninja")):
        llamacpp_source.install_tools()
    sources = llamacpp_source.sdist() / "vendor" / "llama.cpp"
    defines = OFF | {"LLAMA_CPP": str(sources), "CMAKE_BUILD_TYPE": "Release"} | defines
    folder = BUILDS / name
    definitions = [f"-D{name}={value}" for name, value in defines.items()]
    run(["cmake", "-G", "Ninja", "-S", str(SOURCES), "-B", str(folder), *definitions], PATH=places)
    run(["cmake", "--build", str(folder), "--target", *programs], PATH=places)
    return folder / "bin"
