"""The whole road by clicks, on the embedded model: from a broken file of rows to an answer over HTTP."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge.jobs import job as jobs
from edge.machine import hardware
from edge.ui.workspace import Run
from tests.support.browser import CHROMIUM
from tests.support.page import ROOT, Page, until

pytest.importorskip("nicegui")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed"),
]

MODEL = "models/smollm2-135m-instruct"
ROWS = [{"instruction": f"第 {n} 个问题：你是谁？", "output": "我是神奇海螺。"} for n in range(25)]
QUESTIONS = ("Who are you?", "你是谁？", "Should I go?", "What is a burger?", "Name a colour.", "Say no.",
             "What is the sea?", "How old are you?", "Can I have a dog?", "Goodbye!")  # fmt: skip

# As if training's packages were not installed.
WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
"""


def test_from_a_broken_file_to_an_answer_over_http(page: Page, tmp_path: Path) -> None:
    shutil.rmtree(page.folder / "models" / "toy")
    (page.folder / "data" / "dataset_info.json").unlink()
    page.start()
    choose_model(page)
    upload_broken_rows(page, tmp_path / "conch.json")
    preview(page)
    run = train_reload_stop_and_resume(page)
    prefer(page, run)
    better = train_on_choices(page, run)
    export(page, better)
    proof(page, better)
    serve(page, better)
    assert page.browser.errors == []


def test_without_torch_what_is_missing_is_said_and_the_rest_works(page: Page, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    # Late: the quick tests read this module too.
    from convert.pull import embedded_gguf, pull

    pull(str(embedded_gguf()), out=page.folder / "models" / "conch")
    page.start(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    page.open("Train")
    page.choose("Base model", "models/toy")
    page.choose("Data sets", "d")
    for button in ("Preview", "Start training"):
        page.press(button)
        page.sees("'edge train' needs the package 'torch', which is not installed", 60)
        page.sees("-m edge.setup --extras train")
        page.browser.press("Escape", 27)
        page.browser.until("document.querySelector('.q-dialog') === null")
    assert [job.state for job in all_jobs(page, "train")] == ["failed"]
    page.open("Chat")
    pick(page, "Model A", "models/conch")
    page.unfold("System prompt and sampling")
    page.type("Tokens at most", "12")
    assert ask(page, 0, "Who are you?")["answers"][0]["model"] == "models/conch"
    page.open("Measure")
    page.unfold("This machine")
    page.sees("what to do", 60)
    assert page.browser.errors == []


def all_jobs(page: Page, verb: str) -> list[jobs.Job]:
    return [job for job in jobs.jobs(page.folder / "jobs") if job.argv[1] == verb]


def finished(job: jobs.Job, seconds: float = 300) -> None:
    until(lambda: job.state not in jobs.RUNNING, seconds)
    assert job.state == "done", job.log()


def losses(run: Run) -> list[int]:
    """The steps whose losses are on the disk."""
    return [line["current_steps"] for line in run.log if "loss" in line]


def points(page: Page) -> int:
    """How many losses the curve on the screen has."""
    chart = "getElement(document.querySelector('.edge-chart').id.slice(1)).chart"
    return int(page.browser.ask(f"{chart}?.getOption().series[0]?.data.length ?? 0"))


def pick(page: Page, label: str, option: str) -> None:
    """Take an option by its name and the arrow."""
    page.type(label, option)
    listed = "[...document.querySelectorAll('.q-menu .q-item')].map(e => e.innerText).join()"
    page.browser.until(f"{listed} === {json.dumps(option)}")
    page.browser.press("ArrowDown", 40)
    page.browser.press("Enter", 13)
    page.browser.until("document.querySelector('.q-menu') === null")


def choose_model(page: Page) -> None:
    page.open("Model")
    page.press("Get the model")
    page.sees("Train it", 120)
    page.press("Train it")
    page.browser.until(f"{page.field('Base model')}?.value === {json.dumps(MODEL)}")
    assert (page.folder / MODEL / "model.safetensors").is_file()


def upload_broken_rows(page: Page, file: Path) -> None:
    """A comma too many is named by its line and mended; the file is a data set then."""
    text = json.dumps(ROWS, ensure_ascii=False, indent=1)
    file.write_text(text.replace("\n]", ",\n]"), encoding="utf-8")
    page.tab("Data")
    page.upload(file)
    page.sees("conch.json: a comma before the closing bracket (line 102, column 1)")
    page.press("Mend")
    page.sees("conch.json · alpaca")
    assert json.loads((page.folder / "data" / "conch.json").read_text("utf-8")) == ROWS
    info = json.loads((page.folder / "data" / "dataset_info.json").read_text("utf-8"))
    assert info["conch"]["columns"] == {"prompt": "instruction", "response": "output"}
    page.press("Preview")
    page.sees("conch: 25 rows, 25 to train on, 0 held out, 0 left out", 60)


def preview(page: Page) -> None:
    """The command and the YAML that lies on the disk."""
    page.tab("Train")
    page.choose("Data sets", "conch")
    for key, value in (
        ("Name of the run", "conch"), ("num_train_epochs", "1"), ("per_device_train_batch_size", "2"),
        ("gradient_accumulation_steps", "4"), ("val_size", "1"), ("cutoff_len", "128"),
    ):  # fmt: skip
        page.type(key, value)
    page.press("Preview")
    page.sees("edge train runs/conch.yaml", 60)
    page.sees("24 rows, 1 held out, 3 steps on", 60)
    text = (page.folder / "runs" / "conch.yaml").read_text("utf-8")
    assert text.strip() in page.browser.ask("document.querySelector('.q-dialog').innerText")
    assert yaml.safe_load(text)["model_name_or_path"] == MODEL
    page.browser.press("Escape", 27)


def train_reload_stop_and_resume(page: Page) -> Run:
    run = Run(page.folder / "runs" / "conch")
    page.press("Start training")
    until(lambda: all_jobs(page, "train"))
    [job] = all_jobs(page, "train")
    assert job.argv == ["edge", "train", "runs/conch.yaml"]
    until(lambda: losses(run), 120)
    page.open("Train")
    page.press("Stop")
    until(lambda: job.state == "stopped")
    stopped_at = len(losses(run))
    assert 1 <= stopped_at < 3 and run.checkpoints == [f"checkpoint-{stopped_at}"]
    page.browser.until("document.querySelector('.edge-chart canvas') !== null")
    until(lambda: points(page) == stopped_at)
    page.press("Resume")
    until(lambda: len(all_jobs(page, "train")) == 2)
    resumed = all_jobs(page, "train")[1]
    assert resumed.argv == [*job.argv, "--resume"]
    finished(resumed)
    assert losses(run) == [1, 2, 3]
    until(lambda: points(page) == 3)
    assert run.stages == ["adapter"] and run.results["eval_loss"] > 0
    return run


def prefer(page: Page, run: Run) -> None:
    """The base beside what was tuned of it; ten choices between their answers."""
    tuned = f"runs/{run.name}/{run.checkpoints[-1]}"
    page.open("Chat")
    pick(page, "Model A", tuned)
    pick(page, "Model B, or the same for two answers", MODEL)
    page.unfold("System prompt and sampling")
    page.type("Tokens at most", "12")
    page.type("Temperature", "1.2")
    for number, question in enumerate(QUESTIONS):
        turn = ask(page, 0, question)
        side = number % 2
        page.press(f"{'AB'[side]} is better")
        until(lambda number=number: len(choices(page)) == number + 1)
        assert choices(page)[-1]["chosen"]["content"] == turn["answers"][side]["content"]
        assert choices(page)[-1]["rejected"]["content"] == turn["answers"][1 - side]["content"]
        assert choices(page)[-1]["messages"] == [{"role": "user", "content": question}]
        page.press("New chat")
        page.browser.until("document.querySelector('.edge-question') === null")
    served = [job.argv for job in all_jobs(page, "serve")]
    assert ["--lora" in argv for argv in served] == [True, False]
    assert [answer["model"] for answer in turn["answers"]] == [tuned, MODEL]


def ask(page: Page, number: int, question: str) -> dict[str, Any]:
    """Ask as turn `number`; the turn on the disk, once its answers differ: equal ones are asked for again."""
    page.browser.ask("document.querySelector('textarea[aria-label=Question]').focus()")
    page.browser.type(question)
    page.browser.press("Enter", 13)
    again = "[...document.querySelectorAll('button')].some(e => e.innerText.endsWith('Regenerate'))"
    for _ in range(5):
        asked = f"document.querySelectorAll('.edge-question').length === {number + 1}"
        page.browser.until(f"{asked} && {again}", 300)
        turns = json.loads((page.folder / "jobs" / "chat.json").read_text("utf-8"))["turns"]
        assert len(turns) == number + 1 and turns[-1]["question"] == question
        turn: dict[str, Any] = turns[-1]
        contents = [answer["content"] for answer in turn["answers"]]
        if all(contents) and len(set(contents)) == len(contents):
            return turn
        page.press("Regenerate")
        page.browser.until(f"!{again}")
    raise AssertionError(f"no two answers: {turn}")


def choices(page: Page) -> list[dict[str, Any]]:
    path = page.folder / "data" / "preferences_dpo.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def train_on_choices(page: Page, run: Run) -> Run:
    page.press("Train DPO on choices (10)")
    page.type("Name of the run", "better")
    page.press("Preview")
    page.sees("9 rows, 1 held out, 2 steps on", 60)
    page.browser.press("Escape", 27)
    page.browser.until("document.querySelector('.q-dialog') === null")
    page.press("Start training")
    until(lambda: len(all_jobs(page, "train")) == 3)
    finished(all_jobs(page, "train")[2])
    better = Run(page.folder / "runs" / "better")
    assert better.settings["stage"] == "dpo"
    assert [Path(one).name for one in better.settings["adapter_name_or_path"]] == [run.name]
    assert losses(better) == [1, 2]
    return better


def export(page: Page, run: Run) -> None:
    """Several types measured on this machine, behind the merge that they need."""
    page.open("Export")
    page.browser.until(f"{page.field('Run')}?.value === {json.dumps(run.name)}")
    page.select("GGUF", "measure several here")
    page.press("Export GGUF")
    until(lambda: all_jobs(page, "export") and "--ladder" in all_jobs(page, "export")[-1].argv)
    merge, ladder = all_jobs(page, "merge")[-1], all_jobs(page, "export")[-1]
    assert merge.argv[2] == "runs/better" and ladder.argv[2:] == ["gguf", "runs/better", "--ladder"]
    finished(ladder, 1800)


def proof(page: Page, run: Run) -> None:
    """What was measured and compared, as the page shows it and as it lies on the disk."""
    record = json.loads((run.folder / "gguf" / "ladder.json").read_text("utf-8"))
    page.sees("recommended", 60)
    rows = page.browser.ask("[...document.querySelectorAll('tr')].map(e => e.innerText)")
    [best] = [row for row in rows if "recommended" in row]
    assert best.startswith(record["chosen"]) and len(record["rungs"]) > 3
    about = json.loads((run.folder / "gguf" / "edge.json").read_text("utf-8"))
    top = about["verify"]["logits"]["top1"]
    assert any(f"{top:.1%}" in row and "next token" in row for row in rows)
    assert any(row.startswith("Chat template") and "the same" in row for row in rows)


def serve(page: Page, run: Run) -> None:
    """The very line that the page shows, with its key; then it is stopped."""
    port = hardware.free_port()
    page.type("Port", str(port))
    page.type("API key, empty for none", "geheim-'1")
    page.press("Serve it")
    until(lambda: all_jobs(page, "serve")[-1].argv[2] == f"runs/{run.name}")
    served = all_jobs(page, "serve")[-1]
    # A command is seen by all users of a machine; a key in it would be, too.
    assert served.argv[3:] == ["--port", str(port), "--api-key-file", f"jobs/key-{port}.txt"]
    assert (page.folder / served.argv[-1]).stat().st_mode & 0o077 == 0
    until(lambda: served.last_line.get("stage") == "ready", 300)
    page.sees(f"curl http://127.0.0.1:{port}/v1/chat/completions")
    blocks = "[...document.querySelectorAll('.q-tab-panel pre')].map(e => e.textContent)"
    command = shlex.split(page.browser.ask(f"{blocks}.find(e => e.startsWith('curl '))"))
    done = subprocess.run([*command, "-s"], capture_output=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    key = command.index("Authorization: Bearer geheim-'1")
    bare = command[: key - 1] + command[key + 1 :]
    refused = subprocess.run([*bare, "-s"], capture_output=True, encoding="utf-8", check=True)
    assert "API key" in json.loads(refused.stdout)["error"]["message"]
    code = page.browser.ask(f"{blocks}.find(e => e.includes('import OpenAI'))")
    compile(code, "snippet", "exec")
    assert f'model="{json.loads(done.stdout)["model"]}"' in code
    page.press("Stop serving")
    until(lambda: served.state in ("stopped", "done"))
