"""A page in a folder of its own, with a toy to train and a browser."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.jobs import job as jobs
from tests.support.browser import Browser, headless
from tests.support.page import Page
from tests.support.runs import ROWS
from tests.support.toy import make_model


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
    browser.call("Page.navigate", url="about:blank")
    browser.errors.clear()
    made.kill()
    for job in jobs.jobs(folder / "jobs"):
        while job.state in jobs.RUNNING:
            job.stop()
            time.sleep(0.3)
    for supervisor in jobs._started:
        supervisor.wait(30)
