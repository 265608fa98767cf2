"""Serving an ONNX model: which files are refused, and what serving it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("tokenizers")


from edge.artefact import find, manifest
from edge.artefact.onnx_header import OUTPUT_POSITIONS
from edge.errors import InputError
from tests.support import tiny_onnx
from tests.support.tiny_onnx import publish


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx.write(tmp_path_factory.mktemp("模型 目录"), name="тест.onnx").parent


def test_run_folder_and_file_are_the_same_artefact(tmp_path: Path) -> None:
    publish(tmp_path)
    by_run = find.resolve(tmp_path)
    assert by_run == find.resolve(tmp_path / "onnx") == find.resolve(tmp_path / "onnx" / tiny_onnx.FILE)
    assert (by_run.kind, by_run.name, by_run.stop_ids) == ("onnx", "微小", frozenset({tiny_onnx.END}))
    assert by_run.digest == manifest.read(tmp_path / "onnx").digest


def test_files_that_were_changed_after_the_export_are_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    path = tmp_path / "onnx" / f"{tiny_onnx.FILE}.data"
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


@pytest.mark.slow
def test_it_needs_neither_torch_nor_llama_cpp(folder: Path) -> None:
    code = """
import sys
for name in ("torch", "transformers", "peft", "llama_cpp", "onnx"):
    sys.modules[name] = None
from pathlib import Path
import edge.server.launch, edge.server.model_plans
from edge.backends.base import Row
from edge.engine import worker
from edge.loading import load_plan
found, _ = load_plan.pick(Path(sys.argv[1]), None, load_plan.Options(device="cpu"))
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
