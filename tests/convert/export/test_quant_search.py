"""The search for a type: what is recommended, the picture, and one real search."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from safetensors.numpy import load_file

from convert.export import calibration, gguf, imatrix, quant_search
from convert.export.quant_search import Candidate
from convert.export.source import open_source
from edge.artefact import manifest
from edge.artefact.gguf_header import read_header
from edge.errors import InputError, UsageError
from tests.convert.model.test_families import quiet
from tests.support.families import make_family


def candidate(quant: str, decode: float, kl: float, *, rounding: str = "", top1: float = 0.95) -> Candidate:
    return Candidate(quant, rounding, 100_000_000, 400.0, decode, kl, 5 * kl, top1)


def test_the_quickest_that_is_close_enough() -> None:
    candidates = [
        candidate("Q8_0", 60, 0.001),
        candidate("Q4_K_M", 80, 0.04),
        candidate("Q4_0", 110, 0.3, top1=0.8),
    ]
    best, reason = quant_search.recommend(candidates)
    assert best.quant == "Q4_K_M" and "Q4_0 would be" in reason and "KL 0.3" in reason
    # The matrix buys the fast type its quality back.
    best, reason = quant_search.recommend([*candidates, candidate("Q4_0", 109, 0.05, rounding="matrix")])
    assert best.name == "Q4_0 + matrix" and "would be" not in reason


def test_among_equally_quick_ones_the_closest() -> None:
    best, _ = quant_search.recommend([candidate("Q4_K_M", 81, 0.04), candidate("Q6_K", 80, 0.006)])
    assert best.quant == "Q6_K"


def test_where_none_is_close_the_closest() -> None:
    best, reason = quant_search.recommend([candidate("Q4_0", 90, 0.4), candidate("Q4_K_M", 50, 0.2)])
    assert best.quant == "Q4_K_M" and reason.startswith("none keeps within a mean KL of 0.06")


def test_the_picture_is_one_valid_file() -> None:
    candidates = [
        candidate("Q8_0", 60, 0.001),
        candidate("Q4_0", 110, 0.3, rounding="matrix"),
        candidate("F16", 30, 0.0),
    ]
    root = ElementTree.fromstring(quant_search.picture(candidates, candidates[0], "贝壳 <&>"))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 3 and "贝壳 <&>" in "".join(root.itertext())
    assert float(circles[1].get("cx", 0)) > float(circles[0].get("cx", 0))  # faster lies to the right
    assert float(circles[1].get("cy", 0)) < float(circles[0].get("cy", 0))  # further lies higher


def test_the_table_names_the_factor() -> None:
    candidates = [candidate("Q4_0", 110, 0.3), candidate("Q4_0", 110, 0.1, rounding="gptq")]
    candidates.append(candidate("Q4_0", 110, 0.6, rounding="matrix"))
    console = Console(file=io.StringIO(), width=200)
    console.print(quant_search.table(candidates, candidates[1]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "recommended; KL 3.00 times smaller" in text and "KL 2.00 times larger" in text


@pytest.mark.slow
def test_whole_types_have_no_matrix(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    with pytest.raises(UsageError, match="F16 is not quantised"):
        gguf.run(base, quant="F16", imatrix=True, console=quiet())


@pytest.mark.matrix
@pytest.mark.slow
def test_a_real_search(
    tmp_path: Path,
    converted_toy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = shutil.copytree(converted_toy, tmp_path / "run")
    origin = open_source(run / "merged")
    [first] = run.glob(".gguf-first/F16-*.gguf")
    facts = imatrix.gather(origin, first, tmp_path / "m.safetensors")
    matrix = load_file(tmp_path / "m.safetensors")
    header = read_header(first)
    # Every linear layer of both blocks, each with a value for each input column.
    assert len(matrix) == 14 and facts["from"] == "36 rows" and facts["tokens"] > 36
    assert all(value.shape == (header.tensors[name].shape[0],) for name, value in matrix.items())
    assert all((value >= 0).all() and value.max() > 0 for value in matrix.values())
    monkeypatch.setattr(quant_search, "TYPES", ("Q8_0", "Q4_0"))
    monkeypatch.setattr(quant_search, "WITH_MATRIX", ("Q4_0",))
    monkeypatch.setattr(quant_search, "WITH_GPTQ", ("Q4_0",))
    path = quant_search.run(run, console=quiet())
    record = json.loads((path.parent / "ladder.json").read_text(encoding="utf-8"))
    assert [(one["quant"], one["rounding"]) for one in record["rungs"]] == [
        ("Q8_0", ""), ("Q4_0", ""), ("Q4_0", "matrix"), ("Q4_0", "gptq")
    ]  # fmt: skip
    by = {(one["quant"], one["rounding"]): one for one in record["rungs"]}
    assert by["Q8_0", ""]["kl"] < by["Q4_0", ""]["kl"] and by["Q8_0", ""]["size"] > by["Q4_0", ""]["size"]
    assert by["Q4_0", "gptq"]["kl"] < by["Q4_0", ""]["kl"]
    assert by["Q4_0", "gptq"]["size"] == by["Q4_0", ""]["size"]
    assert all(one["decode"] > 0 and one["prompt"] > 0 for one in record["rungs"])
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "edge.json",
        "ladder.json",
        "ladder.svg",
        path.name,
    ]
    assert manifest.read(path.parent).settings["ladder"]["chosen"] == record["chosen"]


@pytest.mark.slow
def test_a_matrix_needs_a_data_set(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    with pytest.raises(InputError, match="measuring needs rows of the data set: no adapter with a data set"):
        calibration.rows(base, None)
