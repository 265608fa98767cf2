"""The Runs tab: trainings with their curves over each other, and the jobs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from nicegui import run as background
from nicegui import ui

from edge.errors import EdgeError
from edge.ui import take_home
from edge.ui import view as shared
from edge.ui.curves import Curve
from edge.ui.view import STATES, JobCard, View
from edge.ui.workspace import Run

_SCORES = ("train_loss", "eval_loss", "perplexity", "predict_bleu-4", "predict_rouge-l")
_JOBS = 30


def build(view: View) -> None:
    _Tab(view)


class _Tab:
    def __init__(self, view: View) -> None:
        self._view, self._t = view, view.t
        self._chosen: dict[str, Run] = {}
        runs = view.workspace.runs()
        if not runs:
            shared.nothing(view, self._t("No training yet."), "Train")
        for run in runs:
            self._line(run, chosen=run is runs[0])
        self._compared = ui.column().classes("full-width")
        if runs:
            self._choose(runs[0], True)
        jobs = view.workspace.jobs()
        with ui.expansion(self._t("Jobs"), icon="list").classes("full-width"):
            for job in reversed(jobs[-_JOBS:]):
                title = f"{job.name} · {self._t(STATES[job.state][0])} · {' '.join(job.argv)}"
                with ui.expansion(title).classes("full-width") as entry:
                    place = ui.column().classes("full-width")
                # Followed from when it is looked at.
                entry.on_value_change(functools.partial(self._open, place, job))

    def _line(self, run: Run, *, chosen: bool) -> None:
        t, results = self._t, run.results
        with ui.row().classes("full-width edge-line"):
            ui.checkbox(
                run.name, value=chosen, on_change=lambda event: self._choose(run, event.value)
            ).classes("text-bold")
            base = str(run.settings.get("model_name_or_path", ""))
            base = self._view.workspace.short(Path(base)) if Path(base).is_absolute() else base
            about = [base, *run.stages, *run.checkpoints[-2:]]
            about += [
                f"{key} {results[key]:.4g}" for key in _SCORES if isinstance(results.get(key), float | int)
            ]
            ui.label(" · ".join(map(str, filter(None, about)))).classes("edge-mono col")
            if "adapter" in run.stages:
                ui.button(t("Continue from"), icon="redo", on_click=lambda: self._continue(run)).props(
                    "outline dense"
                )
            if run.checkpoints:
                with ui.dropdown_button(t("From a checkpoint"), auto_close=True).props("outline dense"):
                    for name in reversed(run.checkpoints):
                        ui.item(name, on_click=functools.partial(self._from_checkpoint, run, name))
            ui.button(icon="download", on_click=shared.guarded(lambda: self._take_home(run))).props(
                f'flat dense aria-label="{t("Take home")}"'
            )
            ui.button(icon="delete", on_click=lambda: self._ask_to_delete(run)).props(
                f'flat dense aria-label="{t("Delete")}"'
            )

    def _choose(self, run: Run, on: bool) -> None:
        if on:
            self._chosen[run.name] = run
        else:
            self._chosen.pop(run.name, None)
        self._compared.clear()
        with self._compared:
            if self._chosen:
                shared.chart(self._view, {name: Curve(one.log) for name, one in self._chosen.items()})
                self._settings()

    def _settings(self) -> None:
        """The chosen runs' settings: of one run all, of several those that differ."""
        runs = list(self._chosen.values())
        settings = {run.name: {**run.settings, **run.results} for run in runs}
        keys = dict.fromkeys(key for one in settings.values() for key in one)
        rows = []
        for key in keys:
            values = [shown(settings[run.name].get(key)) for run in runs]
            if len(runs) == 1 or len(set(values)) > 1:
                rows.append(
                    {"key": key, **{run.name: value for run, value in zip(runs, values, strict=True)}}
                )
        columns = [{"name": name, "label": name, "field": name, "align": "left"}
                   for name in ("key", *settings)]  # fmt: skip
        columns[0]["label"] = self._t("What differs") if len(runs) > 1 else self._t("Settings and figures")
        with ui.expansion(columns[0]["label"], icon="compare", value=len(runs) > 1).classes("full-width"):
            ui.table(columns=columns, rows=rows, row_key="key").classes("full-width").props(
                "dense flat wrap-cells"
            )

    def _continue(self, run: Run) -> None:
        form = self._view.form()
        base = run.settings.get("model_name_or_path")
        form.replace({**form.values, **({"model_name_or_path": base} if base else {}),
                      "adapter_name_or_path": self._view.workspace.short(run.folder)})  # fmt: skip
        self._view.go("Train")

    def _from_checkpoint(self, run: Run, name: str) -> None:
        """Fill the form in for a training that goes on from a checkpoint, in a folder of its own."""
        space = self._view.workspace
        self._view.form().replace({
            **run.configuration,
            "resume_from_checkpoint": f"{space.short(run.folder)}/{name}",
            "output_dir": f"runs/{space.free_name(f'{run.name}-from-{name[11:]}')}",
        })  # fmt: skip
        self._view.go("Train")

    async def _take_home(self, run: Run) -> None:
        """The files that can be downloaded of a run, and the command that goes on with a broken download."""
        t = self._t
        found = await background.io_bound(take_home.archives, self._view.workspace, run.name) or {}
        page = await ui.run_javascript("location.origin + window.path_prefix")
        with ui.dialog() as dialog, ui.card().classes("edge-wide"):
            ui.label(t("One file each; unpacked in runs/ it is the run again: tar -xf FILE -C runs"))
            for name, archive in found.items():
                path = take_home.link(run.name, name, archive)
                with ui.row().classes("full-width edge-line"):
                    ui.link(f"{name}.tar", path)
                    ui.label(shared.size(archive.size)).classes("edge-mono col")
                ui.code(f"curl -C - -O {page}{path}", language="bash").classes("full-width")
            ui.label(
                t("The command goes on where a download broke off; where the page has a key, add -u :KEY.")
            ).classes("edge-help")
        dialog.open()

    def _ask_to_delete(self, run: Run) -> None:
        with ui.dialog() as dialog, ui.card():
            shared.words(
                self._t("To delete {name} with all its checkpoints and exports, type its name.").format(
                    name=run.name
                )
            )
            typed = ui.input(self._t("Name of the run")).classes("full-width")

            async def delete() -> None:
                if typed.value != run.name:
                    raise EdgeError(self._t("That is not its name; nothing was deleted."))
                self._view.workspace.delete(run)
                dialog.close()
                self._view.go("Runs")

            with ui.row():
                ui.button(self._t("Delete"), icon="delete", color="negative", on_click=shared.guarded(delete))
                ui.button(self._t("Keep"), on_click=dialog.close).props("outline")
        dialog.open()

    def _open(self, place: Any, job: Any, event: Any) -> None:
        place.clear()
        if event.value:
            with place:
                JobCard(self._view, job)


def shown(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
