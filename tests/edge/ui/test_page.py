"""The page in a real browser: clicks run real verbs; ids, curve and files are read from the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from edge.jobs import job as jobs
from tests.support.browser import CHROMIUM, Browser, headless
from tests.support.runs import ROWS
from tests.support.toy import make_model

pytest.importorskip("nicegui")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")]

ROOT = Path(__file__).parents[3]
READY = "document.querySelector('.edge-page .q-tab-panel button') !== null"


class Page:
    """`edge ui` in a folder of its own, and a browser that looks at it."""

    def __init__(self, folder: Path, browser: Browser) -> None:
        self.folder, self.browser = folder, browser
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self, *options: str, **environment: str) -> str:
        """Start the server; what it says."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge.cli", "ui", "--port", "0", *options],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        self.url = said.split("/  (")[0]
        return said

    def kill(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.communicate(timeout=20)
            self.process = None

    def open(self, tab: str, language: str = "en") -> None:
        self.browser.open(f"{self.url}/{language}?tab={tab}", READY)

    def press(self, text: str) -> None:
        """Click the button that reads `text`."""
        found = (
            f"[...document.querySelectorAll('button')].find(e => e.innerText.endsWith({json.dumps(text)}))"
        )
        self.browser.until(f"{found}?.getClientRects().length > 0")
        self.browser.ask(f"{found}.click()")

    def field(self, label: str) -> str:
        """The input with that label, as an expression."""
        return f"document.querySelector('input[aria-label={json.dumps(label)}]')"

    def type(self, label: str, text: str) -> None:
        self.browser.until(f"{self.field(label)} !== null")
        self.browser.ask(f"{self.field(label)}.focus(), {self.field(label)}.select()")
        self.browser.type(text)

    def choose(self, label: str, option: str) -> None:
        """Take an option of a select, as a user does who types a part of it."""
        self.type(label, option)
        self.browser.press("Enter", 13)
        self.browser.press("Escape", 27)

    def sees(self, text: str, seconds: float = 20) -> None:
        self.browser.until(f"document.body.innerText.includes({json.dumps(text)})", seconds)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with headless(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    folder = tmp_path / "工作 folder"
    make_model(folder / "models" / "toy")
    (folder / "data").mkdir()
    (folder / "data" / "d.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (folder / "data" / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    made = Page(folder, browser)
    yield made
    made.kill()
    for job in jobs.jobs(folder / "jobs"):
        while job.state in jobs.RUNNING:
            job.stop()
            time.sleep(0.3)


def until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_train_by_clicks_through_a_reload_a_killed_server_a_stop_and_a_resume(page: Page) -> None:
    page.start()
    page.open("Train")
    page.choose("Base model", "models/toy")
    page.choose("Data sets", "d")
    page.type("Name of the run", "conch")
    page.type("learning_rate", "5e-3")
    page.type("num_train_epochs", "400")
    page.type("val_size", "2")
    page.press("Preview")
    page.sees("edge train runs/conch.yaml")
    config = yaml.safe_load((page.folder / "runs" / "conch.yaml").read_text("utf-8"))
    assert config["model_name_or_path"] == "models/toy" and config["dataset"] == ["d"]
    assert config["learning_rate"] == 0.005 and config["val_size"] == 2
    page.browser.press("Escape", 27)
    page.press("Start training")
    page.sees("/ 400 steps", 60)
    [job] = jobs.jobs(page.folder / "jobs")
    assert job.argv == ["edge", "train", "runs/conch.yaml"]
    verb = job.record["verb"]["pid"]

    page.kill(signal.SIGKILL)
    assert job.state == "running" and psutil.pid_exists(verb)
    page.start()
    page.open("Train")
    page.browser.errors.clear()  # the lost connection's
    page.sees("/ 400 steps")
    assert page.browser.ask(f"{page.field('Name of the run')}.value") == "conch"
    steps = job.last_line["step"]
    until(lambda: job.last_line.get("step", 0) > steps)

    page.press("Stop")
    until(lambda: job.state == "stopped")
    assert list((page.folder / "runs" / "conch").glob("checkpoint-*"))
    page.sees("Stopped")
    page.press("Resume")
    until(lambda: len(jobs.jobs(page.folder / "jobs")) == 2)
    resumed = jobs.jobs(page.folder / "jobs")[1]
    assert resumed.argv == ["edge", "train", "runs/conch.yaml", "--resume"]
    until(lambda: resumed.last_line.get("step", 0) >= steps)
    page.press("Stop")
    until(lambda: resumed.state == "stopped")
    # The curve goes through both jobs, from the first step on.
    page.browser.until("document.querySelector('.edge-chart canvas') !== null")
    assert page.browser.errors == []
