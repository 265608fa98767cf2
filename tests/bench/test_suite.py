"""Workloads, open loop, goodput, the memory's ceiling, charts, the page, and comparing two reports."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import rate_sweep
from bench.measure import metrics, roofline, workloads
from bench.measure.load import Ours, open_loop
from bench.measure.metrics import Objective, Sample
from bench.measure.workloads import Plan
from bench.report import compare, html
from bench.rounds import Measured, Round
from bench.servers.target import Target
from edge.artefact.gguf_header import read_header
from edge.errors import InputError
from tests.support import tiny_llama
from tests.support.mock_server import Mock, serving
from tests.support.reports import build


@pytest.mark.parametrize("name", list(workloads.WORKLOADS))
def test_workloads_repeat_by_seed_and_differ_between_rounds(name: str) -> None:
    workload = workloads.WORKLOADS[name]
    jobs = workload.jobs(4, 8, seed=1)
    assert jobs == workload.jobs(4, 8, seed=1) != workload.jobs(4, 8, seed=2)
    assert {(job.tokens, job.reuse, job.speculate) for job in jobs} == {
        (8, workload.reuse, workload.speculate)
    }
    assert len({job.prompt for job in jobs}) == len(jobs) == len({job.index for job in jobs})
    later = workload.jobs(4, 8, seed=1, first=1000)
    assert not {job.prompt for job in jobs} & {job.prompt for job in later}


def test_what_workloads_are_about() -> None:
    chat = workloads.WORKLOADS["chat"].jobs(2, 8, seed=1)
    assert len(chat) == 2 * workloads.TURNS
    assert chat[2].prompt.startswith(chat[0].prompt) and chat[5].prompt.startswith(chat[3].prompt)
    assert not chat[1].prompt.startswith(chat[0].prompt[:5])
    shared = workloads.WORKLOADS["shared"].jobs(2, 8, seed=1)
    assert shared[0].prompt[:1500] == shared[1].prompt[:1500]
    assert workloads.WORKLOADS["chinese"].jobs(1, 8, seed=1)[0].prompt[6:].count(" ") == 0
    edit = workloads.WORKLOADS["edit"].jobs(1, 8, seed=1)[0].prompt.split("\n")
    assert edit[1] == edit[2]


@pytest.mark.slow
def test_the_open_loop_sends_whether_or_not_answers_have_come() -> None:
    mock = Mock(first=0.25, gap=0.0)

    async def run() -> list[Sample]:
        async with serving(mock) as url:
            jobs = workloads.make(12, 2, seed=1)
            return await open_loop(url, Ours(), jobs, 200.0, seed=3)

    samples = asyncio.run(run())
    assert [s.prompt for s in samples] == list(range(12)) and {s.state for s in samples} == {"ok"}
    starts = [s.start for s in samples]
    # All were sent long before the first answer came.
    assert starts == sorted(starts) and starts[-1] - starts[0] < 0.25
    assert all(s.end - s.start >= 0.25 for s in samples)


def test_goodput_counts_what_met_the_objective() -> None:
    def answer(first: float, gap: float, error: str = "") -> Sample:
        events = [(first, 1), (first + gap, 1)]
        return Sample(0, 0, 2, 0.0, 2.0, events, 5, 2, "length", 200, error)

    samples = [answer(0.5, 0.1), answer(1.5, 0.1), answer(0.5, 0.3), answer(0.5, 0.1, "gone")]
    assert metrics.goodput(samples, Objective(1.0, 0.2)) == (0.5, 0.25)
    assert metrics.goodput(samples, Objective(2.0, 0.5))[1] == 0.75


@pytest.mark.timing
@pytest.mark.slow
def test_the_sweep_ends_where_the_objective_breaks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.mock_server", "0.2", "0.01", "{port}"]
    target = Target(
        "edge", command, Ours(), "/ready", "/info", {"PYTHONPATH": str(Path(__file__).parents[2])}
    )
    easy = rate_sweep.sweep(
        target, tmp_path / "log", tokens=3, start=20.0, objective=Objective(5.0, 5.0), seconds=0.3
    )
    # A mock that answers everybody at once never breaks: the steps are bounded, each half as fast again.
    assert [step["rate"] for step in easy] == pytest.approx(
        [20.0 * 1.5**n for n in range(rate_sweep.MOST_STEPS)]
    )
    assert all(step["share"] == 1.0 and step["goodput"] > 1.0 for step in easy)
    hard = rate_sweep.sweep(
        target, tmp_path / "log", tokens=3, start=20.0, objective=Objective(0.1, 5.0), seconds=0.3
    )
    assert [(step["share"], step["goodput"]) for step in hard] == [(0.0, 0.0)]


def test_bandwidth_is_of_this_world() -> None:
    found = roofline.bandwidth(2**24, 2, seconds=0.05)
    assert found.size == 2**24 and found.threads == 2
    assert 1e8 < found.median <= found.best < 1e13


def test_bytes_per_token_count_each_weight_once(tmp_path: Path) -> None:
    header = read_header(tiny_llama.write(tmp_path / "m.gguf"))
    whole = header.weights_bytes
    heads = header.head_count_kv * (header.key_length + header.value_length)
    kv = header.block_count * heads * 2
    table = header.tensors["token_embd.weight"].bytes
    unread = table if "output.weight" in header.tensors else 0
    assert roofline.of_gguf(header).per_token(0) == whole - unread
    assert roofline.of_gguf(header).per_token(100) == whole - unread + 100 * kv
    found = roofline.Bandwidth(1e10, 9e9, 1, 2)
    assert roofline.ceiling(found, 10**8) == pytest.approx(100.0)
    assert roofline.context_of([80, 100], 64) == 122.0


def test_a_round_is_held_against_the_memory_of_its_own_time() -> None:
    """Half the bandwidth and half the speed are the same share; many clients, and no reading, say nothing."""
    footprint = roofline.Footprint(10**8, 0.0)
    target = Target("edge", ["x"], Ours(), "/ready", "/info")

    def round_of(pace: float, best: float, clients: int = 1) -> Round:
        events = [(1.0, 1), (1.0 + 3 * pace, 3)]
        samples = [Sample(c, c, 4, 0.0, 2.0, events, 7, 4, "length", 200) for c in range(clients)]
        return Round(samples, [], 0, 0.0, memory=roofline.Bandwidth(best, best, 1, 2) if best else None)

    def share(*rounds: Round, gpu: roofline.Bandwidth | None = None, **about: str) -> float | None:
        part = Measured(target, about=about, rounds={("mixed", 1): list(rounds)})
        made = build([part], gpu=gpu, footprints={"edge": footprint})
        found = made["cases"][0]["targets"]["edge"]["ceiling"]
        return found and found["share"]

    assert share(round_of(0.02, 1e10), round_of(0.04, 5e9)) == pytest.approx(0.5)
    assert share(round_of(0.02, 1e10), round_of(0.02, 2e10), round_of(0.02, 2e10)) == pytest.approx(0.25)
    # All pieces at one blow: four tokens in the two seconds of the whole answer.
    assert share(round_of(0.0, 1e10)) == pytest.approx(0.02)
    assert share(round_of(0.02, 0.0)) is None and share(round_of(0.02, 1e10, clients=2)) is None
    gpu = roofline.Bandwidth(1e12, 1e12, 1, 0)
    assert share(round_of(0.001, 0.0), gpu=gpu, device="cuda: a GPU") == pytest.approx(0.1)


def test_bytes_of_a_transformers_folder_follow_its_dtype(tmp_path: Path) -> None:
    header = read_header(tiny_llama.write(tmp_path / "m.gguf"))
    shapes = {"model.embed_tokens.weight": [100, 8], "lm_head.weight": [100, 8], "model.norm.weight": [8]}
    said = {name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 1]} for name, shape in shapes.items()}
    head = json.dumps({"__metadata__": {"format": "pt"}, **said}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}', encoding="utf-8")
    cell = roofline.of_gguf(header).cell
    assert roofline.of_merged(tmp_path, header, 4) == roofline.Footprint(4 * 808, 2 * cell)
    assert roofline.of_merged(tmp_path, header, 2) == roofline.Footprint(2 * 808, cell)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}', encoding="utf-8")
    assert roofline.of_merged(tmp_path, header, 2).weights == 2 * 1608


def test_bytes_of_an_onnx_graph_leave_out_tables_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from edge.artefact.onnx_header import read_onnx
    from tests.support import tiny_onnx as tiny

    header = read_onnx(tiny.write(tmp_path))
    found = roofline.of_onnx(header)
    assert found is not None
    per_layer = tiny.WIDTH * (tiny.HEADS + 2 * tiny.KV_HEADS) * tiny.HEAD + tiny.WIDTH * tiny.WIDTH
    per_layer += 2 * tiny.WIDTH * tiny.FEED + 2 * tiny.WIDTH
    wanted = 4 * (tiny.LAYERS * per_layer + tiny.WIDTH + tiny.WIDTH * tiny.VOCAB)
    # And a few numbers of eight bytes.
    assert wanted <= found.weights < wanted + 64
    assert found.cell == tiny.LAYERS * tiny.KV_HEADS * 2 * tiny.HEAD * 4


STAGES = {"baseline": "merged", "edge": "gguf"}
LOST = {"kl": 0.023, "kl_p99": 0.2, "top1": 0.966, "positions": 500}


def made_report(*, scale: float = 1.0, rounds: int = 5) -> dict[str, Any]:
    """Two targets, two numbers of clients; edge answers in 0.1 s, times `scale`, with a little spread."""

    def measured(name: str, seconds: float) -> Measured:
        def sample(client: int, number: int) -> Sample:
            end = seconds * (1 + 0.01 * number)
            return Sample(client, client, 4, 0.0, end, [(end / 2, 1), (end, 3)], 7, 4, "length", 200)

        cases = {
            ("mixed", n): [
                Round([sample(c, k) for c in range(n)], [0.01], 0, 0.0, 0.1) for k in range(rounds)
            ]
            for n in (1, 4)
        }
        target = Target(name, ["x", "y"], Ours(), "/ready", "/info", stage=STAGES[name])
        return Measured(
            target,
            answers_s=0.5,
            load_s=1.0,
            memory_peak=2**21,
            memory_steady=2**20,
            about={"dtype": "float32"},
            rounds=cases,
        )

    return build(
        [measured("baseline", 1.0), measured("edge", 0.1 * scale)],
        plan=Plan(tokens=4, clients=(1, 4)),
        quality={"baseline": {"reference": True}, "edge": LOST},
        sweeps={"edge": [{"rate": 1.0, "goodput": 0.9, "share": 0.9}], "baseline": []},
    )


def test_the_page_stands_alone() -> None:
    text = html.page(made_report())
    assert text.startswith("<!doctype html>") and "贝壳 &lt;x&gt;" in text and "<x>" not in text
    assert not re.search(r"(src|href)=|<script|@import|url\(", text)
    assert text.count("<svg") == len(html.pictures(made_report())) == 5
    assert "(10.0 x" in text


@pytest.mark.slow
def test_compare_tells_change_from_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, slower = compare.compare(made_report(), made_report()), made_report(scale=1.5)
    assert {row["verdict"] for row in same} == {"within noise"}
    rows = compare.compare(made_report(), slower)
    verdicts = {(row["target"], row["figure"]): row["verdict"] for row in rows}
    assert verdicts["edge", "whole answer"] == verdicts["edge", "tokens/s of a round"] == "WORSE"
    assert verdicts["baseline", "whole answer"] == "within noise"
    better = compare.judge([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], more_is_better=False)
    assert better["verdict"] == "better" and better["low"] < better["ratio"] < better["high"]
    assert compare.judge([1.0], [2.0], more_is_better=True)["verdict"] == "too few rounds"
    for name, made in (("a", made_report()), ("b", slower)):
        (tmp_path / f"{name}.json").write_text(json.dumps(made), encoding="utf-8")
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    shown = capsys.readouterr().out
    assert "WORSE" in shown and json.loads(shown.splitlines()[-1])["rows"]


def test_compare_says_what_else_differs_and_refuses_what_is_no_report(tmp_path: Path) -> None:
    other = copy.deepcopy(made_report())
    other["machine"]["cpu"] = "another"
    other["settings"]["tokens"] = 9
    said = compare.differences(made_report(), other)
    assert len(said) == 2 and "another machine" in said[0] and "4 before, 9 after" in said[1]
    for text in ("no json", "[]", '{"kind": "bench", "schema": 1}'):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"x\.json"):
            compare.read(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot be read"):
        compare.read(tmp_path / "missing.json")
