"""The road by clicks on the embedded model: get it, train, ask base and checkpoint, choose, DPO on that."""

from __future__ import annotations

import json
import shutil

import pytest

from edge.jobs import job as jobs
from edge.ui.workspace import Run
from tests.support.browser import CHROMIUM
from tests.support.page import Page, until

pytest.importorskip("nicegui")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed"),
]


def last(page: Page) -> jobs.Job:
    return jobs.jobs(page.folder / "jobs")[-1]


def train(page: Page, name: str, *, steps: int) -> Run:
    """Train by the form as it is; the run."""
    page.browser.until(f"{page.field('Name of the run')} !== null")
    form = page.folder / "jobs" / "form.json"
    values = json.loads(form.read_text("utf-8"))
    form.write_text(json.dumps({**values, "max_steps": steps, "save_steps": steps}), encoding="utf-8")
    page.open("Train")
    page.type("Name of the run", name)
    page.press("Start training")
    until(lambda: last(page).argv[1:3] == ["train", f"runs/{name}.yaml"])
    until(lambda: last(page).state not in jobs.RUNNING, 300)
    assert last(page).state == "done", last(page).log()
    return Run(page.folder / "runs" / name)


def pick(page: Page, label: str, option: str) -> None:
    """Take an option by its name and the arrow."""
    page.type(label, option)
    listed = "[...document.querySelectorAll('.q-menu .q-item')].map(e => e.innerText).join()"
    page.browser.until(f"{listed} === {json.dumps(option)}")
    page.browser.press("ArrowDown", 40)
    page.browser.press("Enter", 13)
    page.browser.until("document.querySelector('.q-menu') === null")


def test_get_train_compare_choose_and_train_on_the_choice(page: Page) -> None:
    shutil.rmtree(page.folder / "models" / "toy")
    page.start()
    page.open("Model")
    page.press("Get the model")
    page.sees("Train it", 120)
    page.press("Train it")
    page.choose("Data sets", "d")
    run = train(page, "conch", steps=2)
    assert run.checkpoints == ["checkpoint-2"] and "adapter" in run.stages

    (page.folder / "jobs" / "chat.json").write_text('{"max_tokens": 40}', encoding="utf-8")
    page.open("Chat")
    pick(page, "Model A", "runs/conch/checkpoint-2")
    pick(page, "Model B, or the same for two answers", "models/smollm2-135m-instruct")
    page.browser.ask("document.querySelector('textarea[aria-label=Question]').focus()")
    page.browser.type("Who are you?")
    page.browser.press("Enter", 13)
    page.sees("A is better", 200)
    turn = json.loads((page.folder / "jobs" / "chat.json").read_text("utf-8"))["turns"][0]
    served = [job.argv for job in jobs.jobs(page.folder / "jobs") if job.argv[1] == "serve"]
    assert ["--lora" in argv for argv in served] == [True, False]
    assert (page.folder / "runs" / "conch" / "checkpoint-2" / "lora" / "edge.json").is_file()
    page.press("A is better")
    page.sees("✓")
    [row] = (page.folder / "data" / "preferences_dpo.jsonl").read_text("utf-8").splitlines()
    assert json.loads(row)["chosen"]["content"] == turn["answers"][0]["content"]
    page.press("Train DPO on choices (1)")
    run = train(page, "better", steps=1)
    # The run that was preferred goes on.
    assert run.settings["adapter_name_or_path"]
    assert run.settings["stage"] == "dpo" and run.log
