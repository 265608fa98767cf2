"""The Measure tab: speed, quality, and what this machine has."""

from __future__ import annotations

from dataclasses import asdict

from nicegui import run as background
from nicegui import ui

from edge.jobs.job import Job, read
from edge.machine import doctor
from edge.ui import view as shared
from edge.ui.conversation import html
from edge.ui.view import JobCard, View
from edge.ui.workspace import Run

_VERBS = ("bench", "eval")


def build(view: View) -> None:
    t, runs = view.t, {run.name: run for run in view.workspace.runs()}

    def choose(name: str) -> None:
        place.clear()
        with place:
            _Measured(view, runs[name])

    if runs:
        first = next(iter(runs))
        ui.select([*runs], label=t("Run"), value=first, on_change=lambda event: choose(event.value)).classes(
            "full-width"
        )
        place = ui.column().classes("full-width")
        choose(first)
    else:
        shared.nothing(view, t("No run with a result yet: train first."), "Train")
    with ui.expansion(t("This machine"), icon="computer").classes("full-width"):
        _Machine(view)


class _Measured:
    """A run's figures, and the buttons that measure it."""

    def __init__(self, view: View, run: Run) -> None:
        self._view, self._run = view, run
        self._path = view.workspace.short(run.folder)
        t = view.t
        with ui.row().classes("full-width edge-center"):
            ui.button(t("Measure the speed"), icon="speed", on_click=shared.guarded(self._bench)).props(
                "outline"
            )
            self._quick = ui.checkbox(t("In a minute or two"), value=True)
            ui.button(t("Evaluate"), icon="grading", on_click=shared.guarded(self._evaluate)).props("outline")
        ui.label(
            t("Speed is measured beside the slow baseline; evaluating scores answers to the held-out rows.")
        ).classes("edge-help")
        self._jobs = ui.column().classes("full-width")
        for verb in _VERBS:
            job = view.workspace.job(verb, self._path)
            if job is not None and job.state != "done":
                self._follow(job)
        figures = read(run.folder / "predict_results.json") or {}
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        if numbers:
            shared.table({"key": t("figure"), "value": t("value")},
                  [{"key": key, "value": f"{value:.4g}"} for key, value in numbers.items()])  # fmt: skip
        report = run.folder / "report.md"
        if report.is_file():
            ui.html(html(report.read_text(encoding="utf-8")), sanitize=True).classes(
                "full-width edge-markdown"
            )

    def _follow(self, job: Job) -> None:
        with self._jobs:
            JobCard(self._view, job, ended=lambda: self._view.go("Measure"))

    async def _bench(self) -> None:
        quick = ["--quick"] if self._quick.value else []
        self._follow(self._view.workspace.start(["bench", self._path, *quick]))

    async def _evaluate(self) -> None:
        self._follow(self._view.workspace.start(["eval", self._path]))


class _Machine:
    """What `edge doctor` says, once it has looked."""

    def __init__(self, view: View) -> None:
        self._t = view.t
        self._place = ui.column().classes("full-width")
        ui.timer(0.1, self._look, once=True)

    async def _look(self) -> None:
        t, items = self._t, await background.io_bound(doctor.items) or []
        with self._place:
            shared.table(
                {"group": t("part"), "name": t("name"), "found": t("what is there"), "todo": t("what to do")},
                [asdict(one) for one in items],
            )  # fmt: skip
