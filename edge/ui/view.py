"""What all tabs share: the page's language and folder, errors in words, and a job that one can follow."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nicegui import run, ui

from edge.console import explained
from edge.errors import EdgeError
from edge.jobs.job import RUNNING, Job
from edge.ui.curves import Curve, options
from edge.ui.form import Form
from edge.ui.loaded import Server
from edge.ui.texts import Texts
from edge.ui.workspace import Run, Workspace

_EVERY_S = 1.0
# Bytes; with less left on the disk, jobs fail.
_ROOM = 16 * 2**20
STATES = {
    "waiting": ("Waiting", "grey"),
    "running": ("Running", "primary"),
    "stopping": ("Stopping", "warning"),
    "done": ("Done", "positive"),
    "failed": ("Failed", "negative"),
    "stopped": ("Stopped", "grey"),
    "lost": ("Lost", "negative"),
}


@dataclass(frozen=True)
class View:
    """One open page. go: shows another tab."""

    t: Texts
    workspace: Workspace
    go: Callable[[str], None]

    def form(self) -> Form:
        """The configuration that is being made, as it is on the disk."""
        return Form(self.workspace.jobs_folder / "form.json")

    async def ask(self, *argv: str) -> dict[str, Any]:
        """The result of a short command, without holding the page up."""
        return dict(await run.io_bound(self.workspace.ask, *argv) or {})


def guarded(action: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """The action of a button; what a user can mend is said in the page."""

    async def act() -> None:
        try:
            await action()
        except (EdgeError, OSError) as error:
            complain(error)

    return act


def complain(error: BaseException | str) -> None:
    """Show an error until it is closed, in the words of the commands."""
    text = str((explained(error) if isinstance(error, OSError) else None) or error)
    ui.notify(text, type="negative", multi_line=True, timeout=0, close_button="✕", position="top",
              classes="edge-words")  # fmt: skip


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Of a file that the block writes nothing stays where the disk is full."""
    try:
        yield
    except OSError:
        path.unlink(missing_ok=True)
        raise


def words(text: str = "") -> Any:
    """A label of plain text with its line ends."""
    return ui.label(text).classes("edge-words")


def nothing(view: View, text: str, tab: str) -> None:
    """Why a tab is empty, and the way to the tab where that changes."""
    with ui.row().classes("full-width edge-center"):
        ui.label(text)
        ui.button(view.t(tab), icon="arrow_forward", on_click=lambda: view.go(tab)).props("outline dense")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def chart(view: View, curves: dict[str, Curve]) -> Any:
    return ui.echart(options(curves, curve_names(view))).classes("full-width edge-chart")


def curve_names(view: View) -> tuple[str, str, str]:
    return view.t("loss"), view.t("loss, smoothed"), view.t("validation loss")


def table(titles: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """A table of rows by key. titles: of the columns, by the same keys."""
    columns = [{"name": key, "label": title, "field": key, "align": "left"} for key, title in titles.items()]
    ui.table(columns=columns, rows=rows).classes("full-width").props("dense flat wrap-cells")


def loaded_model(view: View, server: Server, changed: Callable[[], None]) -> None:
    """A model that is loaded, what it takes, and a button that unloads it."""
    t = view.t

    def unload() -> None:
        server.job.stop()
        changed()

    with ui.row().classes("edge-center edge-chip"):
        ui.icon("memory").props("color=positive" if server.url else "color=grey")
        state = size(server.memory) if server.url else t("is being loaded")
        ui.label(f"{server.name} · {state}").classes("edge-mono")
        ui.button(t("Unload"), on_click=unload).props("flat dense no-wrap").classes("text-no-wrap")


class JobCard:
    """A job with its state, progress, words and buttons, kept up to date.

    training: its folder. ended: called once the job is done.
    """

    def __init__(
        self,
        view: View,
        job: Job,
        *,
        training: Run | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._view, self._job, self._run, self._ended = view, job, training, ended
        self._offset = 0
        self._line: dict[str, Any] = {}
        self._figures: dict[str, Any] = {}
        t = view.t
        with ui.card().classes("full-width").props(f"data-job={job.name}"):
            with ui.row().classes("full-width edge-center"):
                self._badge = ui.badge()
                ui.label(shlex.join(job.argv)).classes("edge-mono col")
                self._stop = ui.button(t("Stop"), icon="stop", on_click=self._ask_to_stop).props("outline")
                self._again = ui.button(icon="replay", on_click=guarded(self._run_again)).props("outline")
            self._bar = ui.linear_progress(show_value=False, size="10px").props("instant-feedback")
            self._about, self._numbers = words(), words()
            self._error = words().classes("text-negative")
            if training is not None:
                self._curve = Curve(training.log)
                self._chart = chart(view, {"": self._curve})
                self._warning = words().classes("edge-warning")
                with ui.expansion(t("Sample answers"), icon="question_answer").classes("full-width"):
                    self._answers = words()
            with ui.expansion(t("Log"), icon="article").classes("full-width"):
                self._log = words().classes("edge-mono")
        self._refresh()
        self._timer = ui.timer(_EVERY_S, self._refresh, active=job.state in RUNNING)

    def _ask_to_stop(self) -> None:
        self._job.stop()
        self._refresh()

    async def _run_again(self) -> None:
        self._job = self._view.workspace.start(self._job.again()[1:])
        self._offset, self._line = 0, {}
        self._refresh()
        self._timer.activate()

    def _refresh(self) -> None:
        t, state = self._view.t, self._job.state
        lines, self._offset = self._job.lines(self._offset)
        for line in lines:
            self._line = line
            self._figures |= {key: value for key, value in line.items() if value is not None}
        title, colour = STATES[state]
        self._badge.set_text(t(title))
        self._badge.props(f"color={colour} data-state={state}")
        self._stop.set_visibility(state in RUNNING)
        self._stop.set_text(self._stops(state))
        self._again.set_visibility(state in ("failed", "stopped", "lost"))
        self._again.set_text(t("Resume") if self._run else t("Run again"))
        self._show_progress(state)
        failed = (self._line.get("error"), self._line.get("hint")) if state == "failed" else ()
        # On a full disk a command cannot write down what ended it.
        full = state not in ("done", "stopped") and shutil.disk_usage(self._job.folder).free < _ROOM
        problem = [*failed, t("The disk is full: free some space, and run it again.") if full else None]
        self._error.set_text("\n".join(filter(None, problem)))
        self._error.set_visibility(any(problem))
        self._log.set_text(self._job.log())
        if self._run is not None:
            self._show_training(lines)
        if state not in RUNNING and hasattr(self, "_timer"):
            self._timer.deactivate()
            if state == "done":
                self._ended()

    def _stops(self, state: str) -> str:
        t, serves = self._view.t, self._job.argv[1] == "serve"
        return t("End at once") if state == "stopping" else t("Stop serving") if serves else t("Stop")

    def _show_progress(self, state: str) -> None:
        t, line = self._view.t, self._line
        done, total, left = (line.get(key) for key in ("done", "total", "seconds_left"))
        self._bar.set_value(done / total if done is not None and total else float(state == "done"))
        parts = [t.progress(str(line.get("stage", "")))]
        if done is not None and total and line.get("unit") == "bytes":
            parts.append(f"{size(done)} / {size(total)}")
        elif done is not None and total:
            parts.append(f"{done:,} / {total:,} {t.progress(line.get('unit', ''))}")
        if left is not None and state in RUNNING:
            parts.append(t("{time} left").format(time=duration(left)))
        record = self._job.record
        if "started" in record:
            took = record.get("ended", time.time()) - record["started"]
            parts.append(
                t("{time} so far" if state in RUNNING else "took {time}").format(time=duration(took))
            )
        if state == "lost":
            parts = [t("Its process is gone: it was killed, or the machine went down.")]
        self._about.set_text(" · ".join(filter(None, parts)))
        shown = {
            t("loss"): ("loss", "{:.4f}"), t("validation loss"): ("eval_loss", "{:.4f}"),
            t("learning rate"): ("learning_rate", "{:.2e}"), t("gradient norm"): ("grad_norm", "{:.2f}"),
            t("tokens/s"): ("tokens_per_s", "{:,.0f}"),
        }  # fmt: skip
        numbers = [f"{name} {form.format(self._figures[key])}" for name, (key, form) in shown.items()
                   if key in self._figures]  # fmt: skip
        if "memory" in self._figures:
            numbers.append(f"{t('memory')} {size(self._figures['memory'])}")
        self._numbers.set_text(" · ".join(numbers))

    def _show_training(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._curve.add(line)
        if lines:
            self._chart.options.update(options({"": self._curve}, curve_names(self._view)))
            self._chart.update()
        self._warning.set_text("\n".join(self._view.t(text) for text in self._curve.warnings()))
        assert self._run is not None
        answers = self._run.answers[-4:]
        self._answers.set_text(
            "\n\n".join(f"{one['current_steps']}: {one['question']}\n→ {one['answer']}" for one in answers)
        )
