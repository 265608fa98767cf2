"""Every mistake at the command line ends in one message and a non-zero code."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge import cli, console
from edge.errors import EdgeError, UsageError


def edge(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge.cli", *argv],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env={**os.environ, **environment},
    )


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def run(argv: list[str]) -> int:
        raise error

    return run


def wrapped(error: BaseException) -> RuntimeError:
    wrapper = RuntimeError("Error calling __set_name__ on 'Field' instance")
    wrapper.__cause__ = error
    return wrapper


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.guarded(cli.main, ["--help"]) == 0
    assert "serve" in capsys.readouterr().out
    assert console.guarded(cli.main, []) == 2
    assert edge("--version").stdout.startswith("edge ")


def test_an_unknown_verb_is_named() -> None:
    done = edge("fly")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'fly'" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EdgeError("wrong", "do this"), 1, "error: wrong\n  do this\n"),
        (UsageError("bad"), 2, "error: bad\n"),
        (KeyboardInterrupt(), 130, "Ctrl-C"),
        (wrapped(KeyboardInterrupt()), 130, "Ctrl-C"),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), 1, "the disk is full: /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
    ],
)
def test_errors_become_messages(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        assert console.guarded(raising(error), []) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C there")
def test_a_second_ctrl_c_ends_the_process_without_a_traceback() -> None:
    code = """
import signal
from edge import cli, console

def run(argv):
    raise KeyboardInterrupt

console._fail = lambda *_: signal.raise_signal(signal.SIGINT)
console.guarded(run, [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_ctrl_c_within_a_callback_is_not_lost() -> None:
    code = """
import signal, sys, time
from edge import console

class Leaving:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def run(argv):
    Leaving()
    for _ in range(200):
        time.sleep(0.1)
    return 0

sys.exit(console.guarded(run, []))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr.startswith("error: stopped by Ctrl-C"), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="the name cannot be an argument here")
def test_t6_the_console_never_raises_under_another_locale(tmp_path: Path) -> None:
    done = edge("serve", str(tmp_path / "模型🚀"), LC_ALL="C")
    assert done.returncode == 1
    assert "模型🚀" in done.stderr


def test_s17_a_port_in_use_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        began = time.monotonic()
        done = edge("serve", "x.gguf", "--port", port)
        assert time.monotonic() - began < 3
        assert done.returncode == 1
        assert f"127.0.0.1:{port}" in done.stderr


def test_beyond_loopback_a_key_is_needed() -> None:
    done = edge("serve", "x.gguf", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "EDGE_API_KEY" in done.stderr


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("nothing", None, "no such file or folder"),
        ("empty", lambda p: p.mkdir(), "holds no GGUF or ONNX file"),
        ("a.txt", lambda p: p.write_text("x", encoding="utf-8"), "not a .gguf or .onnx file"),
        ("a.gguf", lambda p: p.write_bytes(b"not one"), "a.gguf"),
        ("two", lambda p: (p.mkdir(), (p / "1.gguf").touch(), (p / "2.gguf").touch()), "several GGUF files"),
        ("run", lambda p: (p / "merged").mkdir(parents=True), "edge export gguf"),
    ],
)
def test_serve_says_what_is_wrong_with_a_path(
    tmp_path: Path,
    name: str,
    make: Callable[[Path], object] | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if make is not None:
        make(tmp_path / name)
    assert console.guarded(cli.main, ["serve", str(tmp_path / name), "--port", "0"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "chat"])
def test_help_and_wrong_arguments_import_nothing_heavy(verb: str) -> None:
    heavy = {"fastapi", "starlette", "pydantic", "uvicorn", "numpy", "llama_cpp", "onnxruntime", "jinja2"}
    code = f"""
import sys
from edge.cli import main
for argv in (["{verb}", "--help"], ["{verb}", "x", "--ctx", "many"], ["{verb}", "x", "--device", "abacus"]):
    try:
        main(argv)
    except SystemExit:
        pass
print(sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "invalid choice: 'abacus'" in done.stderr


def test_the_devices_are_those_of_the_backends() -> None:
    from edge.arguments import DEVICES
    from edge.backends import onnx_providers

    assert DEVICES == onnx_providers.DEVICES
