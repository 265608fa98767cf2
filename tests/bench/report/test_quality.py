"""The benchmark's quality column: figures of the comparison in edge.json, in both of its shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report.quality import of_stage, of_target
from bench.servers.target import Target, baseline, genai, ours
from edge.artefact import manifest


def stage(run_folder: Path, name: str, **verify: Any) -> None:
    folder = run_folder / name
    folder.mkdir(parents=True)
    (folder / "weights").write_text(name)
    manifest.write(folder, manifest.Manifest(name, "x", verify=verify))


def test_quality_comes_from_what_the_comparison_wrote(tmp_path: Path) -> None:
    logits = {"positions": 690, "kl_mean": 0.034, "kl_p99": 0.4, "top1": 0.956}
    logits |= {"perplexity": [1.598, 1.626], "rows": "24 training rows"}
    stage(tmp_path, "merged")
    stage(tmp_path, "gguf", logits=logits)
    stage(tmp_path, "onnx", logits=logits | {"kl_mean": 0.0012, "kl_p99": 0.02, "top1": 1.0})
    found = of_stage(tmp_path, "gguf")
    assert (found["kl"], found["top1"], found["perplexity"]) == (0.034, 0.956, 1.626)
    found = of_stage(tmp_path, "onnx")
    assert found == {
        "kl": 0.0012,
        "kl_p99": 0.02,
        "top1": 1.0,
        "positions": 690,
        "perplexity": 1.626,
        "rows": "24 training rows",
    }
    slow = of_target(tmp_path, baseline(tmp_path / "merged", "float32"))
    assert slow == {"reference": True, "perplexity": 1.598, "rows": "24 training rows"}
    assert "bfloat16" in of_target(tmp_path, baseline(tmp_path / "merged", "bfloat16"))["unmeasured"]
    assert of_target(tmp_path, genai(tmp_path / "onnx"))["kl"] == 0.0012
    assert of_target(tmp_path, Target("x", [], ours(tmp_path).dialect, "/", "/", stage="")) == {}


def test_quality_that_is_missing_names_its_command(tmp_path: Path) -> None:
    stage(tmp_path, "merged")
    stage(tmp_path, "gguf", chat_template="equal")
    found = of_stage(tmp_path, "gguf")
    assert found == {"missing": f"edge verify {tmp_path / 'merged'} {tmp_path / 'gguf'}"}
    stage(tmp_path, "onnx", quality="onnxruntime cannot load it")
    assert of_stage(tmp_path, "onnx")["missing"].endswith(f"{tmp_path / 'onnx'}")
    assert of_stage(tmp_path, "merged") == {"reference": True}


def test_an_onnx_export_of_an_earlier_version_shows_its_figures(tmp_path: Path) -> None:
    old = {"positions": 188, "kl": 0.0012, "top1": 1.0, "kl_max": 0.1, "difference": 0.5, "poor": False}
    stage(tmp_path, "onnx", chat_template="equal", quality=old)
    assert of_target(tmp_path, genai(tmp_path / "onnx")) == {"kl": 0.0012, "top1": 1.0, "positions": 188}
    # Compared again since: the newer figures count.
    logits = {"positions": 690, "kl_mean": 0.002, "kl_p99": 0.02, "top1": 0.98}
    stage(tmp_path / "again", "onnx", quality=old, logits=logits)
    assert of_stage(tmp_path / "again", "onnx")["kl"] == 0.002
