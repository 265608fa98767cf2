"""Builds llama-cpp-python for this machine: `python -m edge.machine.build_llamacpp [--cuda] [--force]`.

`--portable` builds for machines like it, as an image needs that runs elsewhere.

A build with default flags is wrong on some machines: it crashes on CPUs with AMX (see csrc/amx_tileconfig.h),
and with OpenMP it becomes very slow beside a busy core. So the pinned sdist is built with flags of our own
and, on x86, with attention and matrix products of our own (csrc). The wheel is kept in the user's cache under
a key of everything that shapes it. A library that LLAMA_CPP_LIB_PATH names goes before that; where nothing
can be built, a stock wheel of the pinned version is taken. Whichever it is, it is checked by some decodes in
a child process; the outcome lies beside it as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from edge.artefact import json_file, manifest
from edge.console import guarded, plain_console
from edge.errors import EdgeError, UnavailableError, UsageError
from edge.machine import hardware, stock_llamacpp
from edge.machine.llamacpp_source import (
    BUILD,
    PACKAGE,
    STOCK,
    VERSION,
    install_tools,
    pip,
    publish_folder,
    sdist,
    tail,
)
from edge.progress import add_progress_option, report
from edge.setup import NO_LLAMACPP, PINS, clock

if TYPE_CHECKING:
    from rich.console import Console

CSRC = Path(__file__).parent.parent / "csrc"
HEADER = CSRC / "amx_tileconfig.h"
# What was checked: the package's own library, and the one that the user names.
RECORD, LIBRARY_RECORD = "edge_build.json", "edge_library.json"
OFF = (
    "LLAVA_BUILD",
    "LLAMA_OPENSSL",
    "LLAMA_BUILD_TOOLS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_SERVER",
    "LLAMA_BUILD_APP",
    "GGML_OPENMP",  # its threads spin at barriers: beside a busy core decoding fell to a sixtieth
)
_SAID_EVERY_S = 15.0
NO_REPACKING = "weights are not repacked (use_extra_bufts=False): slower than it could be"
# MinGW's own libraries lie where Python does not look for any: each DLL has them, and shows them to no other.
WHOLE = "-static -Wl,--exclude-libs,ALL"
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
# Machine -> the processors that a portable build is for, and the definitions that say so to CMake. AVX2 is
# the least that edge's own kernels need.
_X86 = (
    "any x86-64 CPU with AVX2, FMA and F16C",
    dict.fromkeys(("GGML_SSE42", "GGML_AVX", "GGML_AVX2", "GGML_BMI2", "GGML_FMA", "GGML_F16C"), "ON"),
)
_ARM = ("any Arm CPU of ARMv8.2 with dotprod", {"GGML_CPU_ARM_ARCH": "armv8.2-a+dotprod"})
PORTABLE = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}

COMPILER_HINTS = {
    "linux": "Debian, Ubuntu: sudo apt-get install build-essential; Fedora: sudo dnf install gcc-c++; "
    "Arch: sudo pacman -S base-devel",
    "darwin": "xcode-select --install",
    "win32": "winget install Microsoft.VisualStudio.2022.BuildTools --override "
    '"--passive --add Microsoft.VisualStudio.Workload.VCTools --includeRecommended"',
}


class NoCompilerError(UnavailableError):
    """Nothing can be built here."""

    exit_code = NO_LLAMACPP


@dataclass(frozen=True)
class Compiler:
    kind: str  # gcc, clang or msvc
    version: str


@dataclass(frozen=True)
class Plan:
    """One way to build: CMake definitions, and a key over everything that shapes the binary.

    stock_key: the key of unmodified llama.cpp, without the replacements in csrc. portable: which CPUs it is
    for, "" for this one. gpu_here: whether it is for a GPU of this machine, which it can be tried on.
    """

    defines: dict[str, str]
    cxx_flags: str
    key: str
    stock_key: str
    compiler: Compiler
    portable: str = ""
    gpu_here: bool = False


def compiler() -> Compiler:
    """The C++ compiler that CMake will find. Raises NoCompilerError, saying what to install, without one.

    On Windows MSVC goes before MinGW's, unless CXX names that: with it csrc is compiled too.
    """
    if sys.platform == "win32" and not os.environ.get("CXX"):
        programs = Path(os.environ.get("PROGRAMFILES(X86)", ""))
        where = programs / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
        command = [str(where), "-latest", "-products", "*", "-property", "installationVersion"]
        version = hardware.command_output(command)
        if version or shutil.which("cl"):
            return Compiler("msvc", version)
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        text = hardware.command_output([*name.split(), "--version"])
        if text:
            return Compiler("clang" if "clang" in text.lower() else "gcc", text.splitlines()[0])
    hint = COMPILER_HINTS.get(sys.platform, COMPILER_HINTS["linux"])
    raise NoCompilerError(f"{PACKAGE} is built on this machine, which has no C++ compiler", hint)


def nvcc(*, gpu: bool = True) -> tuple[str, str]:
    """Path and version of CUDA's compiler. Raises UnavailableError without it, or without a `gpu`."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))
    if path is None:
        raise UnavailableError(
            "--cuda: CUDA's compiler `nvcc` is not installed",
            "install NVIDIA's CUDA toolkit (Debian, Ubuntu: sudo apt-get install nvidia-cuda-toolkit), "
            f"or build for the CPU: {BUILD}",
        )
    if gpu and not hardware.gpus():
        raise UnavailableError(
            "--cuda: `nvidia-smi` shows no GPU",
            "install NVIDIA's driver, say what is built for with --cuda-architectures, "
            f"or build for the CPU: {BUILD}",
        )
    return path, hardware.command_output([path, "--version"])


def plan(*, cuda: bool = False, amx: bool = True, portable: bool = False, architectures: str = "") -> Plan:
    """The build that fits this machine, or all like it. `amx` False switches those instructions off.

    architectures: compute capabilities that a CUDA build is for, as "8.6,8.9"; "": those of this machine's
    GPUs, or where it is portable all that llama.cpp names.
    Raises UnavailableError without a compiler, or for a `portable` build on an architecture that has none;
    UsageError for what is no compute capability.
    """
    tool = compiler()
    defines = dict.fromkeys(OFF, "OFF") | {"GGML_NATIVE": "OFF" if portable else "ON"}
    kind = platform.machine()
    if portable and kind not in PORTABLE:
        raise UnavailableError(f"--portable: no build is known for {kind}", f"build for this CPU: {BUILD}")
    cpus, cpu_defines = PORTABLE[kind] if portable else ("", {})
    defines |= cpu_defines
    if sys.platform == "win32" and tool.kind != "msvc":
        # Left alone, CMake looks for MSVC.
        defines |= {"CMAKE_GENERATOR": "Ninja", "CMAKE_SHARED_LINKER_FLAGS": WHOLE}
    if sys.platform == "darwin":
        defines["GGML_METAL"] = "ON" if hardware.apple_gpu() else "OFF"
    cuda_version, gpu_here = "", cuda and not portable and not architectures
    if cuda:
        path, cuda_version = nvcc(gpu=gpu_here)
        defines |= {"GGML_CUDA": "ON", "CMAKE_CUDA_COMPILER": path}
        if not gpu_here:
            # Virtual memory needs the driver's library, which is not there before the image runs.
            defines["GGML_CUDA_NO_VMM"] = "ON"
        if architectures:
            defines["CMAKE_CUDA_ARCHITECTURES"] = _cmake_architectures(architectures)
    cxx_flags = ""
    if tool.kind == "gcc" and kind in ("x86_64", "AMD64"):
        cxx_flags = "include-header" if amx else NO_AMX
    shape = {
        "version": VERSION,
        "defines": defines,
        "cxx_flags": cxx_flags,
        "compiler": [tool.kind, tool.version],
        "cuda": [cuda_version, *(gpu_keys() if gpu_here else [])] if cuda else [],
        "platform": [sys.platform, kind],
        "cpu": cpus or cpu_key(),
    }

    def key(sources: Iterable[Path]) -> str:
        digests = {path.name: manifest.file_digest(path) for path in sources}
        facts = json.dumps(shape | {"csrc": digests}, sort_keys=True)
        return hashlib.sha256(facts.encode("utf-8")).hexdigest()[:20]

    ours = (path for path in CSRC.iterdir() if path.is_file())
    return Plan(defines, cxx_flags, key(ours), key([HEADER]), tool, cpus, gpu_here)


def _cmake_architectures(text: str) -> str:
    """CMake's list of compute capabilities that are written as `nvidia-smi` does ("8.6"), or without dots."""
    names = re.split(r"[,; ]+", text.strip())
    wrong = [name for name in names if not re.fullmatch(r"\d{1,2}\.?\d", name)]
    if wrong:
        raise UsageError(
            f"--cuda-architectures {text}: {wrong[0]!r} is no compute capability",
            "as 8.6,8.9; `nvidia-smi --query-gpu=compute_cap --format=csv` says a GPU's",
        )
    return ";".join(name.replace(".", "") for name in names)


def gpu_keys() -> list[str]:
    """What CUDA's native code depends on, a GPU each."""
    return [f"{gpu.name} {gpu.compute_capability}" for gpu in hardware.gpus()]


def cpu_key() -> str:
    """A key that differs between CPUs for which -march=native differs."""
    text = " ".join([hardware.cpu_model(), *hardware.cpu_flags(everything=True)])
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def build_info() -> dict[str, Any]:
    """What `install` wrote about the library that is used; empty without one, or where another replaced it.

    version, key, wanted (the key that was asked for), defines, cxx_flags, compiler, cpu (which it is for),
    cpu_key ("" for a portable build), cuda, created; stock: as `stock` has it; check: mode -> outcome of its
    decodes (plain, extra, gpu);
    use_extra_bufts, gpu: may be used; notes: what is switched off, as sentences. Loads no native code.
    """
    file = _record_file()
    try:
        info = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (FileNotFoundError, ValueError):
        return {}
    return info if isinstance(info, dict) and info.get("record") == _record_digest() else {}


def stock() -> str:
    """What is known of a llama.cpp that lacks edge's kernels, as a clause; "" for a build of edge's own."""
    info = build_info()
    return str(info.get("stock", "")) if info else STOCK


def _record_file() -> Path | None:
    folder = _package_folder()
    return folder / (LIBRARY_RECORD if stock_llamacpp.library_folder() else RECORD) if folder else None


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent if spec and spec.origin else None


def _record_digest() -> str:
    try:
        record = metadata.distribution(PACKAGE).read_text("RECORD") or ""
    except metadata.PackageNotFoundError:
        return ""
    folder = stock_llamacpp.library_folder()
    text = record + (stock_llamacpp.fingerprint(folder) if folder else "")
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def wheel(chosen: Plan, console: Console, *, force: bool = False) -> Path:
    """The wheel for `chosen`, from the user's cache or built now (minutes).

    Raises EdgeError with the end of the log where the build fails.
    """
    folder = hardware.cache_dir() / "wheels" / chosen.key
    kept = sorted(folder.glob("*.whl"))
    if kept and not force:
        console.print(f"llama.cpp: the wheel is in the cache ({folder})")
        return kept[0]
    hardware.writable_cache("wheels")
    console.print("llama.cpp: its sources (77 MB) and CMake (30 MB), unless they are here already")
    source = sdist()
    install_tools()
    manifest.check_free(folder.parent, 2 * 2**30)
    # What is compiled stays there until the wheel is made, so that a build that was stopped goes on.
    work = folder.parent / f"{chosen.key}.build"
    with _claimed(work, anew=force):
        csrc = work / CSRC.name
        shutil.copytree(CSRC, csrc, dirs_exist_ok=True)
        included = ";".join((csrc / name).as_posix() for name in ("build.cmake", "compile_time.cmake"))
        defines = chosen.defines | {"CMAKE_PROJECT_llama.cpp_INCLUDE": included}
        if chosen.cxx_flags:
            forced = f'-include "{(csrc / HEADER.name).as_posix()}"'
            defines["CMAKE_CXX_FLAGS"] = forced if chosen.cxx_flags == "include-header" else chosen.cxx_flags
        command = ["wheel", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        command += ["--wheel-dir", str(work / "wheel"), "-C", f"build-dir={(work / 'cmake').as_posix()}"]
        for name, value in defines.items():
            command += ["-C", f"cmake.define.{name}={value}"]
        command += ["-C", "wheel.exclude=include/**;lib/**", str(source)]  # headers, and libraries twice
        _build(command, folder.parent / f"{chosen.key}.log", console)
        shutil.rmtree(folder, ignore_errors=True)
        publish_folder(work / "wheel", folder)
    shutil.rmtree(work, ignore_errors=True)
    return next(folder.glob("*.whl"))


@contextlib.contextmanager
def _claimed(work: Path, *, anew: bool) -> Iterator[None]:
    """Hold the folder of one build, emptied for `anew`.

    Raises UnavailableError where another process holds it.
    """
    owner = work.with_suffix(".pid")
    text = owner.read_text(encoding="utf-8") if owner.is_file() else ""
    if text.isdigit() and int(text) != os.getpid() and psutil.pid_exists(int(text)):
        raise UnavailableError(
            f"process {text} builds {PACKAGE} at this moment",
            f"wait for it; where it is gone, remove {owner}",
        )
    owner.write_text(str(os.getpid()), encoding="utf-8")
    try:
        if anew:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        yield
    finally:
        owner.unlink(missing_ok=True)


class _BuildSteps:
    """ninja's steps: a bar with the time left on a terminal, else a line now and then."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("  compiling"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} steps"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        self._console = console
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self.bar.add_task("", total=100)
        self._start = self._said = time.monotonic()

    def line(self, text: str) -> None:
        """Take one line of the build's output."""
        step = re.search(r"\[(\d+)/(\d+)\]", text)
        if not step:
            return
        done, total = int(step[1]), int(step[2])
        report("compiling", done, total, unit="steps")
        self.bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said > _SAID_EVERY_S:
            self._said = now
            left = (now - self._start) / done * (total - done)
            self._console.print(f"  compiling: {done} of {total} steps, {clock(left)} left")


def _build(arguments: list[str], log: Path, console: Console) -> None:
    cores = min(os.cpu_count() or 1, int(hardware.cpu_quota() or 1024))
    jobs = max(1, min(cores, hardware.memory().available // 2**30))  # a compiler takes up to 1 GiB
    env = {
        name: value for name, value in os.environ.items() if name not in ("CMAKE_ARGS", "CXXFLAGS", "CFLAGS")
    }
    env |= {"CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), "PYTHONUTF8": "1"}
    console.print(f"llama.cpp: building; this takes some minutes, once (log: {log})")
    start = time.monotonic()
    steps = _BuildSteps(console)
    with (
        log.open("w", encoding="utf-8") as handle,
        steps.bar,
        subprocess.Popen(
            [sys.executable, "-m", "pip", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            handle.write(line)
            steps.line(line)
    if process.returncode != 0:
        raise EdgeError(
            f"building {PACKAGE} failed:\n{tail(log.read_text(encoding='utf-8'))}", f"the whole log: {log}"
        )
    console.print(f"llama.cpp: built in {time.monotonic() - start:.0f} s")


def check(mode: str) -> str:
    """Decode a tiny model with the installed build in `mode` (plain, extra, gpu): "ok", or the problem."""
    script = str(Path(__file__).with_name("build_check.py"))
    try:
        done = subprocess.run(
            [sys.executable, "-P", script, mode],
            capture_output=True,
            timeout=180,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return "gave no answer in 180 s"
    if done.returncode == 0:
        return "ok"
    if done.returncode < 0:
        return f"died with {signal.Signals(-done.returncode).name}"
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"exit code {done.returncode:#x}: {lines[-1] if lines else 'no message'}"


@dataclass(frozen=True)
class Probe:
    """error: why the installed build does not load. no_gpu: why it cannot put layers on a GPU. "": it can."""

    error: str = ""
    no_gpu: str = ""


def probe() -> Probe:
    """Load the installed build in a child process."""
    code = "import sys, llama_cpp.llama_cpp as lib; sys.exit(0 if lib.llama_supports_gpu_offload() else 3)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return Probe("no answer in 60 s", f"{PACKAGE} gives no answer in 60 s")
    if done.returncode == 0:
        return Probe()
    log = done.stderr.decode("utf-8", "replace").strip()
    if match := re.search(r"failed to initialize (?:CUDA|HIP|MUSA): (.+)", log):
        return Probe("", f"{PACKAGE} is built for GPUs, but finds none that it can use: {match[1].strip()}")
    if done.returncode == 3:
        again = f"{BUILD} --force" if hardware.apple_gpu() else "python -m edge.setup --cuda"
        return Probe("", f"{PACKAGE} was built without GPU support ({again} builds it)")
    error = log.splitlines()[-1] if log else f"exit code {done.returncode}"
    return Probe(error, f"{PACKAGE} does not load: {error}")


def install(
    *,
    cuda: bool = False,
    force: bool = False,
    portable: bool = False,
    architectures: str = "",
    console: Console | None = None,
) -> dict[str, Any]:
    """Bring llama.cpp into this Python and check it. Returns `build_info()`.

    The library that LLAMA_CPP_LIB_PATH names; a build for this machine, or its wheel from the cache; a stock
    wheel, unless `cuda` or `portable` was asked for. Raises NoCompilerError where there is neither a compiler
    nor a stock wheel, EdgeError where a build fails and there is no stock wheel either, UsageError where the
    library cannot be taken, UnavailableError where `cuda` was asked for and the GPU does not decode; a build
    that is `portable`, or for given `architectures`, is checked on the CPU alone.
    """
    console = console or plain_console()
    if folder := stock_llamacpp.library_folder():
        stock_llamacpp.check_library(folder)
        return _install_library(folder, force, console)
    try:
        return _install_build(cuda, force, console, portable=portable, architectures=architectures)
    except EdgeError as error:
        if cuda or portable:
            raise
        console.print(f"llama.cpp: {error.message}", style="yellow")
        return _install_stock(error, force, console)


def _install_library(folder: Path, force: bool, console: Console) -> dict[str, Any]:
    if info := {} if force else build_info():
        console.print(f"llama.cpp: {PACKAGE} {VERSION} is {info['stock']}")
        return info
    stock_llamacpp.install_bindings()
    importlib.invalidate_caches()
    outcome = _check_all()
    if outcome["plain"] != "ok":
        raise UsageError(
            f"{stock_llamacpp.VARIABLE}={folder}: its llama.cpp cannot decode: {outcome['plain']}",
            f"it must be the one of {PACKAGE} {VERSION}; or unset it, then: {BUILD}",
        )
    return _record_stock(f"stock, the library in {folder}", outcome, console)


def _install_stock(why: EdgeError, force: bool, console: Console) -> dict[str, Any]:
    """The llama-cpp-python that is there, or a stock wheel. Raises as `install` where there is none."""
    info = {} if force else build_info()
    if info and info["cpu_key"] == cpu_key():
        console.print(f"llama.cpp: {PACKAGE} {VERSION} is {info.get('stock') or 'built and checked already'}")
        return info
    outcome = {"plain": "not installed"}
    if manifest.versions(PACKAGE).get(PACKAGE) == VERSION:
        outcome = _check_all()
    if outcome["plain"] != "ok":
        console.print(f"llama.cpp: looking for a stock wheel of {PACKAGE} {VERSION}")
        try:
            stock_llamacpp.install_wheel()
        except UnavailableError as error:
            message = f"{why.message}; and no stock build is there: {error.message}"
            raise type(why)(message, error.hint or why.hint) from error
        importlib.invalidate_caches()
        outcome = _check_all()
    if outcome["plain"] != "ok":
        raise UnavailableError(f"the stock build of {PACKAGE} cannot decode: {outcome['plain']}", why.hint)
    return _record_stock("stock", outcome, console)


def _record_stock(name: str, outcome: dict[str, str], console: Console) -> dict[str, Any]:
    notes = [] if outcome["extra"] == "ok" else [NO_REPACKING]
    clause = f"{name}: checked by decoding, without edge's kernels, so slower than a build of `{BUILD}`"
    facts = {"key": "", "wanted": "", "defines": {}, "cxx_flags": "", "compiler": "", "stock": clause}
    gpu = outcome.get("gpu") == "ok"
    return _record(facts | {"cuda": gpu, "notes": notes}, outcome, console)


def _install_build(
    cuda: bool, force: bool, console: Console, *, portable: bool, architectures: str
) -> dict[str, Any]:
    """Build (or take from the cache), install, check.

    A build that dies with repacked weights is replaced by one without AMX where the CPU has it, or limited to
    ordinary buffers; `notes` says so.
    """
    wanted = plan(cuda=cuda, portable=portable, architectures=architectures)
    info = build_info()
    if not force and info.get("wanted") == wanted.key:
        console.print(
            f"llama.cpp: {PACKAGE} {VERSION} is built for {wanted.portable or 'this machine'} already"
        )
        return info
    chosen, notes = wanted, list[str]()
    outcome = _install_and_check(wheel(chosen, console, force=force), wanted.gpu_here)
    if outcome["plain"] != "ok" or outcome["extra"] != "ok":
        notes.append(f"the default build failed its check: {outcome}")
        if "amx_tile" in hardware.cpu_flags() and not portable and chosen.compiler.kind == "gcc":
            console.print(f"llama.cpp: the check failed ({outcome}); building without AMX", style="yellow")
            chosen = plan(cuda=cuda, amx=False, architectures=architectures)
            outcome = _install_and_check(wheel(chosen, console), wanted.gpu_here)
            notes.append("AMX is switched off: reading prompts is several times slower than it could be")
    if outcome["plain"] != "ok":
        raise UnavailableError(
            f"the build of {PACKAGE} cannot decode: {outcome['plain']}",
            f"try another compiler (CXX=clang++ {BUILD} --force)",
        )
    if outcome["extra"] != "ok":
        notes.append(NO_REPACKING)
    if wanted.gpu_here and outcome.get("gpu") != "ok":
        raise UnavailableError(
            f"the CUDA build cannot decode on the GPU: {outcome.get('gpu', 'it sees no GPU')}",
            f"check `nvidia-smi` and that the driver is as new as the CUDA toolkit, or: {BUILD}",
        )
    facts = {
        "key": chosen.key,
        "wanted": wanted.key,
        "defines": chosen.defines,
        "cxx_flags": chosen.cxx_flags,
        "compiler": f"{chosen.compiler.kind}: {chosen.compiler.version}",
    }
    if portable:
        facts |= {"cpu": chosen.portable, "cpu_key": ""}
    return _record(facts | {"cuda": cuda, "notes": notes}, outcome, console)


def _record(facts: dict[str, Any], outcome: dict[str, str], console: Console) -> dict[str, Any]:
    """Write what is known of the library beside it, and say it."""
    info = {"cpu": hardware.cpu_model(), "cpu_key": cpu_key()} | facts
    info |= {
        "version": VERSION,
        "check": outcome,
        "use_extra_bufts": outcome["extra"] == "ok",
        "gpu": outcome.get("gpu") == "ok",
        "record": _record_digest(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    file = _record_file()
    assert file is not None
    json_file.write(file, info)
    for note in info["notes"]:
        console.print(f"llama.cpp: {note}", style="yellow")
    checks = ", ".join(f"{mode} {result}" for mode, result in outcome.items())
    console.print(f"llama.cpp: {PACKAGE} {VERSION} installed; checked by decoding: {checks}")
    if "stock" in info:
        console.print(f"llama.cpp: it is {info['stock']}")
    return info


def _install_and_check(path: Path, cuda: bool) -> dict[str, str]:
    forced = ["install", "--quiet", "--force-reinstall", "--no-deps", "--no-index", str(path)]
    pip(forced, "installing the wheel")
    pip(["install", "--quiet", "-c", str(PINS), str(path)], "installing what the wheel needs")
    importlib.invalidate_caches()
    return _check_all(gpu=cuda)


def _check_all(*, gpu: bool = False) -> dict[str, str]:
    """Mode -> outcome of its decodes; the GPU's where it is asked for, or there."""
    outcome = {mode: check(mode) for mode in ("plain", "extra")}
    if gpu or not probe().no_gpu:
        outcome["gpu"] = check("gpu")
    return outcome


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=BUILD, description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="for an NVIDIA GPU (needs nvcc)")
    parser.add_argument(
        "--cuda-architectures",
        metavar="LIST",
        default="",
        help="which GPUs --cuda builds for, as 8.6,8.9 (default: those here; with --portable all)",
    )
    parser.add_argument("--force", action="store_true", help="build again, whatever the cache holds")
    parser.add_argument("--portable", action="store_true", help="for machines like it, not for it alone")
    parser.add_argument("--wheel", action="store_true", help="make the wheel, and install nothing")
    add_progress_option(parser)
    options = parser.parse_args(argv)
    if options.cuda_architectures and not options.cuda:
        raise UsageError("--cuda-architectures is for a build with --cuda", "add --cuda, or leave it out")
    kind = {
        "cuda": options.cuda,
        "portable": options.portable,
        "architectures": options.cuda_architectures,
    }
    if options.wheel:
        wanted = plan(**kind)
        if not stock_llamacpp.library_folder() and build_info().get("wanted") != wanted.key:
            wheel(wanted, plain_console(), force=options.force)
        return 0
    install(force=options.force, **kind)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
