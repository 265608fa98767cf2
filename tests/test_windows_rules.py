"""What Windows does otherwise, put on this system: modules that it lacks, files that are open, CRLF."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from convert.config import load_train_config
from convert.export import gguf_split
from convert.model import hub
from edge import cli
from edge.artefact import json_file, manifest
from edge.errors import ExistsError, UsageError
from edge.server.model_plans import lora_argument
from tests.support import tiny_llama, windows

ROOT = Path(__file__).parents[1]
# Libraries are imported before, as this system has them; then our modules, as Windows would have them.
IMPORT_ALL = """
import asyncio, importlib, multiprocessing.popen_spawn_posix, os, pathlib, pkgutil, signal, subprocess, sys
root, libraries, modules, functions, signals = sys.argv[1:]
for name in libraries.split():
    importlib.import_module(name)
for name in modules.split():
    sys.modules[name] = None
for name in functions.split():
    delattr(os, name)
for name in signals.split():
    delattr(signal, name)
sys.platform = "win32"
for top in ("edge", "convert", "bench"):
    for module in pkgutil.walk_packages([str(pathlib.Path(root, top))], f"{top}."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                # Some are for environments of their own, with other libraries.
                own = (*modules.split(), *libraries.split(), "edge", "convert", "bench")
                if error.name.split(".")[0] in own:
                    raise
print(len([name for name in sys.modules if name.split(".")[0] in ("edge", "convert", "bench")]))
"""
LIBRARIES = """
    torch transformers peft accelerate bitsandbytes datasets pyarrow gguf safetensors.torch tokenizers onnx
    onnxruntime llama_cpp llguidance fastapi uvicorn nicegui httptools rich.progress psutil numpy msgspec yaml
    jinja2.sandbox huggingface_hub jieba
"""
MODULES = "fcntl resource pwd grp termios tty pty posix crypt syslog readline"
FUNCTIONS = """
    fork forkpty killpg setsid getpgid setpgid getuid geteuid getgid uname sched_getaffinity sched_setaffinity
    mkfifo statvfs chown nice getloadavg wait4
"""
SIGNALS = "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGQUIT alarm setitimer pthread_sigmask"


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    windows.install(monkeypatch)


@pytest.mark.slow
def test_every_module_loads_without_what_windows_lacks() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, str(ROOT), LIBRARIES, MODULES, FUNCTIONS, SIGNALS]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) > 150


@pytest.mark.usefixtures("rules")
def test_what_is_open_is_not_replaced_and_stays_as_it_was(tmp_path: Path) -> None:
    def publish(text: str) -> None:
        with manifest.publish(tmp_path / "gguf", overwrite=True) as partial:
            (partial / "model.gguf").write_text(text, encoding="utf-8")
            manifest.write(partial, manifest.Manifest("gguf", "n"))

    publish("old")
    with (tmp_path / "gguf" / "model.gguf").open("rb"):
        with pytest.raises(ExistsError, match="gguf cannot be replaced: another program has it open"):
            publish("new")
        assert [path.name for path in tmp_path.iterdir()] == ["gguf"]
    assert (tmp_path / "gguf" / "model.gguf").read_text(encoding="utf-8") == "old"
    publish("new")
    assert (tmp_path / "gguf" / "model.gguf").read_text(encoding="utf-8") == "new"


@pytest.mark.usefixtures("rules")
def test_a_file_that_is_being_read_is_replaced_a_moment_later(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    json_file.write(path, {"step": 1})
    reader = path.open("rb")
    threading.Timer(0.12, reader.close).start()
    json_file.write(path, {"step": 2})
    assert reader.closed and json_file.read(path) == {"step": 2}
    assert b"\r" not in path.read_bytes() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("rules")
def test_a_file_is_let_go_before_it_is_removed(tmp_path: Path) -> None:
    path = tiny_llama.write(tmp_path / "m.gguf")
    assert gguf_split.split(path, 70_000).is_file() and not path.exists()


@pytest.mark.usefixtures("rules")
def test_the_rules_are_in_force(tmp_path: Path) -> None:
    """What holds the others: a rule that never refuses would prove nothing."""
    file = tmp_path / "a"
    file.write_text("a\n", encoding="utf-8")
    assert file.read_bytes() == b"a\r\n"
    with file.open("rb"):
        for act in (
            file.unlink,
            lambda: file.rename(tmp_path / "b"),
            lambda: tmp_path.rename(tmp_path / "c"),
        ):
            with pytest.raises(PermissionError):
                act()
    with contextlib.chdir(tmp_path), pytest.raises(PermissionError):
        tmp_path.rmdir()
    with pytest.raises(OSError, match="privilege"):
        (tmp_path / "link").symlink_to(file)


def test_drives_in_arguments_are_no_names_and_no_hub_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("D:\\models\\x", "C:foo", "D:/models", "\\\\host\\share\\a"):
        assert not hub.is_hub_id(path), path
    assert hub.is_hub_id("owner/name")
    assert lora_argument("conch=D:\\runs\\x") == ("conch", Path("D:\\runs\\x"))
    assert lora_argument("D:\\runs\\x") == (None, Path("D:\\runs\\x"))
    assert cli._YAML.search("D:\\runs\\a b\\conch.yaml") and not cli._YAML.search("output_dir=D:\\a.yaml")
    file = tmp_path / "crlf.yaml"
    file.write_bytes("output_dir: 'D:\\runs\\x'\r\ndataset: 行\r\n".encode())
    with pytest.raises(UsageError, match="is a path of Windows"):
        load_train_config(file, needs=())
    # Of this module alone: pathlib asks for the name, too.
    monkeypatch.setattr("convert.config.os", SimpleNamespace(**{**vars(os), "name": "nt"}))
    assert load_train_config(file, needs=()).output_dir == "D:\\runs\\x"
    assert load_train_config(None, ["output_dir=D:\\runs\\y"], needs=()).output_dir == "D:\\runs\\y"
