"""GPUs that are there and those that cannot be used: what is taken instead, and what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge.artefact import manifest
from edge.backends import onnx_providers as providers
from edge.errors import InputError, UnavailableError, UsageError
from edge.loading import gpu_offload, load_plan
from edge.machine import build_llamacpp, doctor, hardware
from edge.machine.hardware import GPU
from tests.support.fake_server import CHAT, fake_server, user

THE_GPU = GPU(0, "小卡", 8 * 2**30, 7 * 2**30, "550.54", "8.6", "12.4")

# What llama.cpp built for CUDA says in a child process, and what helps.
SAID = {
    "CUDA driver version is insufficient for CUDA runtime version": "550.54 supports CUDA up to 12.4",
    "all CUDA-capable devices are busy or unavailable": "exclusive use of the GPU",
    "no CUDA-capable device is detected": "CUDA_VISIBLE_DEVICES",
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: [THE_GPU])


# -- llama.cpp -------------------------------------------------------------------------------------------


def child(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str) -> None:
    done = SimpleNamespace(returncode=code, stderr=stderr.encode("utf-8"))
    monkeypatch.setattr(subprocess, "run", lambda *given, **more: done)


def test_no_driver_or_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: [])
    child(monkeypatch, 0, "")
    assert load_plan.choose_device("auto") == ("cpu", 0, "no NVIDIA GPU was found")
    with pytest.raises(UnavailableError, match="no NVIDIA GPU was found"):
        load_plan.choose_device("cuda")


@pytest.mark.parametrize("said", SAID)
def test_a_gpu_that_llama_cpp_cannot_use(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    child(monkeypatch, 3, f"ggml_cuda_init: failed to initialize CUDA: {said}\n")
    device, layers, why = load_plan.choose_device("auto")
    assert (device, layers) == ("cpu", 0)
    assert said in why and "built for GPUs" in why
    with pytest.raises(UnavailableError) as caught:
        load_plan.choose_device("cuda")
    assert said in caught.value.message and SAID[said] in caught.value.hint


def test_wrong_cuda_major_and_a_build_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, 1, "Traceback:\nOSError: libcudart.so.13: cannot open shared object file")
    with pytest.raises(UnavailableError, match=r"does not load: OSError: libcudart\.so\.13") as caught:
        load_plan.choose_device("cuda")
    assert caught.value.hint.endswith("-m pip install nvidia-cuda-runtime  (CUDA 13)")
    child(monkeypatch, 3, "")
    with pytest.raises(UnavailableError, match=r"edge\.setup --cuda"):
        load_plan.choose_device("cuda")
    child(monkeypatch, 0, "ggml_cuda_init: found 1 CUDA devices")
    assert load_plan.choose_device("auto") == ("cuda: 小卡", gpu_offload.ALL, "a GPU was found")


def test_the_doctor_says_why_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {
        "defines": {},
        "cpu": "A",
        "cpu_key": build_llamacpp.cpu_key(),
        "check": {},
        "notes": [],
        "gpu": True,
    }
    monkeypatch.setattr(build_llamacpp, "build_info", lambda: info)
    monkeypatch.setattr(manifest, "versions", lambda *names: dict.fromkeys(names, "0.3.36"))
    lacks = {"": ("used", "")}
    for said, todo in SAID.items():
        lacks[f"finds none that it can use: {said}"] = (said, todo)
    lacks["something new"] = ("something new", "--force")
    for reason, (found, todo) in lacks.items():
        monkeypatch.setattr(build_llamacpp, "probe", lambda reason=reason: build_llamacpp.Probe("", reason))
        [item] = [one for one in doctor._llamacpp([THE_GPU]) if one.name == "GPU"]
        assert found in item.found and todo in item.todo


# -- memory that is full while serving -------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_that_fails_is_said_and_the_engine_started_anew() -> None:
    with fake_server(reply="z" * 3000, context=4096, step_s=0.02, fails_at=30) as server:
        worker = server.worker()
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.post, "/generate", {"prompt": "x", "speculate": False})
            body = {"messages": user(), "stream": True, "speculate": False}
            streamed = pool.submit(server.post, CHAT, body)
        error = whole.result().json()["error"]
        assert (whole.result().status_code, error["code"]) == (503, "engine_crashed")
        assert "failed in a step of" in error["message"] and "restarted" in error["message"]
        rows = [line for line in streamed.result().text.split("\n") if line.startswith("data: ")]
        assert "failed in a step of" in json.loads(rows[-2][6:])["error"]["message"]
        server.wait()
        assert server.worker() != worker
        answer = server.post("/generate", {"prompt": "x", "max_tokens": 3})
        assert answer.json()["generate_text"] == "zzz"


# -- onnxruntime -----------------------------------------------------------------------------------------


def test_s10_auto_says_why_it_takes_what_it_takes() -> None:
    cpu, cuda = providers.NAMES["cpu"][0], providers.NAMES["cuda"][0]
    assert providers.choose("auto", [cpu], []) == ("cpu", "no NVIDIA GPU was found")
    name, why = providers.choose("auto", [cpu], [THE_GPU])
    assert name == "cpu"
    assert "onnxruntime-gpu" in why
    assert providers.choose("auto", [cuda, cpu], [THE_GPU]) == ("cuda", "a GPU was found")
    assert providers.choose("openvino", ["OpenVINOExecutionProvider", cpu], []) == ("openvino", "asked for")
    with pytest.raises(UnavailableError, match="CPUExecutionProvider only") as caught:
        providers.choose("cuda", [cpu], [THE_GPU])
    assert "onnxruntime-gpu" in str(caught.value)
    with pytest.raises(UsageError, match="no such device"):
        providers.choose("tpu", [cpu], [])


class Stub:
    """An onnxruntime that lists CUDA, and whose sessions run on the processor all the same."""

    __file__ = "/nowhere/onnxruntime/__init__.py"

    def get_available_providers(self) -> list[str]:
        return [providers.NAMES["cuda"][0], providers.NAMES["cpu"][0]]

    def preload_dlls(self) -> None:
        sys.stdout.write("Failed to load libcublasLt.so.13: cannot open shared object file")

    SessionOptions = lambda self: SimpleNamespace(add_session_config_entry=lambda *_: None)  # noqa: E731

    def InferenceSession(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(get_providers=lambda: [providers.NAMES["cpu"][0]])


def test_s10_s11_cuda_that_fell_back_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnavailableError) as caught:
        providers.open_session(Stub(), Path("m.onnx"), "cuda", threads=1, spin=True, cache_type="float16")
    for word in ("libcublasLt.so.13", "CUDA 13", "pip install nvidia-cublas"):
        assert word in str(caught.value)
    opened = providers.open_session(
        Stub(), Path("m.onnx"), "auto", threads=1, spin=True, cache_type="float16"
    )
    assert (opened.device, opened.provider) == ("cpu", "CPUExecutionProvider")
    assert "libcublasLt.so.13 is missing" in opened.why
    # What the library printed does not reach the terminal.
    assert capsys.readouterr().out == ""


def test_s10_a_provider_that_gives_no_reason_is_an_error_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Stub, "preload_dlls", lambda self: None)
    with pytest.raises(UnavailableError, match="no reason was given"):
        providers.open_session(Stub(), Path("m.onnx"), "cuda", threads=1, spin=True, cache_type="float16")


def test_a_file_for_cpus_is_not_put_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = providers.open_session(Stub(), Path("m.onnx"), "auto", threads=1, spin=True)
    assert opened.device == "cpu"
    assert "--ep cuda" in opened.why
    with pytest.raises(InputError, match="exported for CPUs"):
        providers.open_session(Stub(), Path("m.onnx"), "cuda", threads=1, spin=True)


def test_a_driver_that_is_older_than_what_onnxruntime_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub, "cuda_version", "13.0", raising=False)
    with pytest.raises(UnavailableError, match="and the driver 550\\.54 supports CUDA up to"):
        providers.open_session(Stub(), Path("m.onnx"), "cuda", threads=1, spin=True, cache_type="float16")
    opened = providers.open_session(
        Stub(), Path("m.onnx"), "auto", threads=1, spin=True, cache_type="float16"
    )
    assert opened.device == "cpu" and "install a newer NVIDIA driver" in opened.why
    monkeypatch.setattr(Stub, "cuda_version", "12.8", raising=False)
    opened = providers.open_session(
        Stub(), Path("m.onnx"), "auto", threads=1, spin=True, cache_type="float16"
    )
    assert "libcublasLt.so.13 is missing" in opened.why
