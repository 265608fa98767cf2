"""Answers to a file of questions, in the Chat tab: jobs of `edge predict`, and what came out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from nicegui import run, ui

from edge import questions
from edge.artefact import json_file
from edge.errors import EdgeError
from edge.jobs.job import Job
from edge.ui import datasets, loaded
from edge.ui import view as shared
from edge.ui.conversation import Conversation
from edge.ui.view import JobCard, View
from edge.ui.workspace import Workspace

# Lines that are shown of an answered file.
_SHOWN = 5
FOLDER = "answers"


class Batch:
    """A button that takes a file, and the file's jobs."""

    def __init__(self, view: View, talk: Conversation) -> None:
        self._view, self._talk = view, talk
        t = view.t
        upload = ui.upload(auto_upload=True, on_upload=self._upload).classes("hidden")
        upload.props(f'accept="{",".join(questions.SUFFIXES)}"')
        ui.button(t("Answer a file"), icon="quiz", on_click=lambda: upload.run_method("pickFiles")).props(
            "flat dense"
        ).tooltip(
            t("json, jsonl or csv as for training, or txt with a question a line; model A and B answer all.")
        )

    def show(self) -> None:
        """Make the place of the jobs here, with the last of them."""
        self._jobs = ui.column().classes("full-width")
        if job := self._view.workspace.job("predict"):
            self._follow(job)

    async def _upload(self, event: Any) -> None:
        try:
            path = datasets.free_name(self._folder(event.file.name), event.file.name, questions.SUFFIXES)
            path.parent.mkdir(parents=True)
            with shared.whole(path):
                await event.file.save(path)
            # What is wrong with the file is said before a model is loaded.
            await run.io_bound(questions.read, path)
            commands = predictions(self._view.workspace, self._talk, path)
        except (EdgeError, OSError) as error:
            shared.complain(error)
            return
        self._jobs.clear()
        for argv in commands:
            self._follow(self._view.workspace.start(argv))

    def _folder(self, file: str) -> Path:
        """A new folder for the file and its answers."""
        folder, name = self._view.workspace.root / FOLDER, Path(file).stem or "questions"
        return next(one for n in itertools.count(1) if not (one := folder / f"{name}-{n}").exists())

    def _follow(self, job: Job) -> None:
        with self._jobs:
            made = ui.column().classes("full-width")
            with made:
                JobCard(self._view, job, ended=lambda: self._made(made, job))
                if job.state == "done":
                    self._made(made, job)

    def _made(self, place: Any, job: Job) -> None:
        if job.argv[1] != "predict":
            return
        t, path = self._view.t, self._view.workspace.root / job.last_line["result"]["path"]
        if not path.is_file():
            return
        lines = json_file.lines(path.read_text(encoding="utf-8"))[:_SHOWN]
        with place:
            ui.button(
                t("Download the answers"), icon="download", on_click=lambda: ui.download.file(path)
            ).props("outline")
            titles = {"prompt": t("Question"), "predict": t("Answer"), "label": t("hoped for")}
            shared.table(titles, lines)


def predictions(workspace: Workspace, talk: Conversation, file: Path) -> list[list[str]]:
    """The commands that have every model of the conversation answer a file, by its settings.

    The answers of each lie in a folder of its own below the file. Raises EdgeError as `loaded.needed`.
    """
    made: list[list[str]] = []
    for name in dict.fromkeys(talk.models):
        missing, path, lora = loaded.needed(workspace, name)
        out = workspace.short(file.parent / name.replace("/", "-"))
        made += [one for one in missing if one not in made]
        made.append([
            "predict", path, workspace.short(file), "--out", out,
            *(["--lora", lora] if lora else []), *(["--system", talk.system] if talk.system else []),
            "--temperature", str(talk.temperature), "--max-tokens", str(talk.max_tokens),
        ])  # fmt: skip
    return made
