"""The installation: its commands for machines that are made up, and what it says of what is missing."""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from edge import setup
from edge.errors import EdgeError, UnavailableError, UsageError
from edge.setup import Choice, Machine, Meter

ROOT = Path(__file__).parents[2]
LINUX = Machine("linux", "", ".venv/bin/python", str(ROOT))
WINDOWS = Machine("win32", "13.1", r".venv\Scripts\python.exe", str(ROOT))
SERVE = Choice(("serve", "onnx"))


def words(machine: Machine, choice: Choice, before: Choice | None = None) -> list[str]:
    """The steps, without what all of them begin with."""
    rows = [" ".join(step.command) for step in setup.plan(machine, choice, before=before)]
    pip = f"{machine.python} -m pip --disable-pip-version-check "
    short = {str(setup.PINS): "PINS", f"{ROOT}[": "/src[", "install --no-compile -c": "install -c"}
    return [shortened(row.removeprefix(pip), short) for row in rows]


def shortened(text: str, short: dict[str, str]) -> str:
    for long, word in short.items():
        text = text.replace(long, word)
    return text


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"extras": None, "cuda": None, "build": None, **given})


def test_the_extras_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert list(setup.EXTRAS) == sorted(project["optional-dependencies"], key=list(setup.EXTRAS).index)
    assert project["name"] == setup.DISTRIBUTION
    assert project["requires-python"] == ">=3.11"


def test_serving_alone() -> None:
    assert words(LINUX, SERVE) == [
        "install --quiet pip==26.1",
        "install -c PINS msgspec numpy psutil pyyaml rich scikit-build-core cmake ninja",
        ".venv/bin/python -m edge.machine.build_llamacpp --wheel --progress json",
        "install -c PINS -e /src[serve,onnx]",
        ".venv/bin/python -m edge.machine.build_llamacpp",
    ]
    ahead = [step.ahead for step in setup.plan(LINUX, SERVE)]
    assert ahead == [False, False, True, False, False]
    assert words(LINUX, replace(SERVE, build=False))[-1] == "install -c PINS -e /src[serve,onnx]"
    assert words(LINUX, Choice(("onnx",)))[-1] == "install -c PINS -e /src[onnx]"


def test_cuda_has_one_onnx_runtime() -> None:
    remove = "uninstall --quiet --yes onnxruntime onnxruntime-gpu"
    cuda = replace(SERVE, cuda=True)
    assert words(replace(LINUX, cuda="13.0"), cuda)[4:] == [
        remove,
        "install -c PINS onnxruntime-gpu[cuda,cudnn]",
        ".venv/bin/python -m edge.machine.build_llamacpp --cuda",
    ]
    assert "install -c PINS onnxruntime-gpu" in words(LINUX, Choice(cuda=True))  # torch brings the libraries
    assert words(LINUX, SERVE, cuda)[3] == remove  # back to the processor


def test_windows_takes_torch_for_its_gpu_from_where_it_is() -> None:
    torch = "--no-deps --index-url https://download.pytorch.org/whl/{} torch"
    train = Choice(("train",))
    assert words(WINDOWS, train)[3] == f"install -c PINS {torch.format('cu130')}"
    assert words(replace(WINDOWS, cuda="12.8"), train)[3].endswith(torch.format("cu126"))
    # One for the CPU is there already, and pip would be content with it.
    assert "--force-reinstall" in words(replace(WINDOWS, torch="cpu"), train)[3]
    for other in (replace(WINDOWS, torch="cuda"), replace(WINDOWS, cuda=""), replace(LINUX, cuda="13.0")):
        assert not any("--index-url" in row for row in words(other, train))
    assert not any("--index-url" in row for row in words(WINDOWS, SERVE))


def test_a_wheel_takes_its_own_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        "numpy",
        'fastapi; extra == "serve"',
        "onnxruntime>=1; extra == 'onnx'",
        'torch; extra == "train"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: rows)
    assert words(replace(LINUX, tree=None), SERVE)[2] == "install -c PINS numpy fastapi onnxruntime>=1"
    assert words(replace(LINUX, tree=None), SERVE)[0] == "install -c PINS scikit-build-core cmake ninja"
    assert setup.requirements("onnx", own=True) == ["onnxruntime>=1"]


def test_pips_own_index_and_mirrors_hold() -> None:
    for choice in (SERVE, Choice(), Choice(cuda=True)):
        assert not any("index" in row or "--isolated" in row for row in words(LINUX, choice))


def test_choices_stay_and_extras_are_added() -> None:
    first = setup.chosen(options(extras="serve", cuda=True), None)
    assert first == Choice(("serve",), cuda=True)
    assert setup.chosen(options(), first) == first
    assert setup.chosen(options(extras="onnx", cuda=False), first) == Choice(("serve", "onnx"))
    assert setup.chosen(options(extras="all"), first).extras == setup.ALL
    assert "ray" not in setup.ALL
    assert setup.chosen(options(extras="all,ray"), first).extras == tuple(setup.EXTRAS)
    assert setup.chosen(options(), None) == Choice()
    assert setup.chosen(options(build=False), None).build is False
    with pytest.raises(UsageError, match="there is no sing"):
        setup.chosen(options(extras="sing"), None)


def test_state_is_read_back_or_forgotten(tmp_path: Path) -> None:
    assert setup.read_state(tmp_path) == (None, "")
    setup.write_state(tmp_path, SERVE, "key")
    assert setup.read_state(tmp_path) == (SERVE, "key")
    (tmp_path / "edge-setup.json").write_text('{"extras": 1}')
    assert setup.read_state(tmp_path) == (None, "")


def test_an_old_or_narrow_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    setup.check_width(True)
    with pytest.raises(UnavailableError, match="32 bits"):
        setup.check_width(False)
    monkeypatch.setattr(sys, "version_info", (3, 6, 15))
    with pytest.raises(SystemExit, match=r"this Python is 3\.6, edge needs 3\.11"):
        runpy.run_path(str(ROOT / "edge" / "__init__.py"))


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("OSError: [Errno 28] No space left on device", "is full"),
        (
            "WARNING: Retrying: Failed to resolve 'x'\nERROR: No matching distribution found for a",
            "be reached",
        ),
        (
            "Retrying after 'SSLError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] self-signed')'",
            "is not trusted here",
        ),
        ("ERROR: No matching distribution found for torch==9", "has no torch==9"),
        (
            "ERROR: a (from versions: none)\nERROR: No matching distribution found for a",
            "reached, or has no a",
        ),
        ("/usr/bin/python: No module named pip", "has no pip"),
        ("ERROR: something new", "something new"),
    ],
)
def test_what_pip_says_is_one_sentence_and_a_command(log: str, message: str, tmp_path: Path) -> None:
    error = setup.problem(log, "AGAIN", tmp_path)
    assert message in error.message and ("AGAIN" in error.hint or "mirror" in error.hint)


def test_what_is_downloaded_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(100)
    meter.line("  Downloading torch-2.13.0-cp311.whl.metadata (29 kB)")
    meter.line("Downloading torch-2.13.0-cp311.whl (40.0 MB)")
    meter.line("Progress 0 of 40000000")
    meter.line("Progress 40000000 of 40000000")
    meter.line("Progress 10000000 of 20000000")
    status = meter.status(meter._start + 10)
    assert status == "  [##########..........] 50 of about 100 MB, 0:10 left"
    meter.line("Collecting nvidia-cublas (from torch)")
    assert "of about 2,600 MB" in meter.status(meter._start + 10)
    meter.line("Installing collected packages: a, b")
    said = capsys.readouterr().out
    assert said.startswith("  torch-2.13.0-cp311.whl (40.0 MB)\n") and "unpacking 2 packages" in said
    assert meter.status(meter._start + 10) == "  unpacking 2 packages"


def test_more_than_expected_is_no_negative_time() -> None:
    meter = Meter(1)
    meter.line("Progress 5000000 of 5000000")
    assert meter.status(meter._start + 1) == f"  [{'#' * 20}] 5 of about 5 MB"


def test_a_full_disk_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=10**9))
    steps = setup.plan(LINUX, Choice())
    with pytest.raises(UnavailableError, match=r"has 1\.00 GB free, about 2\.\d+ are needed"):
        setup.check_space(tmp_path / "not" / "yet", steps, "AGAIN")
    setup.check_space(tmp_path, setup.plan(LINUX, SERVE), "AGAIN")


def test_half_an_environment_is_made_anew_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".venv"
    python = setup.python_of(folder)
    python.parent.mkdir(parents=True)
    python.touch()
    assert not setup.has_pip(python) and not setup.restore_pip(folder)
    calls = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "ensurepip is not\navailable.\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UnavailableError, match="no environment could be made: available") as caught:
        setup.make_environment(folder, "AGAIN")
    assert "python3-venv" in caught.value.hint and not folder.exists()
    assert calls[-1][1:] == ["-m", "venv", "--clear", str(folder)]


@pytest.mark.slow
def test_an_environment_without_pip_keeps_its_packages(tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = setup.packages_of(folder)
    (packages / "kept").mkdir()
    (packages / "pip-26.1.dist-info").mkdir()  # of a pip that was removed while it replaced itself
    setup.make_environment(folder, "AGAIN")
    assert setup.has_pip(setup.python_of(folder)) and (packages / "kept").is_dir()


def test_a_failed_build_leaves_the_rest_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(setup, "source_tree", lambda: tmp_path)
    monkeypatch.setattr(setup, "environment", lambda tree: tmp_path / ".venv")
    monkeypatch.setattr(setup, "digest", lambda tree, choice: f"key {choice.build}")
    monkeypatch.setattr(
        setup, "make_environment", lambda folder, again: setup.python_of(folder).parent.mkdir(exist_ok=True)
    )
    monkeypatch.setattr(setup, "driver_cuda", lambda: "")
    monkeypatch.setattr(setup, "lacks", lambda places, choice: False)
    ran: list[str] = []
    monkeypatch.setattr(setup, "run_pip", lambda step, again, place, ahead: ran.append(step.title))
    monkeypatch.setattr(setup, "Ahead", lambda command, tree: Mock())
    monkeypatch.setattr(setup, "own_requirements", lambda tree: [])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert setup.main(["--extras", "serve"]) == 1
    said = capsys.readouterr().err
    assert "all else is installed" in said and "edge.setup --extras serve --no-build" in said
    assert setup.main(["--no-build"]) == 0
    assert ran == ["pip itself", "what builds llama.cpp", "packages", "pip itself", "packages"]
    setup.python_of(tmp_path / ".venv").touch()
    assert setup.main([]) == 0 and len(ran) == 5  # nothing is left to do, and what was chosen stays


def test_without_llama_cpp_onnx_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(setup, "run_pip", lambda step, again, place: ran.append(" ".join(step.command)))
    code = setup.NO_LLAMACPP
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code))
    step = setup.Step("llama.cpp", ["build"])
    after = setup.bring_llamacpp(step, LINUX, Choice(("serve", "train")), "AGAIN")
    assert after == Choice(("serve", "onnx", "train", "export-onnx"), build=False)
    assert ran[-1].endswith(f"-e {ROOT}[onnx,export-onnx]")
    assert "served by ONNX Runtime" in capsys.readouterr().out
    ran.clear()
    assert setup.bring_llamacpp(step, LINUX, SERVE, "AGAIN --build") == replace(SERVE, build=False)
    assert ran == [] and "AGAIN --build\n" in capsys.readouterr().out
    with pytest.raises(EdgeError, match="could not be built"):
        setup.bring_llamacpp(step, LINUX, replace(SERVE, cuda=True), "AGAIN")
    code = 130
    with pytest.raises(KeyboardInterrupt):
        setup.bring_llamacpp(step, LINUX, SERVE, "AGAIN")


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "setup", stopped)
    assert setup.main(["--extras", "serve"]) == 130
    assert "goes on where it stopped: " in capsys.readouterr().err


BUILD = """
import json, time
for done in (10, 20):
    print(json.dumps({"stage": "compiling", "done": done, "total": 40, "seconds_left": 65.0}), flush=True)
time.sleep(60)
"""


def test_a_build_goes_on_beside_pip_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ahead = setup.Ahead([sys.executable, "-c", BUILD], None)
    while ahead.done < 20:
        time.sleep(0.01)
    assert ahead.status() == "llama.cpp [##########..........] 20 of 40, 1:05 left"
    monkeypatch.setattr(setup, "_TICK_S", 0.01)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    pip = "import time; print('Installing collected packages: a', flush=True); time.sleep(0.5)"
    setup.run_pip(setup.Step("packages", [sys.executable, "-c", pip]), "AGAIN", tmp_path, ahead)
    assert "  unpacking 1 packages; llama.cpp [####" in capsys.readouterr().out
    ahead.stop()
    assert ahead.process.returncode and ahead.status() == ""
    ahead.wait()  # at once


def test_ctrl_c_ends_pip_and_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = [sys.executable, "-c", "import time; time.sleep(60)"]
    started: list[Any] = []
    real = subprocess.Popen

    def popen(*words: Any, **options: Any) -> Any:
        started.append(real(*words, **options))
        return started[-1]

    def stopped(self: Meter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(Meter, "show", stopped)
    monkeypatch.setattr(setup, "_END_S", 0.01)
    steps = [setup.Step("build", endless, ahead=True), setup.Step("packages", endless)]
    with pytest.raises(KeyboardInterrupt):
        setup.run_steps(steps, replace(LINUX, tree=None), SERVE, "AGAIN", tmp_path)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_what_a_killed_pip_left_is_swept(tmp_path: Path) -> None:
    for name in ("~orch", "whole-1.0.dist-info", "half-1.0.dist-info", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "whole-1.0.dist-info" / "RECORD").touch()
    setup.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "whole-1.0.dist-info"]


def test_pip_that_fails_is_reported(tmp_path: Path) -> None:
    code = "print('ERROR: No matching distribution found for nothing'); raise SystemExit(1)"
    with pytest.raises(EdgeError, match="has no nothing"):
        setup.run_pip(setup.Step("packages", [sys.executable, "-c", code]), "AGAIN", tmp_path)


def test_a_damaged_installation_is_seen(tmp_path: Path) -> None:
    def distribution(name: str, version: str, *requires: str) -> Path:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        rows = "".join(f"Requires-Dist: {row}\n" for row in requires)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{rows}")
        return folder

    choice = Choice(("serve", "onnx"))
    assert setup.lacks([tmp_path], choice)
    rows = ('jinja2; extra == "serve"', 'onnxruntime; extra == "onnx"', 'torch; extra == "train"')
    distribution("edge_tune", "0.1.0", "PyYAML", *rows)
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", setup.PINS.read_text(encoding="utf-8"), re.MULTILINE))
    distribution("pyyaml", pins["pyyaml"])
    distribution("Jinja2", pins["jinja2"] + "+local")
    runtime = distribution("onnxruntime", pins["onnxruntime"])
    assert setup.lacks([tmp_path], choice)  # llama.cpp
    assert not setup.lacks([tmp_path], replace(choice, build=False))
    assert setup.lacks([tmp_path], replace(choice, build=False, cuda=True))  # the other onnxruntime
    distribution("llama_cpp_python", pins["llama-cpp-python"])
    assert not setup.lacks([tmp_path], choice)
    runtime.rename(tmp_path / "onnxruntime-1.0.dist-info")
    assert setup.lacks([tmp_path], choice)


def test_torch_is_told_by_its_own_file(tmp_path: Path) -> None:
    assert setup.torch_kind(tmp_path) == ""
    file = tmp_path / "torch" / "version.py"
    file.parent.mkdir()
    file.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = None\n")
    assert setup.torch_kind(tmp_path) == "cpu"
    file.write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    assert setup.torch_kind(tmp_path) == "cuda"


def test_no_text_names_a_folder_or_a_distribution_that_is_not_there() -> None:
    """Who has a wheel has no source tree; and `edge` on the package index is another project."""
    files = [path for top in ("edge", "convert", "bench", "docs") for path in (ROOT / top).rglob("*.*")]
    files += [*ROOT.glob("*.md"), *ROOT.glob("setup.*")]
    wrong = re.compile(r"pip install [^\n]*(?:'?\.\[|\bedge(?![-.\w]))")
    for path in files:
        if path.suffix in (".py", ".md", ".sh", ".ps1", ".txt"):
            assert not wrong.search(path.read_text(encoding="utf-8")), path


@pytest.mark.slow
def test_the_standard_library_is_enough() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import edge.setup\n"
        "print([name for name in sys.modules if name.split('.')[0] not in sys.stdlib_module_names "
        "and not name.startswith(('edge', '__'))])"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
