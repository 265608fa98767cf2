"""`edge doctor`: what it names, for machines that are made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edge.artefact import manifest
from edge.errors import UnavailableError
from edge.machine import build_llamacpp, doctor, hardware
from edge.setup import install_command, python_of

THE_GPU = hardware.GPU(0, "RTX [4060]", 8 * 2**30, 7 * 2**30, "576.02", "8.9", "12.9")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with a GPU and a build for the CPU; the entries can be changed."""
    info: dict[str, Any] = {
        "defines": {"GGML_OPENMP": "OFF", "LLAMA_OPENSSL": "OFF"},
        "cpu": "A",
        "cpu_key": "key",
        "check": {"plain": "ok", "extra": "died with SIGILL"},
        "notes": ["AMX is switched off"],
        "gpu": False,
    }
    found: dict[str, Any] = {
        "info": info,
        "gpus": [THE_GPU],
        "error": "",
        "version": {doctor.PACKAGE: "0.3.36"},
    }
    monkeypatch.setattr(doctor, "this_python", lambda: "python")
    monkeypatch.setattr(build_llamacpp, "build_info", lambda: found["info"])
    monkeypatch.setattr(build_llamacpp, "cpu_key", lambda: "key")
    monkeypatch.setattr(build_llamacpp, "compiler", lambda: build_llamacpp.Compiler("gcc", "12"))
    monkeypatch.setattr(hardware, "gpus", lambda: found["gpus"])
    monkeypatch.setattr(build_llamacpp, "probe", lambda: build_llamacpp.Probe(found["error"]))
    monkeypatch.setattr(
        manifest,
        "versions",
        lambda *names: {name: found["version"][name] for name in names if name in found["version"]},
    )
    return found


def item(name: str) -> doctor.Item:
    return next(item for item in doctor.items() if item.name == name)


def test_a_gpu_that_the_build_does_not_use(machine: dict[str, Any]) -> None:
    assert item("GPU").found == "not used by this build"
    assert "--cuda" in item("GPU").todo
    assert "RTX [4060], 8.0 GiB" in item("GPU 0").found
    assert item("checked by decoding").todo == "AMX is switched off"
    assert "GGML_OPENMP=OFF" in item(doctor.PACKAGE).found and item(doctor.PACKAGE).todo == ""


def test_no_gpu_is_said_and_is_no_fault(machine: dict[str, Any]) -> None:
    machine["gpus"] = []
    assert "none" in item("NVIDIA").found and item("NVIDIA").todo == ""
    assert all(row.name != "GPU" for row in doctor.items())


def test_s11_a_build_that_does_not_load(machine: dict[str, Any]) -> None:
    machine["error"] = "RuntimeError: libcudart.so.12: cannot open shared object file"
    assert "libcudart.so.12 is missing" in item(doctor.PACKAGE).found
    assert "pip install nvidia-cuda-runtime-cu12" in item(doctor.PACKAGE).todo
    machine["error"] = "RuntimeError: broken"
    assert "broken" in item(doctor.PACKAGE).found and "--force" in item(doctor.PACKAGE).todo


def test_missing_and_foreign_builds(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    machine["info"] = {}
    assert "stock: not built by" in item(doctor.PACKAGE).found
    machine["version"] = {}
    assert item(doctor.PACKAGE) == doctor.Item("llama.cpp", doctor.PACKAGE, "not installed", doctor.BUILD)

    def none() -> build_llamacpp.Compiler:
        raise UnavailableError("no compiler", "install one")

    monkeypatch.setattr(build_llamacpp, "compiler", none)
    assert item("compiler") == doctor.Item("llama.cpp", "compiler", "none", "install one")


def test_an_image_with_a_portable_build_and_no_compiler(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> build_llamacpp.Compiler:
        raise UnavailableError("no compiler", "install one")

    monkeypatch.setattr(build_llamacpp, "compiler", none)
    machine["info"] |= {"cpu": "any x86-64 CPU with AVX2", "cpu_key": "", "cuda": True}
    assert item("compiler").found.startswith("none, and none is needed") and item("compiler").todo == ""
    assert "built for any x86-64 CPU with AVX2" in item(doctor.PACKAGE).found
    assert item(doctor.PACKAGE).todo == ""
    # It was built where no GPU was.
    assert item("GPU") == doctor.Item("llama.cpp", "GPU", "used")


def test_a_mac_is_named_with_its_unified_memory(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["gpus"] = []
    monkeypatch.setattr(hardware, "apple_gpu", lambda: "Apple M4")
    assert "unified" in item("memory").found and item("Metal").found.startswith("Apple M4")
    assert item("GPU").found == "its check: not made" and "--force" in item("GPU").todo
    machine["info"] |= {"gpu": True, "check": {"gpu": "ok"}}
    assert item("GPU") == doctor.Item("llama.cpp", "GPU", "used")
    assert all(row.name != "NVIDIA" for row in doctor.items())


def test_a_build_for_another_cpu(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_llamacpp, "cpu_key", lambda: "another")
    assert "another CPU" in item(doctor.PACKAGE).todo


def test_packages_missing_and_other_than_tested(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = [
        "numpy",
        'torch; extra == "train"',
        'peft>=0.1; extra == "train"',
        'httpx; extra == "dev"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requirements)
    monkeypatch.setattr(doctor, "torch_kind", lambda packages: "cpu")
    monkeypatch.setattr(doctor, "pins", lambda: {"torch": "2.13.0", "httpx": "0.28.1"})
    machine["version"] |= {"torch": "2.13.0+cpu", "httpx": "0.27.0"}
    train, dev = item("train"), item("dev")
    assert train.found == "torch 2.13.0+cpu; missing: peft"
    assert train.todo == install_command("train")
    assert "other than tested: httpx 0.27.0 (tested: 0.28.1)" in dev.found
    assert "does not use the GPU" in item("torch").found
    assert item("torch").todo.endswith("torch==2.13.0")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        assert item("train").todo.startswith("this environment cannot be written") and item("ui").todo == ""
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "source_tree", lambda: None)
        names = {row.name for row in doctor.items() if row.group == "packages"}
        assert "train" in names and "dev" not in names
    monkeypatch.setattr("sys.platform", "win32")
    assert "edge.setup --extras train --cuda" in list(doctor._packages([THE_GPU]))[-1].todo


def test_the_onnx_runtime_that_fits(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ['onnxruntime; extra == "onnx"'])
    assert item("ONNX Runtime").todo == install_command("serve", "onnx")
    machine["version"] |= {"onnxruntime": "1.31.1"}
    assert item("ONNX Runtime").todo == f"{install_command('onnx')} --cuda"
    machine["version"] |= {"onnxruntime-gpu": "1.31.1"}
    assert "uninstall onnxruntime, then" in item("ONNX Runtime").todo
    del machine["version"]["onnxruntime"]
    assert item("ONNX Runtime") == doctor.Item("onnx", "ONNX Runtime", "onnxruntime-gpu 1.31.1")
    assert item("onnx") == doctor.Item("packages", "onnx", "onnxruntime-gpu 1.31.1")  # in the other's place


def test_another_environment_than_the_folders(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "source_tree", lambda: tmp_path)
    assert item("Python").todo == "" and sys.executable in item("Python").found
    monkeypatch.setattr(doctor, "this_python", lambda: "my env/bin/python")
    machine["info"] = {}
    assert item(doctor.PACKAGE).todo == "'my env/bin/python' -m edge.machine.build_llamacpp"
    python = python_of(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    assert str(python) in item("Python").todo


def test_both_forms_print(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["llama_cpp"]["cpu"] == "A" and data["machine"]["threads"] >= 1
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "threads used" in text and "RTX [4060]" in text


def test_u12_a_cache_that_cannot_be_written(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path)
    assert item("cache") == doctor.Item("machine", "cache", f"{tmp_path} can be written")
    (tmp_path / "file").touch()
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path / "file" / "edge")
    assert "cannot be written: " in item("cache").found and "set " in item("cache").todo


def test_a_containers_limits_have_a_line(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    limited = hardware.Memory(2**29, 2**28, 2**29, Path("memory.max"))
    for quota, memory, text in (
        (1.5, limited, "1.5 CPUs, 512.0 MiB of memory"),
        (None, hardware.Memory(2**30, 2**29), "none"),
    ):
        monkeypatch.setattr(hardware, "cpu_quota", lambda quota=quota: quota)
        monkeypatch.setattr(hardware, "memory", lambda memory=memory: memory)
        assert item("container's limits").found == text
