"""llama.cpp without a compiler: a library that is named, a stock wheel, and neither."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from rich.console import Console

from edge.artefact import manifest
from edge.errors import EdgeError, UnavailableError, UsageError
from edge.machine import build_check, build_llamacpp, doctor, stock_llamacpp
from edge.machine.build_llamacpp import NoCompilerError
from edge.machine.llamacpp_source import PACKAGE, STOCK, VERSION
from edge.setup import NO_LLAMACPP

LIBRARY = stock_llamacpp._NAMES.get(sys.platform, ("libllama.so",))[0]


class Machine:
    """Without a compiler; what pip is asked for, which packages are there, and how the check ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[list[str]] = []
        self.reachable = True
        self.installed = ""
        self.outcome = "ok"
        self.compiler = NoCompilerError("which has no C++ compiler", "apt-get install g++")
        self.said = io.StringIO()

    def pip(self, arguments: list[str], doing: str) -> None:
        self.asked.append(arguments)
        if not self.reachable:
            raise UnavailableError(f"{doing} failed:\nERROR: No matching distribution", "check the network")
        self.installed = VERSION

    def no_compiler(self) -> None:
        raise self.compiler

    def install(self, **options: bool) -> dict[str, object]:
        return build_llamacpp.install(console=Console(file=self.said, width=400, markup=False), **options)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    machine = Machine(package)
    monkeypatch.delenv(stock_llamacpp.VARIABLE, raising=False)
    monkeypatch.setattr(stock_llamacpp, "pip", machine.pip)
    monkeypatch.setattr(stock_llamacpp, "sdist", lambda: tmp_path / "sdist")
    monkeypatch.setattr(stock_llamacpp, "install_tools", lambda: None)
    versions = lambda *names: {PACKAGE: machine.installed} if machine.installed else {}  # noqa: E731
    monkeypatch.setattr(manifest, "versions", versions)
    monkeypatch.setattr(build_llamacpp, "compiler", machine.no_compiler)
    monkeypatch.setattr(build_llamacpp, "check", lambda mode: machine.outcome)
    monkeypatch.setattr(build_llamacpp, "probe", lambda: build_llamacpp.Probe("", "no GPU"))
    monkeypatch.setattr(build_llamacpp, "_package_folder", lambda: package)
    return machine


def test_without_a_compiler_a_stock_wheel_is_taken_and_checked(machine: Machine) -> None:
    assert build_llamacpp.stock() == STOCK  # whatever is there, nothing is known of it
    info = machine.install()
    assert machine.asked[0][-1] == f"{PACKAGE}=={VERSION}" and "--only-binary" in machine.asked[0]
    assert stock_llamacpp.INDEX in machine.asked[0] and "--index-url" not in machine.asked[0]
    assert info == build_llamacpp.build_info() and info["check"] == {"plain": "ok", "extra": "ok"}
    assert (
        "without edge's kernels" in build_llamacpp.stock()
        and "has no C++ compiler" in machine.said.getvalue()
    )
    assert "it is stock: checked by decoding" in machine.said.getvalue()
    rows = {item.name: item for item in doctor._llamacpp([])}
    assert rows[PACKAGE].found.startswith(f"{VERSION}, stock: checked") and not rows[PACKAGE].todo
    machine.install()
    assert len(machine.asked) == 2  # the wheel, and what it needs: not again


def test_a_package_that_is_there_is_checked_and_kept(machine: Machine) -> None:
    machine.installed = VERSION  # from conda-forge, or anywhere
    assert machine.install()["use_extra_bufts"] is True and machine.asked == []
    machine.installed = "0.3.1"
    machine.install(force=True)
    assert machine.asked


def test_with_neither_only_onnx_is_left(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.reachable = False
    with pytest.raises(
        NoCompilerError, match=r"no C\+\+ compiler; and no stock build is there: https"
    ) as error:
        machine.install()
    assert error.value.exit_code == NO_LLAMACPP and error.value.hint == "apt-get install g++"
    assert build_llamacpp.build_info() == {}
    (machine.folder / "conda-meta").mkdir()
    monkeypatch.setattr(sys, "prefix", str(machine.folder))
    with pytest.raises(NoCompilerError) as error:
        machine.install()
    assert error.value.hint.startswith(f"conda install -c conda-forge {PACKAGE}={VERSION}")


def test_a_wheel_that_cannot_decode_is_refused(machine: Machine) -> None:
    machine.outcome = "died with SIGILL"
    with pytest.raises(UnavailableError, match=r"stock build of .* cannot decode: died with SIGILL"):
        machine.install()
    assert build_llamacpp.build_info() == {}


def test_a_build_that_fails_is_no_lack_of_a_compiler(machine: Machine) -> None:
    machine.compiler = EdgeError("building failed")  # type: ignore[assignment]
    machine.reachable = False
    with pytest.raises(EdgeError, match="building failed; and no stock build") as error:
        machine.install()
    assert error.value.exit_code == 1
    with pytest.raises(EdgeError, match=r"^building failed$"):
        machine.install(cuda=True)  # a stock wheel is for the CPU


def test_a_library_that_is_named_goes_before_all(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    for wrong in (str(folder), "lib"):
        monkeypatch.setenv(stock_llamacpp.VARIABLE, wrong)
        with pytest.raises(UsageError, match="is not the full path of a folder with"):
            machine.install()
    (folder / LIBRARY).write_bytes(b"\x7fELF")
    monkeypatch.setenv(stock_llamacpp.VARIABLE, str(folder))
    info = machine.install()
    assert machine.asked[0][-1] == str(tmp_path / "sdist") and "wheel.cmake=false" in machine.asked[0]
    assert str(folder) in build_llamacpp.stock() and build_llamacpp.build_info() == info
    machine.install()
    assert len(machine.asked) == 1
    monkeypatch.delenv(stock_llamacpp.VARIABLE)
    assert build_llamacpp.build_info() == {}  # of the package's own library nothing is known
    monkeypatch.setenv(stock_llamacpp.VARIABLE, str(folder))
    (folder / LIBRARY).write_bytes(b"\x7fELF, another")
    assert build_llamacpp.build_info() == {}
    machine.outcome = "died with SIGSEGV"
    with pytest.raises(UsageError, match=f"{folder}: its llama.cpp cannot decode: died with SIGSEGV"):
        machine.install()


@pytest.mark.slow
def test_the_check_decodes_with_the_library_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = build_llamacpp._package_folder()
    if package is None or not (package / "lib").is_dir():
        pytest.skip("llama-cpp-python has a library of its own")
    monkeypatch.setenv(stock_llamacpp.VARIABLE, str(tmp_path))
    assert "not found" in build_llamacpp.check("plain")
    shutil.copytree(package / "lib", tmp_path, dirs_exist_ok=True, symlinks=True)
    assert build_llamacpp.check("plain") == "ok"


@pytest.mark.parametrize(("there", "loaded"), [(0, [b"/lib"]), (1, [])])
def test_backends_that_are_files_are_loaded_where_there_are_none(there: int, loaded: list[bytes]) -> None:
    asked: list[bytes] = []
    ggml = SimpleNamespace(
        # As ctypes' functions have attributes of their own.
        ggml_backend_reg_count=Mock(return_value=there),
        ggml_backend_load_all_from_path=Mock(side_effect=asked.append),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "linux")
        build_check.load_backends(SimpleNamespace(_base_path=Path("/lib"), _lib=ggml))
    assert asked == loaded


def test_backends_on_windows_are_asked_for_by_their_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    ggml = Mock(ggml_backend_reg_count=Mock(return_value=0))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(build_check.ctypes, "CDLL", lambda name: opened.append(name) or ggml)
    build_check.load_backends(SimpleNamespace(_base_path=Path("lib")))
    assert opened == [str(Path("lib") / "ggml.dll")]
    ggml.ggml_backend_load_all_from_path.assert_called_once_with(b"lib")
    del ggml.ggml_backend_load_all_from_path  # llama.cpp as one file
    build_check.load_backends(SimpleNamespace(_base_path=Path("lib")))
