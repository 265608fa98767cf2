"""The native build: flags, cache, fallbacks; the AMX header as compiled code; one real decode."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from edge import setup
from edge.errors import InputError, UnavailableError, UsageError
from edge.machine import build_llamacpp, hardware, llamacpp_source
from edge.machine.build_llamacpp import Compiler

GCC = Compiler("gcc", "c++ 12.2.0")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "缓存 cache"
    monkeypatch.setattr(hardware, "cache_dir", lambda: cache)
    return cache


@pytest.fixture
def gcc_on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_llamacpp, "compiler", lambda: GCC)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hardware, "cpu_model", lambda: "A")
    monkeypatch.setattr(hardware, "cpu_flags", lambda everything=False: ["avx2", "amx_tile"])


def test_versions_are_those_of_the_constraints() -> None:
    pins = dict(
        line.split("#")[0].strip().split("==")
        for line in setup.PINS.read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert pins[llamacpp_source.PACKAGE] == llamacpp_source.VERSION
    assert {name: pins[name] for name in llamacpp_source.BUILD_TOOLS} == llamacpp_source.BUILD_TOOLS
    assert {*setup.BUILD_TOOLS} == {*llamacpp_source.BUILD_TOOLS}


@pytest.mark.usefixtures("gcc_on_x86")
def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_llamacpp.plan()
    assert (
        plan.defines["GGML_OPENMP"] == plan.defines["LLAVA_BUILD"] == plan.defines["LLAMA_OPENSSL"] == "OFF"
    )
    assert plan.defines["GGML_NATIVE"] == "ON" and "GGML_CUDA" not in plan.defines
    assert plan.cxx_flags == "include-header"
    assert build_llamacpp.plan(amx=False).cxx_flags == build_llamacpp.NO_AMX
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert build_llamacpp.plan().cxx_flags == ""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build_llamacpp, "compiler", lambda: Compiler("clang", "17"))
    assert build_llamacpp.plan().cxx_flags == ""


@pytest.mark.usefixtures("gcc_on_x86")
def test_key_follows_all_that_shapes_the_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {build_llamacpp.plan().key, build_llamacpp.plan().key, build_llamacpp.plan(amx=False).key}
    assert len(keys) == 2
    monkeypatch.setattr(hardware, "cpu_flags", lambda everything=False: ["avx2"])
    keys.add(build_llamacpp.plan().key)
    monkeypatch.setattr(build_llamacpp, "compiler", lambda: Compiler("gcc", "c++ 13.1.0"))
    keys.add(build_llamacpp.plan().key)
    monkeypatch.setattr(build_llamacpp, "nvcc", lambda gpu=True: ("/cuda/bin/nvcc", "release 12.9"))
    cuda = build_llamacpp.plan(cuda=True)
    assert cuda.defines["GGML_CUDA"] == "ON" and cuda.defines["CMAKE_CUDA_COMPILER"] == "/cuda/bin/nvcc"
    keys.add(cuda.key)
    assert len(keys) == 5


@pytest.mark.usefixtures("gcc_on_x86")
def test_a_portable_build_depends_on_no_cpu_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_llamacpp, "nvcc", lambda gpu=True: ("nvcc", "13.0"))
    plans = [build_llamacpp.plan(cuda=True, portable=True)]
    monkeypatch.setattr(hardware, "cpu_model", lambda: "B")
    monkeypatch.setattr(hardware, "gpus", lambda: [hardware.GPU(0, "RTX", 0, 0, "576", "8.9", "12.9")])
    plans += [build_llamacpp.plan(cuda=True, portable=True), build_llamacpp.plan(portable=True)]
    defines = plans[0].defines
    assert defines["GGML_NATIVE"] == "OFF" and defines["GGML_AVX2"] == defines["GGML_FMA"] == "ON"
    assert defines["GGML_CUDA_NO_VMM"] == "ON" and "GGML_AVX512" not in defines
    assert plans[0].key == plans[1].key != plans[2].key
    assert plans[0].portable == "any x86-64 CPU with AVX2, FMA and F16C"
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UnavailableError, match="--portable: no build is known for riscv64"):
        build_llamacpp.plan(portable=True)


@pytest.mark.usefixtures("gcc_on_x86")
def test_a_build_for_named_gpus_needs_none_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(build_llamacpp, "nvcc", lambda gpu=True: asked.append(gpu) or ("nvcc", "13.0"))
    named = build_llamacpp.plan(cuda=True, architectures="8.6, 89,12.0")
    assert named.defines["CMAKE_CUDA_ARCHITECTURES"] == "86;89;120" and asked == [False]
    assert named.defines["GGML_NATIVE"] == "ON" and named.defines["GGML_CUDA_NO_VMM"] == "ON"
    monkeypatch.setattr(hardware, "gpus", lambda: [hardware.GPU(0, "RTX", 0, 0, "576", "8.9", "12.9")])
    assert build_llamacpp.plan(cuda=True, architectures="8.6,89,120").key == named.key
    assert build_llamacpp.plan(cuda=True, portable=True, architectures="8.6").key != named.key


@pytest.mark.usefixtures("gcc_on_x86")
@pytest.mark.parametrize("text", ["rtx", "8.6,", "sm_86", "8,6"])
def test_what_is_no_compute_capability_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(build_llamacpp, "nvcc", lambda gpu=True: ("nvcc", "13.0"))
    with pytest.raises(UsageError, match="is no compute capability"):
        build_llamacpp.plan(cuda=True, architectures=text)
    with pytest.raises(UsageError, match="for a build with --cuda"):
        build_llamacpp.main(["--cuda-architectures", text])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX compilers")
def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(UnavailableError, match="build-essential"):
        build_llamacpp.compiler()


def test_mingw_is_taken_on_windows_where_it_is_named_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vswhere.exe": "17.9", "g++": "g++.exe (Rev3, Built by MSYS2 project) 14.1.0"}
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(build_llamacpp, "cpu_key", lambda: "cpu")
    monkeypatch.setattr(shutil, "which", lambda *names, **options: None)
    monkeypatch.setattr(hardware, "command_output", lambda command: installed.get(Path(command[0]).name, ""))
    monkeypatch.delenv("CXX", raising=False)
    assert build_llamacpp.plan().compiler == Compiler("msvc", "17.9")
    assert "CMAKE_GENERATOR" not in build_llamacpp.plan().defines
    monkeypatch.setenv("CXX", "g++")
    assert build_llamacpp.plan().compiler == Compiler("gcc", installed["g++"])
    assert build_llamacpp.plan().defines["CMAKE_GENERATOR"] == "Ninja"
    del installed["vswhere.exe"]
    monkeypatch.delenv("CXX")
    assert build_llamacpp.plan().compiler.kind == "gcc"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths")
def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(UnavailableError, match="nvcc"):
            build_llamacpp.nvcc()
    tool = tmp_path / "bin" / "nvcc"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n", encoding="utf-8")
    tool.chmod(0o755)
    with pytest.raises(UnavailableError, match="shows no GPU"):
        build_llamacpp.nvcc()


def archive(folder: Path) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        text = b"# converter\n"
        entry = tarfile.TarInfo(f"{llamacpp_source.SDIST}/vendor/llama.cpp/convert_hf_to_gguf.py")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    return data.getvalue()


def test_sdist_is_fetched_once_and_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_cache: Path
) -> None:
    served, calls = [b"another file"], []

    def pip(arguments: list[str], doing: str) -> None:
        calls.append(arguments)
        name = f"{llamacpp_source.SDIST}.tar.gz"
        (Path(arguments[arguments.index("--dest") + 1]) / name).write_bytes(served[0])

    monkeypatch.setattr(llamacpp_source, "pip", pip)
    monkeypatch.setattr(llamacpp_source, "install_tools", lambda: None)
    with pytest.raises(InputError, match="not the pinned one"):
        llamacpp_source.sdist()
    assert list((own_cache / "sdist").iterdir()) == []
    served[0] = archive(tmp_path)
    monkeypatch.setattr(llamacpp_source, "SDIST_SHA256", hashlib.sha256(served[0]).hexdigest())
    folder = llamacpp_source.sdist()
    assert (folder / "vendor/llama.cpp/convert_hf_to_gguf.py").read_bytes() == b"# converter\n"
    assert llamacpp_source.sdist() == folder and len(calls) == 2
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        llamacpp_source.SDIST,
        f"{llamacpp_source.SDIST}.tar.gz",
    ]


def test_the_sdist_is_unpacked_by_a_python_without_filters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_cache: Path
) -> None:
    file = tmp_path / "sdist.tar.gz"
    file.write_bytes(archive(tmp_path))
    monkeypatch.setattr(llamacpp_source, "sdist_archive", lambda: file)
    whole = tarfile.TarFile.extractall
    # As Debian 12 has it, 3.11.2.
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda tar, path: whole(tar, path))
    monkeypatch.delattr(tarfile, "data_filter")
    assert (llamacpp_source.sdist() / "vendor/llama.cpp/convert_hf_to_gguf.py").is_file()


def test_pip_failure_is_one_message() -> None:
    with pytest.raises(UnavailableError, match="doing it failed"):
        llamacpp_source.pip(["no-such-command"], "doing it")


@pytest.fixture
def fake_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gcc_on_x86: None
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """`install` without pip: (flags, mode) -> outcome of a check, and the flags that were installed."""
    outcomes: dict[tuple[str, str], str] = {}
    installed: list[str] = []

    def install_and_check(path: Path, cuda: bool) -> dict[str, str]:
        installed.append(str(path))
        return {mode: outcomes.get((str(path), mode), "ok") for mode in ("plain", "extra")}

    monkeypatch.setattr(
        build_llamacpp, "wheel", lambda plan, console, force=False: Path(plan.cxx_flags or "none")
    )
    monkeypatch.setattr(build_llamacpp, "_install_and_check", install_and_check)
    monkeypatch.setattr(build_llamacpp, "_package_folder", lambda: tmp_path)
    monkeypatch.setattr(build_llamacpp, "_record_digest", lambda: "digest")
    return outcomes, installed


Fake = tuple[dict[tuple[str, str], str], list[str]]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200, markup=False)


def test_a_portable_build_is_recorded_as_one(fake_install: Fake) -> None:
    fake_install[0]["include-header", "extra"] = "died with SIGILL"
    info = build_llamacpp.install(portable=True, console=quiet())
    assert (
        info["cpu"].startswith("any x86-64")
        and info["cpu_key"] == ""
        and info["defines"]["GGML_AVX2"] == "ON"
    )
    # No build without AMX in its place: that is not what it was built with.
    assert info["use_extra_bufts"] is False and fake_install[1] == ["include-header"]


def test_a_portable_build_that_fails_is_not_replaced_by_a_stock_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Compiler:
        raise UnavailableError("no compiler")

    monkeypatch.setattr(build_llamacpp, "compiler", none)
    with pytest.raises(UnavailableError, match="no compiler"):
        build_llamacpp.install(portable=True, console=quiet())


def test_a_good_build_is_recorded_and_not_made_twice(fake_install: Fake, tmp_path: Path) -> None:
    info = build_llamacpp.install(console=quiet())
    assert info["use_extra_bufts"] is True and info["notes"] == []
    assert (
        build_llamacpp.build_info()
        == info
        == json.loads((tmp_path / build_llamacpp.RECORD).read_text(encoding="utf-8"))
    )
    build_llamacpp.install(console=quiet())
    assert fake_install[1] == ["include-header"]
    build_llamacpp.install(console=quiet(), force=True)
    assert len(fake_install[1]) == 2


def test_a_build_that_another_replaced_is_unknown(
    fake_install: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_llamacpp.install(console=quiet())
    monkeypatch.setattr(build_llamacpp, "_record_digest", lambda: "another")
    assert build_llamacpp.build_info() == {}


def test_a_dying_amx_build_is_replaced_and_said(fake_install: Fake) -> None:
    fake_install[0]["include-header", "extra"] = "died with SIGILL"
    console = quiet()
    info = build_llamacpp.install(console=console)
    assert fake_install[1] == ["include-header", build_llamacpp.NO_AMX]
    assert info["use_extra_bufts"] is True and info["cxx_flags"] == build_llamacpp.NO_AMX
    assert "AMX is switched off" in console.file.getvalue()  # type: ignore[attr-defined]
    build_llamacpp.install(console=quiet())
    assert len(fake_install[1]) == 2  # what was asked for has been tried: not again


def test_repacking_that_dies_is_switched_off_and_said(fake_install: Fake) -> None:
    for flags in ("include-header", build_llamacpp.NO_AMX):
        fake_install[0][flags, "extra"] = "died with SIGSEGV"
    info = build_llamacpp.install(console=quiet())
    assert info["use_extra_bufts"] is False
    assert any("use_extra_bufts=False" in note for note in info["notes"])


def test_a_build_that_cannot_decode_is_refused(
    fake_install: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_wheel() -> None:
        raise UnavailableError("there is no wheel")

    monkeypatch.setattr(build_llamacpp, "check", lambda mode: "died with SIGILL")
    monkeypatch.setattr(build_llamacpp, "probe", lambda: build_llamacpp.Probe("", "no GPU"))
    monkeypatch.setattr(build_llamacpp.stock_llamacpp, "install_wheel", no_wheel)
    for flags in ("include-header", build_llamacpp.NO_AMX):
        fake_install[0][flags, "plain"] = "died with SIGILL"
    with pytest.raises(UnavailableError, match="SIGILL; and no stock build is there: there is no wheel"):
        build_llamacpp.install(console=quiet())
    assert not (tmp_path / build_llamacpp.RECORD).exists()


def test_a_mac_has_metal_in_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_llamacpp, "compiler", lambda: Compiler("clang", "17"))
    monkeypatch.setattr(hardware, "cpu_model", lambda: "Apple M4")
    monkeypatch.setattr(hardware, "cpu_flags", lambda everything=False: [])
    assert "GGML_METAL" not in build_llamacpp.plan().defines
    monkeypatch.setattr(sys, "platform", "darwin")
    for machine, metal in (("arm64", "ON"), ("x86_64", "OFF")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert build_llamacpp.plan().defines["GGML_METAL"] == metal


@pytest.mark.usefixtures("gcc_on_x86")
def test_a_kept_wheel_is_taken(own_cache: Path) -> None:
    plan = build_llamacpp.plan()
    kept = own_cache / "wheels" / plan.key / "llama_cpp_python-0.whl"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    assert build_llamacpp.wheel(plan, quiet()) == kept


def test_one_process_builds_and_what_was_compiled_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "key.build"
    with pytest.raises(KeyboardInterrupt), build_llamacpp._claimed(work, anew=False):
        (work / "half").touch()
        raise KeyboardInterrupt
    owner = tmp_path / "key.pid"
    owner.write_text("4711", encoding="utf-8")
    monkeypatch.setattr("psutil.pid_exists", lambda number: number == 4711)
    with (
        pytest.raises(UnavailableError, match=r"process 4711 builds"),
        build_llamacpp._claimed(work, anew=False),
    ):
        raise AssertionError
    owner.write_text("4712", encoding="utf-8")  # of a process that was killed
    with build_llamacpp._claimed(work, anew=False):
        assert (work / "half").exists()
    with build_llamacpp._claimed(work, anew=True):
        assert list(work.iterdir()) == []


def test_ninjas_steps_are_said_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    console = quiet()
    now = [100.0]
    monkeypatch.setattr(build_llamacpp.time, "monotonic", lambda: now[0])
    steps = build_llamacpp._BuildSteps(console)
    for second, line in (
        (1, "[1/80] Building a.cpp.o"),
        (20, "a.cpp: warning"),
        (20, "[20/80] b"),
        (21, "[21/80] c"),
    ):
        now[0] = 100.0 + second
        steps.line(line)
    assert console.file.getvalue() == "  compiling: 20 of 80 steps, 1:00 left\n"  # type: ignore[attr-defined]


# The configuration as llama.cpp's CPU backend builds it, in a function of its own.
CONFIGURE = """
#include <immintrin.h>
#include <stdint.h>
struct tile_config_t {
    uint8_t palette_id = 0, start_row = 0, reserved_0[14] = {0};
    uint16_t colsb[16] = {0};
    uint8_t rows[16] = {0};
};
void configure() {
    alignas(64) tile_config_t tc = {};
    tc.palette_id = 1;
    tc.rows[0] = 8;  tc.colsb[0] = 64;
    tc.rows[3] = 16; tc.colsb[3] = 32;
    tc.rows[7] = 16; tc.colsb[7] = 64;
    _tile_loadconfig(&tc);
}
"""
# What the instruction would read is compared here instead.
VERIFY = """
#include <cstdlib>
#include <cstring>
#include <unistd.h>
void configure();
extern "C" void verify(const unsigned char * config) {
    unsigned char want[64] = {0};
    want[0] = 1;
    want[48] = 8;  want[16] = 64;
    want[51] = 16; want[22] = 32;
    want[55] = 16; want[30] = 64;
    _exit(memcmp(config, want, 64) == 0 ? 0 : 1);
}
int main() { configure(); return 2; }
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or shutil.which("g++") is None,
    reason="GCC on x86-64",
)
@pytest.mark.parametrize("level", ["-O0", "-O3"])
def test_the_amx_header_hands_over_the_whole_configuration(tmp_path: Path, level: str) -> None:
    """The code GCC makes, run with `ldtilecfg` replaced by a call: no CPU with AMX is needed.

    The configuration may lie in the red zone below the stack pointer, so the call goes well under it.
    """
    (tmp_path / "configure.cpp").write_text(CONFIGURE, encoding="utf-8")
    (tmp_path / "verify.cpp").write_text(VERIFY, encoding="utf-8")
    run = {"cwd": tmp_path, "check": True, "capture_output": True}
    flags = [level, "-std=gnu++17", "-mamx-tile", "-include", str(build_llamacpp.HEADER)]
    subprocess.run(["g++", *flags, "-S", "configure.cpp", "-o", "configure.s"], **run)  # type: ignore[call-overload]
    code = (tmp_path / "configure.s").read_text(encoding="utf-8").splitlines()
    found = [index for index, line in enumerate(code) if line.strip().startswith("ldtilecfg")]
    assert len(found) == 1
    operand = code[found[0]].split(None, 1)[1]
    code[found[0]] = f"\tleaq {operand}, %rdi\n\tsubq $256, %rsp\n\tandq $-64, %rsp\n\tcall verify"
    (tmp_path / "configure.s").write_text("\n".join(code) + "\n", encoding="utf-8")
    subprocess.run(["g++", "verify.cpp", "configure.s", "-o", "check"], **run)  # type: ignore[call-overload]
    assert subprocess.run([str(tmp_path / "check")], check=False).returncode == 0


@pytest.mark.slow
def test_the_installed_build_decodes() -> None:
    pytest.importorskip("llama_cpp")
    assert build_llamacpp.check("extra") == "ok"


def test_a_dead_child_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "build_check.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", encoding="utf-8")
    monkeypatch.setattr(build_llamacpp, "__file__", str(tmp_path / "build_llamacpp.py"))
    assert build_llamacpp.check("plain") == "died with SIGSEGV"
    script.write_text("raise SystemExit('wrong numbers')\n", encoding="utf-8")
    assert build_llamacpp.check("plain") == "exit code 0x1: wrong numbers"
