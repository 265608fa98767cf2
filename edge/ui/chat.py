"""The Chat tab: one question to one model or to two, and choices between the answers."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import ui

from edge.errors import EdgeError
from edge.jobs.job import RUNNING, Job
from edge.ui import conversation as talk
from edge.ui import loaded, preferences
from edge.ui import view as shared
from edge.ui.batch import Batch
from edge.ui.conversation import Conversation
from edge.ui.texts import Texts
from edge.ui.view import JobCard, View

_POLL_S, _PAINT_S, _KEEP_S = 0.3, 0.15, 1.0
# Enter sends, but neither with Shift nor while an input method is composing.
_ENTER = "(e) => { if (!e.shiftKey && !e.isComposing) { e.preventDefault(); emit(); } }"
# Of a form that was filled in for another training.
_REPLACED = ("model_name_or_path", "adapter_name_or_path", "create_new_adapter", "output_dir")
_RATE = 5e-6  # of a training on preferences


def build(view: View) -> None:
    names = loaded.names(view.workspace)
    if not names:
        shared.nothing(view, view.t("Nothing to talk to yet: get a model in the Model tab."), "Model")
        return
    _Tab(view, names)


class _Tab:
    def __init__(self, view: View, names: list[str]) -> None:
        self._view, self._t = view, view.t
        self.talk = Conversation(view.workspace.jobs_folder / "chat.json")
        self.talk.models = [name for name in self.talk.models if name in names] or names[:1]
        self._answering: asyncio.Task[None] | None = None
        self._panes: list[_Pane] = []
        self._known: dict[str, bool] = {}
        t = self._t
        with ui.row().classes("full-width edge-center"):
            self._choice(0, t("Model A"), names)
            self._choice(1, t("Model B, or the same for two answers"), names)
        self._loaded = ui.row().classes("full-width edge-center")
        self._settings()
        self._jobs = ui.column().classes("full-width")
        self._turns = ui.column().classes("full-width")
        with ui.row().classes("full-width edge-center no-wrap edge-composer"):
            self._question = ui.textarea(t("Question")).classes("col").props("autogrow outlined dense rows=1")
            self._question.on("keydown.enter", shared.guarded(self._send), js_handler=_ENTER)
            self._button = ui.button(icon="send", on_click=shared.guarded(self._send_or_stop))
        with ui.row().classes("full-width edge-center"):
            ui.button(t("New chat"), icon="add_comment", on_click=self._clear).props("flat dense")
            ui.button(t("Save as JSON"), icon="download", on_click=self._save).props("flat dense")
            batch = Batch(view, self.talk)
            self._choices = ui.row().classes("edge-center")
        batch.show()
        self._show_loaded()
        self._show()
        ui.timer(2.0, self._show_loaded)

    # What answers

    def _choice(self, side: int, label: str, names: list[str]) -> None:
        models = self.talk.models

        def choose(event: Any) -> None:
            kept = [*models, "", ""][:2]
            kept[side] = event.value or ""
            models[:] = list(filter(None, kept))
            self.talk.keep()

        value = models[side] if side < len(models) else None
        ui.select(
            names, label=label, value=value, with_input=True, clearable=side > 0, on_change=choose
        ).classes("col")

    def _settings(self) -> None:
        t = self._t

        def keep(key: str, kind: Callable[[str], Any], event: Any) -> None:
            try:
                setattr(self.talk, key, kind(event.value or ""))
            except ValueError:
                return
            self.talk.keep()

        with ui.expansion(t("System prompt and sampling"), icon="tune").classes("full-width"):
            ui.textarea(
                t("System prompt"), value=self.talk.system, on_change=functools.partial(keep, "system", str)
            ).classes("full-width").props("autogrow rows=2")
            with ui.row().classes("full-width"):
                for key, label, kind in (
                    ("temperature", t("Temperature"), float), ("max_tokens", t("Tokens at most"), int)
                ):  # fmt: skip
                    ui.input(
                        label,
                        value=str(getattr(self.talk, key)),
                        on_change=functools.partial(keep, key, kind),
                    ).classes("col")

    def _show_loaded(self) -> None:
        running = loaded.servers(self._view.workspace)
        now = {name: bool(server.url) for name, server in running.items()}
        if self._known == now:
            return
        self._known = now
        self._loaded.clear()
        with self._loaded:
            for server in running.values():
                shared.loaded_model(self._view, server, self._show_loaded)

    async def _url(self, name: str) -> str:
        """The address of the model's server, which is started where it is not there yet.

        Raises EdgeError with the message of the job that failed.
        """
        workspace = self._view.workspace
        while not self._jobs.is_deleted:
            if (server := loaded.servers(workspace).get(name)) is not None:
                job = server.job
            else:
                argv = loaded.commands(workspace, name)[0]
                same = [one for one in workspace.jobs() if one.argv[1:] == argv and one.state in RUNNING]
                job = same[-1] if same else workspace.start(argv)
            if url := await self._ready(job):
                return url
        raise asyncio.CancelledError

    async def _ready(self, job: Job) -> str:
        """Wait until a job has done what it is for; of a server its address."""
        serves = job.argv[1] == "serve"
        with self._jobs:
            place = ui.column().classes("full-width")
        with place:
            if not serves:
                JobCard(self._view, job)
        self._show_loaded()
        url = ""
        try:
            while job.state in RUNNING and not url and not place.is_deleted:
                line = job.last_line
                if serves and line.get("stage") == "ready":
                    url = str(line["url"])
                await asyncio.sleep(_POLL_S)
        finally:
            if not place.is_deleted:
                place.delete()
        if job.state in ("failed", "stopped", "lost"):
            line = job.last_line
            raise EdgeError(
                str(line.get("error") or job.log()[-500:] or job.state), str(line.get("hint", ""))
            )
        return url

    # Questions

    async def _send_or_stop(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
        else:
            await self._send()

    async def _send(self) -> None:
        question = str(self._question.value or "").strip()
        if question and self._answering is None:
            self._question.set_value("")
            self.talk.ask(question)
            await self._answer()

    async def _again(self, turn: int, question: str) -> None:
        """Ask from a turn on once more; what came after it is dropped."""
        if self._answering is None and question.strip():
            del self.talk.turns[turn:]
            self.talk.ask(question.strip())
            await self._answer()

    async def _answer(self) -> None:
        """Have the last turn answered, by all sides at once, until that is done or stopped."""
        self._answering = task = asyncio.create_task(self._sides(len(self.talk.turns) - 1))
        with self._turns:  # the button that was pressed is drawn anew, and no place to speak from
            self._show()
            ui.run_javascript("window.scrollTo(0, document.body.scrollHeight)")
            await asyncio.wait({task})
            self._answering = None
            if self._turns.is_deleted:
                return
            self.talk.keep()
            self._show()
            if not task.cancelled() and (error := task.exception()):
                shared.complain(error)
                if not isinstance(error, EdgeError):
                    raise error

    async def _sides(self, turn: int) -> None:
        models = self.talk.models
        urls = {name: await self._url(name) for name in dict.fromkeys(models)}
        sides = (self._side(turn, side, urls[name]) for side, name in enumerate(models))
        for error in await asyncio.gather(*sides, return_exceptions=True):
            if error is not None:
                raise error

    async def _side(self, turn: int, side: int, url: str) -> None:
        answer = self.talk.turns[turn]["answers"][side]
        painted = kept = 0.0
        async for reasoning, text in talk.stream(
            url, answer["model"], self.talk.messages(turn, side),
            temperature=self.talk.temperature, max_tokens=self.talk.max_tokens,
        ):  # fmt: skip
            if self._turns.is_deleted:
                return
            answer["reasoning"] += reasoning
            answer["content"] += text
            now = time.monotonic()
            if now - painted > _PAINT_S:
                painted = now
                self._panes[side].paint(answer)
            if now - kept > _KEEP_S:
                kept = now
                self.talk.keep()

    # What was said

    def _show(self) -> None:
        t, busy = self._t, self._answering is not None
        self._button.set_icon("stop" if busy else "send")
        self._button.props(f'aria-label="{t("Stop") if busy else t("Send")}"')
        self._turns.clear()
        with self._turns:
            for number, turn in enumerate(self.talk.turns):
                self._turn(number, turn, last=number == len(self.talk.turns) - 1, busy=busy)
        self._choices.clear()
        with self._choices:
            for stage, text in (
                ("dpo", t("Train DPO on choices ({count})")),
                ("kto", t("Train KTO on thumbs ({count})")),
            ):
                if count := preferences.count(self._folder, stage):
                    ui.button(
                        text.format(count=count), icon="model_training",
                        on_click=shared.guarded(functools.partial(self._train, stage)),
                    ).props("outline dense")  # fmt: skip

    def _turn(self, number: int, turn: dict[str, Any], *, last: bool, busy: bool) -> None:
        t, answers = self._t, turn["answers"]
        with ui.row().classes("full-width edge-center no-wrap edge-question"):
            shared.words(turn["question"]).classes("col")
            if not busy:
                ui.button(icon="edit", on_click=lambda: self._edit(number, turn["question"])).props(
                    f'flat dense size=sm aria-label="{t("Edit")}"'
                )
        self._panes = []
        with ui.element("div").classes("edge-answers full-width"):
            for side, answer in enumerate(answers):
                with ui.column().classes("edge-answer edge-tight"):
                    letter = f"{'AB'[side]} · " if len(answers) > 1 else ""
                    best = turn["chosen"] == side
                    ui.label(letter + answer["model"] + (" ✓" if best else "")).classes("edge-help")
                    self._panes.append(_Pane(self._t, answer))
                    if answer["content"] and not busy:
                        self._thumbs(number, side, answer)
        if not last or busy:
            return
        with ui.row().classes("edge-center"):
            if self.talk.comparable(number):
                for side, text in enumerate((t("A is better"), t("B is better"))):
                    ui.button(
                        text,
                        icon="thumb_up",
                        on_click=shared.guarded(functools.partial(self._prefer, number, side)),
                    ).props("dense" if turn["chosen"] == side else "outline dense")
            ui.button(
                t("Regenerate"), icon="refresh",
                on_click=shared.guarded(functools.partial(self._again, number, turn["question"])),
            ).props("flat dense")  # fmt: skip

    def _thumbs(self, number: int, side: int, answer: dict[str, Any]) -> None:
        t = self._t
        with ui.row().classes("edge-tight"):
            for good, icon, text in (
                (True, "thumb_up", t("A good answer")),
                (False, "thumb_down", t("A bad answer")),
            ):
                flag = functools.partial(self._flag, number, side, good)
                colour = "primary" if answer["good"] is good else "grey"
                ui.button(icon=icon, on_click=shared.guarded(flag)).props(
                    f'flat dense size=sm aria-label="{text}" color={colour}'
                )
            ui.button(icon="content_copy", on_click=lambda: ui.clipboard.write(answer["content"])).props(
                f'flat dense size=sm color=grey aria-label="{t("Copy")}"'
            )

    def _edit(self, number: int, question: str) -> None:
        t = self._t
        with ui.dialog() as dialog, ui.card().classes("edge-wide"):
            text = ui.textarea(t("Question"), value=question).classes("full-width").props("autogrow")

            async def ask() -> None:
                dialog.close()
                await self._again(number, str(text.value or ""))

            ui.button(t("Ask again"), icon="send", on_click=shared.guarded(ask))
        dialog.open()

    def _clear(self) -> None:
        if self._answering is None:
            self.talk.turns.clear()
            self.talk.keep()
            self._show()

    def _save(self) -> None:
        text = json.dumps(self.talk.record(), ensure_ascii=False, indent=2) + "\n"
        ui.download.content(text, f"chat-{time.strftime('%Y%m%d-%H%M%S')}.json")

    # Choices

    @property
    def _folder(self) -> Path:
        return self._view.workspace.root / str(self._view.form().values.get("dataset_dir", "data"))

    async def _prefer(self, number: int, side: int) -> None:
        turn = self.talk.turns[number]
        chosen, rejected = (turn["answers"][index]["content"] for index in (side, 1 - side))
        preferences.prefer(self._folder, self.talk.messages(number, side), chosen, rejected)
        turn["chosen"] = side
        self.talk.keep()
        self._show()

    async def _flag(self, number: int, side: int, good: bool) -> None:
        answer = self.talk.turns[number]["answers"][side]
        preferences.flag(self._folder, self.talk.messages(number, side), answer["content"], good)
        answer["good"] = good
        self.talk.keep()
        self._show()

    async def _train(self, stage: str) -> None:
        """Open the Train tab on the choices, with model A as what is trained."""
        form = self._view.form()
        before = {key: value for key, value in form.values.items() if key not in _REPLACED}
        subject = loaded.trained(self._view.workspace, self.talk.models[0])
        chosen = {"stage": stage, "learning_rate": _RATE, "dataset": [preferences.NAMES[stage]]}
        form.replace({**before, **subject, **chosen})
        self._view.go("Train")


class _Pane:
    """One answer as it grows."""

    def __init__(self, t: Texts, answer: dict[str, Any]) -> None:
        with ui.expansion(t("Reasoning"), icon="psychology").classes("full-width") as self._fold:
            self._reasoning = shared.words()
        self._text = ui.html(sanitize=True).classes("full-width edge-markdown")
        self.paint(answer)

    def paint(self, answer: dict[str, Any]) -> None:
        self._fold.set_visibility(bool(answer["reasoning"]))
        self._reasoning.set_text(answer["reasoning"])
        self._text.set_content(talk.html(answer["content"]))
