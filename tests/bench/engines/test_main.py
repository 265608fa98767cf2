"""The program that sets engines beside one another: its cases and goals, its options, and a whole run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.engines import __main__ as engines
from bench.engines import race, sides
from bench.servers import target
from edge.errors import InputError, UsageError
from tests.bench.engines.test_race import Told
from tests.bench.servers.test_target import other
from tests.support import tiny_llama


def test_the_cases_name_each_goal() -> None:
    ran: list[str] = []
    ours, bare = Told("edge", 1.0, ran), Told("bare llama.cpp loop", 1.0, ran)
    slow = Told("transformers bfloat16", 1.0, ran)
    cases = engines.cases("m.gguf", (ours, bare), engines.GPU, slow=[slow], plain=[], vocab=500)
    goals = {case.name: case.goals for case in cases}
    assert goals == {
        "m.gguf: decode, 1 stream": {bare.name: 0.95},
        "m.gguf: total, 1 stream": {slow.name: 10.0},
        "m.gguf: decode, 32 streams": {bare.name: 1.0},
        "m.gguf: total, 32 streams": {slow.name: 100.0, bare.name: 1.0},
        "m.gguf: decode, 8 streams": {bare.name: 0.95},
    }
    assert [(case.rate, dict(case.limits)) for case in cases[1:]] == [
        ("total", {}),
        ("decode", {slow.name: 1}),
        ("total", {slow.name: 1}),
        ("decode", {slow.name: 1}),
    ]
    other, plain = Told(sides.Generator.name, 1.0, ran), Told("edge without CUDA graphs", 1.0, ran)
    cases = engines.cases("m.onnx", (ours, other), engines.GPU, slow=[], plain=[plain], vocab=500)
    assert cases[0].goals == {other.name: 0.97} and cases[0].sides == [ours, other, plain]
    assert cases[-1].tokens == engines.GPU.unequal and cases[-1].goals == {other.name: 1.0}
    assert sum(engines.GPU.unequal) == pytest.approx(256 * 32, rel=0.01)
    cases = engines.cases("m.onnx", (ours, other), engines.CPU, slow=[slow], plain=[], vocab=500)
    assert [case.goals for case in cases] == [
        {other.name: 0.97},
        {slow.name: 3.5},
        {},
        {slow.name: 10.0},
        {other.name: 1.0},
    ]
    assert sum(engines.CPU.unequal) == 64 * 8


@pytest.mark.parametrize(
    "words",
    [
        ["--streams", "0"],
        ["--flash-attention", "yes"],
        ["--rounds", "0"],
        ["--peers", "bare,vllm"],
        ["--beside", "vllm"],
    ],
)
def test_odd_options_are_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        engines.main([str(tmp_path), *words])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        engines.main([str(tmp_path / "missing")])


@pytest.mark.timing
def test_a_whole_run_of_the_bare_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(race, "PAUSE_S", 0.0)
    path = tiny_llama.write(tmp_path / "小.gguf")
    words = ["--only", "bare", "--streams", "1,2", "--kv-unified", "on,off", "--rounds", "1"]
    report = tmp_path / "report-1.5B"
    small = ["--prompt", "9", "--tokens", "5", "--report", str(report)]
    assert engines.main([str(path), *words, *small]) == 0
    shown = capsys.readouterr().out
    facts = json.loads(shown.splitlines()[-1])
    assert [row["what"] for row in facts["rows"]] == [
        f"{count} streams: unified KV cache {word}, flash attention off"
        for count in (1, 2)
        for word in ("on", "off")
    ]
    assert facts["samples"]["1 streams"]["unified KV cache on, flash attention off"][0]["memory_share"] > 0
    assert "小.gguf" in facts["about"] and "小.gguf" in shown
    assert json.loads(Path(f"{report}.json").read_text(encoding="utf-8"))["rows"] == facts["rows"]
    assert "| what | measured |" in Path(f"{report}.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_our_server_beside_peers_and_again_beside_a_busy_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(race, "PAUSE_S", 0.0)
    # Another of our servers stands in for llama-server, and a line for OpenVINO.
    monkeypatch.setattr(
        engines,
        "llama_server",
        lambda path, **_: dataclasses.replace(target.ours(path, "--no-tune"), name="llama-server"),
    )
    child = (
        'import json, sys; print(\'{"version": "1"}\', flush=True)\n'
        "for line in sys.stdin:\n"
        '    print(json.dumps({"seconds": 9e9, "made": json.loads(line)["tokens"]}), flush=True)'
    )
    monkeypatch.setattr(engines, "openvino_command", lambda *_: [sys.executable, "-c", child])
    path = tiny_llama.write(tmp_path / "m.gguf")
    words = ["--only", "streams", "--streams", "1,2", "--peers", "llama-server,openvino", "--busy"]
    assert engines.main([str(path), *words, "--rounds", "1", "--tokens", "3", "--threads", "1"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["what"] for row in facts["rows"]] == [
        f"{count} streams{beside}: {side}"
        for beside in ("", ", a busy core")
        for count in (1, 2)
        for side in ("edge", "llama-server", "OpenVINO GenAI")
    ]
    goals = [row["goal"] for row in facts["rows"]]
    assert goals == ["", "1.2 x", "1.5 x", "", "1.4 x", "1.5 x"] + 2 * ["", "2 x", "1.5 x"]
    assert all(row["reached"] for row in facts["rows"] if row["what"].endswith("OpenVINO GenAI"))
    assert facts["settings"]["OpenVINO GenAI"] == {"version": "1"}


@pytest.mark.slow
def test_our_server_beside_one_that_runs_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(race, "PAUSE_S", 0.0)
    path = tiny_llama.write(tmp_path / "m.gguf")
    words = ["--only", "http", "--streams", "1,2", "--rounds", "1", "--tokens", "3", "--threads", "1"]
    with other(version="0.25.0") as (url, handler):
        assert engines.main([str(path), *words, "--beside", f"vllm={url}"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["what"] for row in facts["rows"]] == [
        f"{count} clients, 3 answers each: {side}" for count in (1, 2) for side in ("edge", "vllm")
    ]
    assert facts["rows"][1]["ratio"] and facts["settings"]["vllm"] == {"url": url, "version": "0.25.0"}
    # Whether it can be forced; then three answers for each client, in the round that warms and in the other.
    assert len(handler.bodies) == 1 + 2 * 3 * (1 + 2)
    assert all(body["ignore_eos"] and body["max_tokens"] == 3 for body in handler.bodies[1:])


class FakeGenerator:
    """Stands in for onnxruntime-genai, which reads only what its own builder wrote."""

    name = sides.Generator.name

    def __init__(self, folder: Path, threads: int) -> None:
        assert folder.is_dir() and threads == 1

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> race.Rates:
        return race.Rates(0.001, 0.001)


@pytest.mark.slow
def test_a_whole_run_of_our_engine_beside_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.support import tiny_onnx
    from tests.support.toy import make_model

    monkeypatch.setattr(race, "PAUSE_S", 0.0)
    monkeypatch.setattr(sides, "Generator", FakeGenerator)
    small = dataclasses.replace(engines.CPU, tokens=8, streams=2, unequal=(4, 12))
    monkeypatch.setattr(engines, "CPU", small)
    monkeypatch.setattr(engines, "CONTEXT", 256)
    tiny_onnx.write(tmp_path / "onnx")
    merged = make_model(tmp_path / "merged")
    words = ["--backend", "onnx", "--rounds", "1", "--threads", "1", "--merged", str(merged)]
    threads = torch.get_num_threads()
    assert engines.main([str(tmp_path / "onnx"), *words]) == 0
    torch.set_num_threads(threads)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["what"].removeprefix("tiny.onnx: "): row for row in facts["rows"]}
    assert rows["decode, 1 stream: onnxruntime-genai"]["reached"] is True
    assert rows["total, 1 stream: transformers float32"]["goal"] == "3.5 x"
    assert rows["total, 2 streams, joining and leaving: edge"]["measured"].startswith("total ")
    assert len(rows) == 2 + 3 + 2 + 3 + 3
    assert facts["settings"]["tiny.onnx"]["device"].startswith("cpu")
