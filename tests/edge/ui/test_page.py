"""The page in a real browser: clicks run real verbs; ids, curve and files are read from the disk."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import tarfile
from pathlib import Path

import psutil
import pytest
import yaml

from convert.config import as_yaml
from edge.jobs import job as jobs
from tests.support.browser import CHROMIUM
from tests.support.page import READY, Page, until
from tests.support.reverse_proxy import proxied
from tests.support.runs import configure

pytest.importorskip("nicegui")

from edge.ui.app import TABS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")]


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
    page.sees("8 rows, 2 held out, 400 steps on cpu", 60)
    page.sees("How long it takes is not known")
    page.press("Try a few steps")
    page.sees("tokens/s of: steps just tried", 60)
    assert config["learning_rate"] == 0.005 and config["val_size"] == 2
    page.browser.press("Escape", 27)
    page.press("Start training")
    page.sees("/ 400 steps", 60)
    tried, job = jobs.jobs(page.folder / "jobs")
    assert job.argv == ["edge", "train", "runs/conch.yaml"]
    assert tried.argv == [*job.argv, "--plan", "--measure"] and tried.state == "done"
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
    until(lambda: len(jobs.jobs(page.folder / "jobs")) == 3)
    resumed = jobs.jobs(page.folder / "jobs")[2]
    assert resumed.argv == ["edge", "train", "runs/conch.yaml", "--resume"]
    until(lambda: resumed.last_line.get("step", 0) >= steps)
    page.press("Stop")
    until(lambda: resumed.state == "stopped")
    # The curve goes through both jobs, from the first step on.
    page.browser.until("document.querySelector('.edge-chart canvas') !== null")
    assert page.browser.errors == []


def test_a_broken_data_file_is_mended_and_files_are_uploaded_and_looked_at(
    page: Page, tmp_path: Path
) -> None:
    info = page.folder / "data" / "dataset_info.json"
    info.write_text('{"d": {"file_name": "d.json"},}', encoding="utf-8")
    rows = [{"question": "<img src=x onerror=alert(1)>", "answer": "No."}, {"question": "q"}]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    page.start()
    page.open("Data", "zh")
    page.sees("line 1, column 31")
    page.press("修复")
    page.browser.until("document.querySelector('.cm-content').innerText.includes('d.json')")
    page.press("保存")
    page.sees("d.json · alpaca")
    assert json.loads(info.read_text("utf-8")) == {"d": {"file_name": "d.json"}}
    page.upload(tmp_path / "new.jsonl")
    page.sees("new.jsonl · alpaca")
    entry = json.loads(info.read_text("utf-8"))["new"]
    assert entry == {"file_name": "new.jsonl", "columns": {"prompt": "question", "response": "answer"}}
    assert (page.folder / "data" / "new.jsonl").read_bytes() == (tmp_path / "new.jsonl").read_bytes()

    page.open("Data")
    buttons = "[...document.querySelectorAll('.edge-line button')].filter(e => /Preview$/.test(e.innerText))"
    page.browser.ask(f"{buttons}[1].click()")
    page.sees("Choose a base model in the Train tab")
    page.open("Model")
    page.press("Train it")
    page.browser.until(f"{page.field('Base model')} !== null")
    assert (
        json.loads((page.folder / "jobs" / "form.json").read_text("utf-8"))["model_name_or_path"]
        == "models/toy"
    )
    page.open("Data")
    page.browser.ask(f"{buttons}[1].click()")
    page.sees("new: 2 rows, 1 to train on, 0 held out, 1 left out", 60)
    # Text of data is text.
    tokens = page.browser.ask("document.querySelector('.edge-tokens').textContent")
    assert "<img src=x onerror=alert(1)>" in tokens and "No." in tokens
    assert page.browser.ask("document.querySelectorAll('.edge-tokens img').length") == 0
    learnt = page.browser.ask(
        "[...document.querySelectorAll('.edge-learnt')].map(e => e.textContent).join('')"
    )
    assert learnt.startswith("No.") and "img" not in learnt

    # The row that was left out is mended, and its file holds it as it stood there.
    page.browser.ask("document.querySelector('button[aria-label=Edit]').click()")
    page.sees("new.jsonl, row 2")
    field = "document.querySelector('textarea[aria-label=answer]')"
    page.browser.ask("document.querySelector('button[aria-label=\"Earlier row\"]').click()")
    page.sees("new.jsonl, row 1")
    page.type("Row", "9")
    page.browser.press("Enter", 13)
    page.sees("new.jsonl, row 2")
    # A dialog takes the focus once it is open.
    page.browser.until("document.activeElement.closest('.q-dialog') !== null")
    page.browser.ask(f"{field}.focus()")
    page.browser.type("答案是“B”。")
    page.browser.until(f"{field}.value === '答案是“B”。'")
    page.press("Save")
    until(lambda: "答案是“B”。" in (page.folder / "data" / "new.jsonl").read_text("utf-8"))
    first, second = (page.folder / "data" / "new.jsonl").read_text("utf-8").split("\n")
    assert first == json.dumps(rows[0]) and json.loads(second) == {"question": "q", "answer": "答案是“B”。"}
    assert page.browser.errors == []


def test_runs_are_compared_continued_and_deleted(page: Page) -> None:
    for number, rank in enumerate((4, 8)):
        folder = page.folder / "runs" / f"run{number}"
        (folder / "adapter").mkdir(parents=True)
        about = {"settings": {"lora_rank": rank, "model_name_or_path": "models/toy", "seed": 1}}
        (folder / "adapter" / "edge.json").write_text(json.dumps(about), encoding="utf-8")
        lines = [json.dumps({"current_steps": step, "loss": 5 - step / 10}) for step in range(1, 20)]
        (folder / "trainer_log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for step in (5, 10):
        (page.folder / "runs" / "run0" / f"checkpoint-{step}").mkdir()
    page.start()
    page.open("Runs")
    page.browser.until("document.querySelectorAll('.q-checkbox[aria-checked=false]').length === 1")
    page.browser.ask("document.querySelector('.q-checkbox[aria-checked=false]').click()")
    page.sees("lora_rank")
    table = page.browser.ask("document.querySelector('table').innerText")
    assert "4" in table and "8" in table and "seed" not in table and "model_name_or_path" not in table
    page.press("Continue from")
    page.browser.until(f"{page.field('adapter_name_or_path')} !== null")
    form = json.loads((page.folder / "jobs" / "form.json").read_text("utf-8"))
    assert form["adapter_name_or_path"].startswith("runs/run") and form["model_name_or_path"] == "models/toy"
    page.open("Runs")
    page.press("arrow_drop_down")
    page.browser.until("document.querySelector('.q-menu .q-item') !== null")
    page.browser.ask("document.querySelector('.q-menu .q-item').click()")
    page.sees("Goes on from runs/run0/checkpoint-10:")
    form = json.loads((page.folder / "jobs" / "form.json").read_text("utf-8"))
    # The settings of that run, but for those that are the default.
    assert form == {"lora_rank": 4, "model_name_or_path": "models/toy", "seed": 1,
                    "resume_from_checkpoint": "runs/run0/checkpoint-10",
                    "output_dir": "runs/run0-from-10"}  # fmt: skip
    page.press("Begin anew instead")
    until(lambda: "resume_from_checkpoint" not in (page.folder / "jobs" / "form.json").read_text("utf-8"))
    page.open("Runs")
    page.browser.ask("document.querySelector('button[aria-label=Delete]').click()")
    page.sees("with all its checkpoints and exports, type its name")
    page.press("Delete")
    page.sees("That is not its name")
    names = {path.name for path in (page.folder / "runs").iterdir()}
    assert len(names) == 2
    deleted = page.browser.ask("document.querySelector('.q-dialog').innerText.match(/run\\d/)[0]")
    page.type("Name of the run", deleted)
    page.press("Delete")
    until(lambda: {path.name for path in (page.folder / "runs").iterdir()} == names - {deleted})
    assert page.browser.errors == []


@pytest.mark.matrix
def test_a_run_is_merged_with_its_proof_and_served(page: Page) -> None:
    config = configure(page.folder / "data", Path("models/toy"))(max_steps=2)
    path = page.folder / "runs" / "conch.yaml"
    path.parent.mkdir()
    changes = {"dataset_dir": "data", "output_dir": "runs/conch"}
    path.write_text(yaml.safe_dump(yaml.safe_load(as_yaml(config)) | changes), encoding="utf-8")
    trained = jobs.start(page.folder / "jobs", ["edge", "train", "runs/conch.yaml"], cwd=page.folder)
    until(lambda: trained.state == "done")
    page.start()
    page.open("Export")
    page.press("Export GGUF")
    until(lambda: len(jobs.jobs(page.folder / "jobs")) == 3)
    merge, export = jobs.jobs(page.folder / "jobs")[1:]
    assert merge.argv == ["edge", "merge", "runs/conch"]
    assert export.argv == ["edge", "export", "gguf", "runs/conch"]
    until(lambda: export.state == "failed", 120)
    assert merge.state == "done"
    # What the command says of a toy's tokenizer stands in the page, and the proof of what was made.
    page.sees(export.last_line["hint"])
    page.open("Export")
    page.sees("How often both would go on with the same token.")

    # A file that llama.cpp knows. Late: the quick tests read this module too.
    from convert.pull import embedded_gguf, pull

    pull(str(embedded_gguf()), out=page.folder / "runs" / "conch" / "gguf")
    page.open("Export")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page.type("Port", str(port))
    page.press("Serve it")
    until(lambda: len(jobs.jobs(page.folder / "jobs")) == 4)
    served = jobs.jobs(page.folder / "jobs")[3]
    until(lambda: served.last_line.get("stage") == "ready", 120)
    page.sees(f"curl http://127.0.0.1:{port}/v1/chat/completions")
    blocks = "[...document.querySelectorAll('.q-tab-panel pre')].map(e => e.textContent)"
    command = page.browser.ask(f"{blocks}.find(e => e.startsWith('curl '))")
    command = command.replace('{"messages"', '{"max_tokens": 8, "messages"')  # a small model talks long
    done = subprocess.run([*shlex.split(command), "-s"], capture_output=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    page.press("Stop serving")
    until(lambda: served.state in ("stopped", "done"))
    assert page.browser.errors == []


def test_two_languages_both_themes_a_phone_and_nothing_from_elsewhere(page: Page) -> None:
    page.start()
    browser = page.browser
    for tab in TABS:
        page.open(tab, "zh")
        assert browser.ask("document.documentElement.lang").startswith("zh")
        for width in (390, 1200):
            browser.resize(width, 900, mobile=width < 500)
            browser.until(f"document.documentElement.scrollWidth <= {width}")
        hosts = browser.ask(
            "[...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).host))]"
        )
        assert hosts == [page.url.removeprefix("http://")]
        unnamed = browser.ask(
            "[...document.querySelectorAll('button, input:not([type=file]):not([type=hidden])')].filter(e => "
            "e.getClientRects().length && !e.textContent.trim() && !e.ariaLabel && !e.labels?.length).length"
        )
        assert unnamed == 0, tab
    for scheme in ("dark", "light"):
        browser.colours(scheme)
        browser.until(f"document.body.classList.contains('body--{scheme}')")
    page.press("English")
    page.sees("Train")
    assert browser.ask("location.pathname") == "/en"
    browser.open(page.url, READY)
    browser.until("location.pathname === '/en'")
    browser.colours("")
    browser.call("Network.clearBrowserCookies")
    assert browser.errors == []


def test_behind_a_proxy_with_a_key_and_a_run_is_taken_home(page: Page, tmp_path: Path) -> None:
    run = page.folder / "runs" / "名"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "edge.json").write_text("{}", encoding="utf-8")
    (run / "adapter" / "weights.bin").write_bytes(b"w" * 70_000)
    said = page.start("--root-path", "/page", EDGE_API_KEY="secret")
    assert said.startswith("http://127.0.0.1:") and "/page/" in said
    port = int(page.url.split(":")[2].split("/")[0])
    browser = page.browser
    with proxied(port, "/page") as address:
        host = address.removeprefix("http://")
        page.url = f"http://me:secret@{host}"
        page.open("Runs")  # which waits for the websocket
        page.url = address  # from here on by the cookie
        browser.open(f"{address}/", READY)
        assert browser.ask("location.pathname") == "/page/en"
        page.open("Runs")
        assert browser.ask("[...new Set(performance.getEntriesByType('resource').map(e => "
                           "e.name.startsWith(location.origin + '/page/')))]") == [True]  # fmt: skip
        browser.ask("document.querySelector('button[aria-label=\"Take home\"]').click()")
        page.sees("curl -C - -O " + address)
        browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "home"))
        browser.ask("[...document.querySelectorAll('.q-dialog a')][1].click()")
        taken = tmp_path / "home" / "名-adapter.tar"
        until(taken.is_file)
        command = shlex.split(browser.ask("[...document.querySelectorAll('.q-dialog pre')][1].textContent"))
        part = tmp_path / taken.name
        part.write_bytes(taken.read_bytes()[:50_000])
        done = subprocess.run([*command, "-s", "-u", "me:secret"], cwd=tmp_path, check=False)
        assert done.returncode == 0 and part.read_bytes() == taken.read_bytes()
        with tarfile.open(part) as file:
            member = file.extractfile("名/adapter/weights.bin")
            assert member is not None and member.read() == b"w" * 70_000
        refused = subprocess.run([*command, "-s", "-o", "x", "-f"], cwd=tmp_path, check=False)
        assert refused.returncode == 22 and browser.errors == []  # curl's code for 401
        browser.call("Page.navigate", url="about:blank")  # which ends the websocket


def test_a_lost_server_is_said_and_the_page_comes_back(page: Page) -> None:
    page.start()
    page.open("Data", "zh")
    lost = "document.getElementById('popup').ariaHidden === 'false'"
    page.browser.ask("window.before = true")
    page.kill(signal.SIGKILL)
    page.browser.until(lost)
    page.sees("连接丢失")
    page.start("--port", page.url.rsplit(":", 1)[1])
    page.browser.until(f"window.before === undefined && {READY}", 40)
    assert page.browser.ask("location.search") == "?tab=Data"
    assert not page.browser.ask(lost)
    page.sees("d.json")
    page.browser.errors.clear()  # the lost connection's
