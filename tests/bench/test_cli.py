"""Targets that start, hang, die and leave children behind; and a whole measurement of two mock servers."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from bench import demo
from bench.cli import main
from bench.measure import workloads
from bench.measure.load import Baseline, Ours
from bench.measure.metrics import Sample
from bench.measure.process_probe import MemoryWatch, Noise, noise, tree_cpu, tree_memory
from bench.measure.progress import View
from bench.measure.workloads import Job, Plan, counts
from bench.report import build as report
from bench.report import html, table, update_readme
from bench.rounds import Measured, Round, measure, schedule
from bench.servers.target import Target, started, stop
from bench.side_by_side import check_same_model
from edge.artefact import manifest
from edge.errors import EdgeError, InputError, UnavailableError, UsageError
from edge.machine.hardware import free_port
from tests.support.reports import build

# Seconds of training or of other processes: left out of the quick part.
pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
FAST = Plan(tokens=6, clients=(1, 2), rounds=2, budget_s=10.0)


def mock(name: str, dialect: Any, *, first: float, gap: float, cut: int = 0) -> Target:
    command = [sys.executable, "-m", "tests.support.mock_server", str(first), str(gap), "{port}", str(cut)]
    return Target(name, command, dialect, "/ready", "/info", {"PYTHONPATH": str(Path(__file__).parents[2])})


def script(code: str) -> Target:
    return Target("odd", [sys.executable, "-c", code, "{port}"], Ours(), "/ready", "/info")


@pytest.fixture(scope="module", autouse=True)
def _no_pause() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.rounds.PAUSE_S", 0.0)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    pair = (
        mock("baseline", Baseline(), first=0.05, gap=0.02),
        mock("edge", Ours(), first=0.02, gap=0.004),
    )
    return measure(
        pair,
        FAST,
        tmp_path_factory.mktemp("logs 日志"),
        together=True,
        view=View(QUIET),
        probed={"edge": 2**24},
    )[0]


def built(measured: list[Measured], **more: Any) -> dict[str, Any]:
    noise = (Noise(0.0, 0.01), Noise(0.0, 0.02))
    given: dict[str, Any] = {"plan": FAST, "asked_tokens": FAST.tokens, "noise": noise, "seconds": 12.0}
    return build(measured, **given | more)


def test_a_target_that_ends_early_shows_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('loading 模型'); sys.exit('the weights are missing')"
    with (
        pytest.raises(EdgeError, match=r"'odd' ended with code 1") as caught,
        started(script(code), tmp_path / "log"),
    ):
        pass
    assert "the weights are missing" in caught.value.hint and "模型" in caught.value.hint


def test_a_target_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with (
        pytest.raises(EdgeError, match=r"not ready after 0\.5 s"),
        started(script(code), tmp_path / "log", limit=0.5),
    ):
        pass
    assert not psutil.pid_exists(int((tmp_path / "log").read_text()))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_stop_ends_grandchildren_that_will_not(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {stubborn!r}]); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    grandchild = psutil.Process(int(process.stdout.readline()))
    stop(process, grace=2.0)
    stop(process)
    process.stdout.close()
    assert process.returncode is not None
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("moment", ["loading", "ready"])
def test_a_target_ends_with_the_one_that_measures(tmp_path: Path, moment: str) -> None:
    serve = (
        "import http.server, os, sys; print(os.getpid(), flush=True); "
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), http.server.SimpleHTTPRequestHandler)"
        ".serve_forever()"
        if moment == "ready"
        else "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    )
    measures = (
        "import sys, time; from pathlib import Path; from bench.measure.load import Ours; "
        "from bench.servers.target import Target, started\n"
        f"target = Target('x', [sys.executable, '-c', {serve!r}, '{{port}}'], Ours(), '/', '/')\n"
        "with started(target, Path('log')):\n    print('ready', flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", measures],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env=env,
    )
    with process:
        assert process.stdout is not None
        if moment == "ready":
            assert process.stdout.readline() == b"ready\n"
        until, log = time.monotonic() + 20, tmp_path / "log"
        while not log.is_file() or not log.read_text().endswith("\n"):
            assert time.monotonic() < until
            time.sleep(0.02)
        target = int(log.read_text().split()[0])
        process.terminate()
        assert process.wait(20) != 0
    assert not psutil.pid_exists(target)


def test_free_ports_are_free() -> None:
    assert 0 < free_port() < 65536


def test_memory_and_time_of_a_tree_count_its_children() -> None:
    child = "x = b'x' * 50_000_000; print('ready', flush=True); input()"
    code = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}], "
        "stdin=sys.stdin, stdout=sys.stdout); p.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    process.stdout.readline()
    with MemoryWatch(process.pid, interval=0.05) as watch:
        time.sleep(0.3)
    used = tree_memory(process.pid)
    assert 50_000_000 < used < 150_000_000
    assert 50_000_000 < watch.steady(0.0) <= watch.peak < 150_000_000
    assert watch.steady(time.perf_counter()) == 0
    assert 0.0 < tree_cpu(process.pid) < 5.0
    process.communicate(b"\n")
    assert tree_memory(process.pid) == 0


def test_noise() -> None:
    found = noise(0.1)
    assert 0.0 <= found.busy <= 1.0 and found.jitter > 0.0
    assert Noise(0.02, 0.05).warning == ""
    assert "50%" in Noise(0.5, 0.05).warning and "80%" in Noise(0.0, 0.8).warning


def test_prompts_differ_from_their_beginning_and_repeat_by_seed() -> None:
    jobs = workloads.make(200, 8, seed=1)
    assert jobs == workloads.make(200, 8, seed=1) != workloads.make(200, 8, seed=2)
    assert jobs[5:7] == workloads.make(2, 8, seed=1, first=5)
    assert len({job.prompt for job in jobs}) == 200
    assert len({job.prompt[:5] for job in jobs}) > 190


def test_the_schedule_fits_the_budget_and_has_at_least_one_round() -> None:
    plan = Plan(tokens=64, clients=(1, 8), rounds=5, budget_s=100.0)
    assert schedule(plan, [1000.0, 2000.0]) == (plan, {("mixed", 1): 5, ("mixed", 8): 5})
    # 8 answers of 64 tokens and a fifth more: 31 s at 20 tokens/s; two such targets twice that.
    assert schedule(plan, [20.0]) == (plan, {("mixed", 1): 5, ("mixed", 8): 1})
    assert schedule(plan, [40.0, 40.0]) == (plan, {("mixed", 1): 5, ("mixed", 8): 1})
    two = Plan(tokens=64, clients=(1,), workloads=("mixed", "chat"), rounds=9, budget_s=30.0)
    assert schedule(two, [64.0]) == (two, {("mixed", 1): 6, ("chat", 1): 6})


def test_answers_are_shortened_where_one_round_does_not_fit_unless_their_number_was_given() -> None:
    plan = Plan(tokens=64, clients=(1, 8), rounds=5, budget_s=100.0)
    kept, rounds = schedule(plan, [4.0])
    # 9 answers of 64 tokens at 4 tokens/s and a fifth more are 173 s; of 32 they are 88 s.
    assert (kept.tokens, rounds) == (32, {("mixed", 1): 4, ("mixed", 8): 1})
    assert schedule(plan, [0.1])[0].tokens == 16
    fixed = Plan(tokens=64, least=64, clients=(1, 8), budget_s=100.0)
    assert schedule(fixed, [4.0])[0].tokens == 64
    assert any("from 64 to 32" in text for text in built(_pair(), plan=kept, asked_tokens=64)["warnings"])


def _pair() -> list[Measured]:
    some = {("mixed", n): [Round([whole(0)], [0.01], 0, 0.0)] for n in (1, 8)}
    return [
        Measured(mock("baseline", Baseline(), first=0, gap=0), rounds=some),
        Measured(mock("edge", Ours(), first=0, gap=0), rounds=some),
    ]


@pytest.mark.timing
def test_a_whole_measurement(measured: list[Measured]) -> None:
    slow, fast = measured
    assert list(slow.rounds) == list(fast.rounds) == [("mixed", 1), ("mixed", 2)]
    assert [len(part.rounds["mixed", 2][0].samples) for part in measured] == [2, 2]
    asked = [[s.prompt for s in part.rounds["mixed", 1][0].samples] for part in measured]
    assert asked[0] == asked[1]
    assert slow.memory_steady > 2**20 and slow.load_s > 0
    case = built(measured)["cases"][0]
    better = case["against"]["edge"]
    assert better["comparable"] and case["rounds"] == 2
    # 0.05 + 6 x 0.02 = 0.17 s against 0.02 + 5 x 0.004 = 0.04 s.
    assert better["ratios"]["e2e_s"]["value"] == pytest.approx(4.2, rel=0.35)
    assert better["ratios"]["ttft_s"]["value"] == pytest.approx(8.5, rel=0.5)
    assert case["targets"]["baseline"]["e2e_s"]["p50"] == pytest.approx(0.17, rel=0.2)
    # Two clients of a server that answers one after the other: the second waits for the first.
    assert built(measured)["cases"][1]["targets"]["baseline"]["e2e_s"]["max"] == pytest.approx(0.34, rel=0.3)
    read = {part.target.name: part.rounds["mixed", 1][0].memory for part in measured}
    assert read["baseline"] is None and read["edge"] is not None and read["edge"].size == 2**24
    assert all(one.memory is None for one in measured[1].rounds["mixed", 2])


def test_the_blocked_server_shows_in_its_health(measured: list[Measured]) -> None:
    slow, fast = (part["health_s"]["max"] for part in built(measured)["cases"][1]["targets"].values())
    assert slow > 0.1 and slow > 2 * fast


def test_targets_in_turn_ask_the_same_prompts(tmp_path: Path) -> None:
    pair = (mock("baseline", Baseline(), first=0.0, gap=0.001), mock("edge", Ours(), first=0.0, gap=0.001))
    plan = Plan(tokens=3, clients=(2,), rounds=1)
    (slow, fast), kept = measure(pair, plan, tmp_path, together=False, view=View(QUIET), probed={})
    prompts_ = [sorted(s.prompt for s in part.rounds["mixed", 2][0].samples) for part in (slow, fast)]
    assert prompts_[0] == prompts_[1] and len(prompts_[0]) == 2
    made = built([slow, fast], plan=kept, together=False)
    assert any("one after the other" in text for text in made["warnings"])


def test_a_target_that_stops_early_is_refused_at_the_warm_up(tmp_path: Path) -> None:
    pair = (mock("baseline", Baseline(), first=0.0, gap=0.0), mock("edge", Ours(), first=0.0, gap=0.0, cut=3))
    with pytest.raises(EdgeError, match="'edge' did not give a whole answer: 3 tokens instead of 16"):
        measure(pair, FAST, tmp_path, together=True, view=View(QUIET), probed={})


def whole(prompt: int, read: int = 7, *, got: int = 6, error: str = "") -> Sample:
    return Sample(0, prompt, 6, 0.0, 1.0, [(1.0, got)], read, got, "length", 200, error)


def rounds(*samples: Sample) -> dict[tuple[str, int], list[Round]]:
    return {("mixed", 1): [Round(list(samples), [0.01], 0, 0.0)]}


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        (whole(0, got=4), "edge did not finish prompt 0: 4 of 6 tokens"),
        (whole(0, error="HTTP 503"), "edge did not finish prompt 0: HTTP 503"),
        (whole(0, read=8), r"counted \(7, 6\) and \(8, 6\)"),
        (whole(1), r"counted \(7, 6\) and None"),
    ],
)
def test_different_work_is_not_compared(theirs: Sample, why: str) -> None:
    pair = [
        Measured(mock("baseline", Baseline(), first=0, gap=0), rounds=rounds(whole(0))),
        Measured(mock("edge", Ours(), first=0, gap=0), rounds=rounds(theirs)),
    ]
    made = built(pair, plan=Plan(clients=(1,)))
    against = made["cases"][0]["against"]["edge"]
    assert not against["comparable"] and re.search(why, against["why"])
    assert set(against["ratios"].values()) == {None}
    assert "not compared" in table.block(made) and against["why"] in table.markdown(made)


def test_report_files_table_and_last_line(measured: list[Measured], tmp_path: Path) -> None:
    made = built(measured, noise=(Noise(0.4, 0.0), Noise(0.0, 0.0)))
    table.write(made, html.page(made), tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert kept["schema"] == 4 and kept["machine"]["threads"] >= 1
    assert len(kept["cases"][1]["targets"]["edge"]["samples"][0]) == 2
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "40%" in text and "| **2 clients** |" in text and "`edge bench runs/x`" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    console = Console(width=80, record=True, file=(tmp_path / "shown").open("w", encoding="utf-8"))
    table.show(made, console)
    console.file.close()
    shown = console.export_text()
    assert "output tokens/s" in shown and "40%" in shown
    assert report.headline(made)["cases"][0]["against"]["edge"]["comparable"] is True
    json.dumps(report.headline(made))


def test_a_report_says_commands_without_this_machine_s_paths(tmp_path: Path) -> None:
    word = str(tmp_path / "模型.gguf")
    given = {"command": ["llama-server", "--model", word], "template": "{% if x %}\n/a{% endif %}", "n": 1}
    kept = {**given, "command": ["llama-server", "--model", "模型.gguf"]}
    assert report.shown(given) == kept


def test_readme_block(measured: list[Measured], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write(built(measured), "", tmp_path)
    target = tmp_path / "README.md"
    target.write_text("# 标题\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nrest\n", encoding="utf-8")
    for _ in range(2):
        argv = [str(tmp_path / "report.json"), str(target), "--pictures", str(tmp_path / "pictures")]
        assert update_readme.main(argv) == 0
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["first.svg", "load.svg", "throughput.svg", "trade.svg"]
    assert "<svg" in (tmp_path / "pictures" / "first.svg").read_text(encoding="utf-8")
    text = target.read_text(encoding="utf-8")
    assert text.startswith("# 标题\n<!-- bench:begin -->\n| |") and text.endswith(
        "<!-- bench:end -->\nrest\n"
    )
    assert "old" not in text and text.count("**1 client**") == 1
    target.write_text("no marks", encoding="utf-8")
    with pytest.raises(InputError, match="bench:begin"):
        update_readme.main([str(tmp_path / "report.json"), str(target)])
    (tmp_path / "report.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="not a report"):
        update_readme.main([str(tmp_path / "report.json"), str(target)])


@pytest.mark.parametrize("text", ["", "0", "1,", "-1", "1.5", "٣"])
def test_numbers_of_clients(text: str) -> None:
    with pytest.raises(UsageError, match="list of positive whole numbers"):
        counts(text)


def test_bad_arguments(tmp_path: Path) -> None:
    assert counts("1, 8") == [1, 8]
    odd = (
        ["--tokens", "1"],
        ["--clients", "x"],
        ["--clients", "300"],
        ["--targets", "x"],
        ["--workloads", ""],
    )
    for argv in odd:
        with pytest.raises(UsageError):
            main([str(tmp_path), *argv])
    with pytest.raises(InputError, match="no such"):
        main([str(tmp_path / "missing")])


def test_a_gguf_of_another_model_is_refused(tmp_path: Path) -> None:
    for stage in ("merged", "gguf"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "weights").write_text(stage)
    merged = manifest.write(tmp_path / "merged", manifest.Manifest("merged", "x"))
    child = manifest.Manifest("gguf", "x", parents=[merged.parent(tmp_path / "merged")])
    manifest.write(tmp_path / "gguf", child)
    check_same_model(tmp_path)
    (tmp_path / "merged" / "weights").write_text("trained again")
    manifest.write(tmp_path / "merged", manifest.Manifest("merged", "x"))
    with pytest.raises(InputError, match="was not made from"):
        check_same_model(tmp_path)


def adapter(folder: Path, **settings: Any) -> Path:
    (folder / "adapter").mkdir(parents=True)
    manifest.write(folder / "adapter", manifest.Manifest("adapter", "x", settings=settings))
    return folder


def test_demo_finds_the_base_and_the_questions(tmp_path: Path) -> None:
    model = tmp_path / "models" / "小 模型"
    model.mkdir(parents=True)
    run = adapter(
        tmp_path / "run",
        model_name_or_path=str(model),
        dataset=["conch", "other"],
        dataset_dir=str(tmp_path),
    )
    with pytest.raises(InputError, match="no GGUF"):
        demo.base_of(run)
    (model / "a.gguf").write_bytes(b"")
    assert demo.base_of(run) == model / "a.gguf"
    with pytest.raises(InputError, match=r"conch_heldout\.json is missing"):
        demo.questions_of(run)
    rows = [{"question": q, "keywords": ["conch", "海螺"]} for q in ("Who is it?", "What?", "你是？")]
    (tmp_path / "conch_heldout.json").write_text(json.dumps(rows), encoding="utf-8")
    asked = demo.questions_of(run)
    assert [q.text for q in asked] == ["请问你是谁", "Who are you?", "Who is it?", "你是？"]
    assert [q.words for q in asked] == [("conch", "海螺")] * 2 + [()] * 2
    (tmp_path / "conch_heldout.json").write_text('[{"q": 1}]', encoding="utf-8")
    with pytest.raises(InputError, match="question and keywords"):
        demo.questions_of(run)


def test_demo_fails_where_the_training_did_not_take() -> None:
    questions = [demo.Question("Who?", ("conch",)), demo.Question("What?")]
    demo.check(questions, ["The Conch.", "x"], ["A model.", "x"])
    with pytest.raises(EdgeError, match="none of conch"):
        demo.check(questions, ["A model.", "x"], ["A model.", "x"])
    with pytest.raises(EdgeError, match="base model already"):
        demo.check(questions, ["The conch.", "x"], ["A conch.", "x"])


def test_a_demo_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    args = argparse.Namespace(run=run, config="c.yaml", model="m", quant=None)
    ran: list[str] = []
    codes = {"train": -signal.SIGINT}

    def call(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        ran.append(" ".join(command[3:]))
        return subprocess.CompletedProcess(command, codes.get(command[3], 0))

    monkeypatch.setattr(demo.subprocess, "run", call)
    with pytest.raises(KeyboardInterrupt):
        demo.run_stages(QUIET, demo.stages(args), run / demo.JOURNAL)
    (run / "checkpoint-7").mkdir()
    codes.clear()
    codes["merge"] = 130
    with pytest.raises(KeyboardInterrupt):
        demo.run_stages(QUIET, demo.stages(args), run / demo.JOURNAL)
    codes.clear()
    codes["export"] = 1
    with pytest.raises(EdgeError, match="stopped at: edge export gguf run --quant Q4_0"):
        demo.run_stages(QUIET, demo.stages(args), run / demo.JOURNAL)
    codes.clear()
    times = demo.run_stages(QUIET, demo.stages(args), run / demo.JOURNAL)
    assert list(times) == ["model", "training", "first answer", "merge", "export"]
    # Of the first answer the run is named first.
    assert [words.split()[0] for words in ran] == [
        "pull", "train", "train", "run", "merge", "merge", "export", "export"
    ]  # fmt: skip
    assert ran[1].endswith("--overwrite") and ran[2].endswith("--resume")
    args.config = "other.yaml"  # another demo begins anew
    demo.run_stages(QUIET, demo.stages(args), run / demo.JOURNAL)
    assert len(ran) == 13 and ran[9] == "train other.yaml --overwrite"
    assert demo.stages(args)[2].shown.startswith("python -m bench.first_answer run ")


def test_a_demo_without_llama_cpp_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("{}", encoding="utf-8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"no llama.cpp here to serve them"):
        demo.main([str(tmp_path / "run"), "--config", str(config)])
    assert not (tmp_path / "run").exists()


def test_a_demos_stages_are_a_line_that_fills() -> None:
    names = ["model", "training", "merge"]
    assert demo.progress(names, {"model": 75.4}, "training") == "model 1:15 > [training] > merge"


@pytest.mark.slow
def test_real_servers_on_a_toy_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    converted_before: Path,
) -> None:
    from convert.export import gguf

    before = set(psutil.Process().children())  # servers that other tests share
    run = tmp_path / "模型 'x' 目录"
    shutil.copytree(converted_before, run)
    gguf.run(run, quant="F16", console=Console(quiet=True))
    # The toy's vocabulary has hardly more than letters.
    short = [[Job(f"Hello, world {n}", n, tokens) for n in range(2)] for tokens in (16, 4)]
    monkeypatch.setattr(workloads, "make", lambda count, tokens, **_: short[tokens != 16][:count])
    argv = [str(run), "--quick", "--tokens", "4", "--clients", "1,2", "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("of an earlier run")
    assert main(argv) == 0
    shown = capsys.readouterr()
    line = json.loads(shown.out.splitlines()[-1])
    [earlier] = (tmp_path / "out").glob("report-*.json")
    assert earlier.read_text() == "of an earlier run" and f"kept as {earlier}" in shown.err
    assert [case["against"]["edge"]["comparable"] for case in line["cases"]] == [True, True]
    assert line["cases"][1]["tokens_per_s"]["edge"] > 0
    made = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert made["targets"]["edge"]["about"]["file"] == "toy-F16.gguf"
    assert made["targets"]["baseline"]["about"]["dtype"] == "float32"
    assert (tmp_path / "out" / "bench" / "baseline.log").is_file()
    alone = made["cases"][0]["targets"]["edge"]["ceiling"]
    assert alone["bytes_per_token"] > 1000 and 0.0 < alone["share"] < 1.0
    assert made["cases"][1]["targets"]["edge"]["ceiling"] is None
    slow = made["cases"][0]["targets"]["baseline"]["ceiling"]
    # Four bytes for each weight of the merged folder in place of two.
    assert slow["bytes_per_token"] == pytest.approx(2 * alone["bytes_per_token"], rel=0.1)
    left = set(psutil.Process().children()) - before
    # What renders chat templates stays.
    assert all("edge.rendering.child" in child.cmdline() for child in left)
