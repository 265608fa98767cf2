"""Which of a run's artefacts is served, how an ONNX model is loaded, and what serving it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("tokenizers")


from edge.artefact import find, manifest
from edge.artefact.onnx_header import OUTPUT_POSITIONS
from edge.backends.onnx import Model, Settings
from edge.errors import InputError, UnavailableError, UsageError
from edge.loading import load_plan, tune, tune_onnx
from edge.loading.load_plan import Options
from edge.machine import hardware
from edge.machine.hardware import Memory
from tests.support import tiny_llama, tiny_onnx


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx.write(tmp_path_factory.mktemp("模型 目录"), name="тест.onnx").parent


def publish(run: Path, *, both: bool = False, **given: Any) -> Path:
    """A run with an ONNX stage and, if asked, a GGUF one."""
    with manifest.publish(run / "onnx") as partial:
        tiny_onnx.write(partial, name="微小.onnx")
        fields: dict[str, Any] = {
            "stage": "onnx",
            "name": "微小",
            "stop_ids": [tiny_onnx.END],
            "chat_template": manifest.text_digest(tiny_onnx.TEMPLATE),
        }
        manifest.write(partial, manifest.Manifest(**{**fields, **given}))
    if both:
        with manifest.publish(run / "gguf") as partial:
            tiny_llama.write(partial / "微小.gguf")
            manifest.write(partial, manifest.Manifest("gguf", "微小"))
    return run


def test_run_folder_and_file_are_the_same_artefact(tmp_path: Path) -> None:
    publish(tmp_path)
    by_run = find.resolve(tmp_path)
    assert by_run == find.resolve(tmp_path / "onnx") == find.resolve(tmp_path / "onnx" / "微小.onnx")
    assert (by_run.kind, by_run.name, by_run.stop_ids) == ("onnx", "微小", frozenset({tiny_onnx.END}))
    assert by_run.digest == manifest.read(tmp_path / "onnx").digest


def test_files_that_were_changed_after_the_export_are_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    path = tmp_path / "onnx" / "微小.onnx.data"
    path.write_bytes(path.read_bytes() + b"\0" * 64)
    with pytest.raises(InputError, match=r"edge\.json says"):
        find.resolve(tmp_path)
    publish(tmp_path / "2", chat_template=manifest.text_digest("another"))
    with pytest.raises(InputError, match="chat template"):
        find.resolve(tmp_path / "2")


def test_a_run_without_onnx_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(InputError, match="edge export onnx"):
        find.resolve(tmp_path, "onnx")


def test_the_backend_is_chosen_by_what_there_is_and_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find.candidates(publish(tmp_path, both=True))
    assert [one.kind for one in found] == ["llamacpp", "onnx"]
    missing: set[str] = set()
    monkeypatch.setattr(
        load_plan.importlib.util, "find_spec", lambda name: None if name in missing else object()
    )

    def choose(asked: str | None = None, **speeds: Any) -> tuple[str, str]:
        one, why = load_plan.choose_backend(found, asked, lambda one: speeds.get(one.kind))
        return one.kind, why

    assert choose()[0] == "llamacpp"
    assert "edge tune RUN --backend onnx" in choose()[1]
    assert choose("onnx") == ("onnx", "asked for")
    fast, slow = (0.01, 0.02, 0.001), (0.02, 0.03, 0.001)
    kind, why = choose(onnx=fast, llamacpp=slow)
    assert (kind, why) == ("onnx", "the faster one here: llamacpp 50, onnx 100 tok/s for one stream")
    assert choose(onnx=slow, llamacpp=fast)[0] == "llamacpp"
    missing.add("llama_cpp")
    assert choose() == ("onnx", "llama_cpp is not installed")
    missing.add("onnxruntime")
    with pytest.raises(UnavailableError, match="llama_cpp"):
        choose()
    with pytest.raises(InputError, match="edge export gguf"):
        load_plan.choose_backend(found[1:], "llamacpp", lambda one: None)


def test_s12_slots_shrink_to_the_memory_and_what_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = find.resolve(publish(tmp_path))
    need = load_plan.estimate(tiny, kv_type="f16", slots=16)
    assert need.cell == 2 * 2 * (16 + 16) * 4
    memory = need.total(5 * 512 + 100)
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, memory))
    planned = load_plan.plan(tiny, Options())
    assert isinstance(planned, Settings)
    assert (planned.slots, planned.context) == (5, 512)
    with pytest.raises(InputError, match="--slots 5"):
        load_plan.plan(tiny, Options(slots=16))
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, need.total(300)))
    with pytest.raises(InputError, match="--ctx 256"):
        load_plan.plan(tiny, Options())
    with pytest.raises(UsageError, match="trained for 512"):
        load_plan.plan(tiny, Options(context=10_000_000))
    with pytest.raises(UsageError, match=r"llama\.cpp's"):
        monkeypatch.setattr(hardware, "memory", lambda: Memory(2**40, 2**40))
        load_plan.plan(tiny, Options(kv_type="q8_0"))


def test_other_devices_are_for_onnx() -> None:
    with pytest.raises(UnavailableError, match="is for ONNX"):
        load_plan.choose_device("dml")


def test_tuning_measures_threads_and_spinning_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tune, "BUDGET_S", 60.0)
    model = Model(folder / "тест.onnx")
    asked = Settings(slots=4, context=512, threads=1, device="cpu")
    first = tune_onnx.settings(model, asked)
    assert first.tuned.startswith("measured")
    found = json.loads(tune_onnx.cache(model.path, asked).read_text(encoding="utf-8"))
    assert [(row["threads"], row["spin"]) for row in found["trials"]] == [(1, True), (1, False)]
    monkeypatch.setattr(tune_onnx, "measure", lambda *_: pytest.fail("measured twice"))
    assert tune_onnx.settings(model, asked) == first
    told = tune.speed(find.resolve(folder / "тест.onnx"), asked)
    assert told == (found["chosen"]["one"], found["chosen"]["eight"], found["chosen"]["prompt"])


@pytest.mark.slow
def test_it_needs_neither_torch_nor_llama_cpp(folder: Path) -> None:
    code = """
import sys
for name in ("torch", "transformers", "peft", "llama_cpp", "onnx"):
    sys.modules[name] = None
from pathlib import Path
import edge.server.cli, edge.server.app, edge.engine.worker
from edge.backends.base import Row
from edge import planning, tune_onnx, worker
found, _ = planning.pick(Path(sys.argv[1]), None, planning.Options(device="cpu"))
load = worker.Load("onnx", str(found.path), dict(slots=2, context=64, device="cpu"))
print(worker.open_backend(load).step([Row(0, 0, [5, 6], 1)]).shape[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(tiny_onnx.VOCAB), done.stderr


def test_what_the_exported_input_is_called() -> None:
    # The name is in every file that was exported: it may not change.
    assert OUTPUT_POSITIONS == "output_positions"
