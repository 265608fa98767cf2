"""The Train tab: a form made of the configuration's JSON Schema, and the training that it starts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from nicegui import ui

from edge.errors import EdgeError, InputError
from edge.jobs.job import read
from edge.ui import loaded
from edge.ui import view as shared
from edge.ui.texts import HELP
from edge.ui.view import JobCard, View
from edge.ui.workspace import Run, read_yaml, schema

# Chosen above the form, or decided by the page.
_ABOVE = ("model_name_or_path", "dataset", "dataset_dir", "output_dir")
_HIDDEN = ("overwrite_output_dir", "resume_from_checkpoint", "bf16", "fp16")
_COMPUTE = ("bf16", "fp16")
PRESETS: dict[str, dict[str, Any]] = {
    "LoRA, 16 bits": {
        "stage": None,
        "finetuning_type": None,
        "quantization_bit": None,
        "learning_rate": 2e-4,
    },
    "QLoRA, 4 bits": {"stage": None, "finetuning_type": None, "quantization_bit": 4, "learning_rate": 2e-4},
    "All weights": {
        "stage": None,
        "finetuning_type": "full",
        "quantization_bit": None,
        "learning_rate": 1e-5,
    },
    "DPO on preferences": {"stage": "dpo", "finetuning_type": None, "learning_rate": 5e-6},
}


def build(view: View) -> None:
    _Tab(view)


class _Tab:
    def __init__(self, view: View) -> None:
        self._view, self._t = view, view.t
        self.form = view.form()
        self._inputs = ui.column().classes("full-width")
        with self._inputs:
            self._fill()
        upload = ui.upload(auto_upload=True, on_upload=self._load).props('accept=".yaml,.yml"')
        upload.classes("hidden")
        with ui.row().classes("full-width edge-center edge-bar"):
            ui.button(self._t("Start training"), icon="play_arrow", on_click=shared.guarded(self._start))
            ui.button(self._t("Preview"), icon="visibility", on_click=shared.guarded(self._preview)).props(
                "outline"
            )
            ui.button(self._t("Save"), icon="save", on_click=shared.guarded(self._save)).props("outline")
            ui.button(
                self._t("Load a configuration"),
                icon="upload_file",
                on_click=lambda: upload.run_method("pickFiles"),
            ).props("outline").tooltip(self._t("A YAML file, LLaMA-Factory's too."))
            self._overwrite = ui.checkbox(self._t("Replace an earlier result"))
        self._shown = ui.column().classes("full-width")
        if job := view.workspace.job("train"):
            self._follow(job)

    # The form

    def _fill(self) -> None:
        properties = schema()["properties"]
        groups: dict[str, dict[str, Any]] = {}
        for key, about in properties.items():
            if about["x-status"] == "honoured" and key not in (*HELP, *_ABOVE, *_HIDDEN):
                groups.setdefault(self._t.of(about, "x-group"), {})[key] = about
        self._choices()
        with ui.element("div").classes("edge-grid full-width"):
            for key in HELP:
                with ui.column().classes("edge-tight"):
                    if key == "compute":
                        self._compute()
                    else:
                        self._input(key, properties[key])
                    ui.label(self._t.help(key)).classes("edge-help")
        with ui.expansion(self._t("More settings"), icon="tune").classes("full-width"):
            for group, keys in groups.items():
                with (
                    ui.expansion(group).classes("full-width"),
                    ui.element("div").classes("edge-grid full-width"),
                ):
                    for key, about in keys.items():
                        with ui.column().classes("edge-tight"):
                            self._input(key, about)
                            ui.label(self._t.of(about, "description")).classes("edge-help")

    def _choices(self) -> None:
        """What is trained, on what, under which name."""
        t, values, workspace = self._t, self.form.values, self._view.workspace
        models = [workspace.short(path) for path in workspace.models()]
        if resumed := values.get("resume_from_checkpoint"):
            with ui.row().classes("full-width edge-center"):
                shared.words(
                    t(
                        "Goes on from {name}: learning rate, schedule and length may change, nothing else."
                    ).format(name=resumed)
                ).classes("col")
                ui.button(
                    t("Begin anew instead"), on_click=lambda: self._change({"resume_from_checkpoint": None})
                ).props("outline dense")
        with ui.element("div").classes("edge-grid full-width"):
            self._select("model_name_or_path", t("Base model"), models)
            folder = ui.input(t("Folder of the data sets"), value=values.get("dataset_dir", "data"))
            folder.classes("full-width").on("change", lambda: self._set_folder(folder.value))
            info = read(workspace.root / str(values.get("dataset_dir", "data")) / "dataset_info.json") or {}
            self._select("dataset", t("Data sets"), list(info), several=True)
            with ui.column().classes("edge-tight"):
                name = Path(str(values.get("output_dir", ""))).name
                ui.input(
                    t("Name of the run"),
                    value=name,
                    on_change=lambda event: self.form.set(
                        "output_dir", event.value and f"runs/{event.value}"
                    ),
                ).classes("full-width")
                ui.label(
                    t("Letters, digits, dots, dashes and underscores; the folder is runs/NAME.")
                ).classes("edge-help")
            ui.select(
                {name: t(name) for name in PRESETS},
                label=t("Preset"),
                on_change=lambda event: self._change(PRESETS[event.value]),
            ).classes("full-width")

    def _select(self, key: str, label: str, options: list[str], *, several: bool = False) -> None:
        value = self.form.values.get(key)
        if several:
            value = [one.strip() for one in value.split(",")] if isinstance(value, str) else value or []
        chosen = value if isinstance(value, list) else [value] if value else []
        known = [*options, *(one for one in chosen if one not in options)]
        ui.select(
            known,
            label=label,
            value=value,
            multiple=several,
            with_input=True,
            new_value_mode="add-unique",
            on_change=lambda event: self.form.set(key, event.value),
        ).classes("full-width").props("use-chips" if several else "clearable")

    def _input(self, key: str, about: dict[str, Any]) -> None:
        value, default = self.form.values.get(key), about.get("default")
        kinds = about.get("type", ())
        if "boolean" in kinds and "string" not in kinds:
            on = bool(default if value is None else value)
            ui.switch(
                self._t.key(key), value=on, on_change=lambda event: self._switch(key, event.value, default)
            )
        elif "enum" in about and "type" not in about:
            plain = [one for one in about["enum"] if one not in (None, "None", "none", "4", False)]
            names = {one: str(one) for one in [*plain, *([value] if value not in (None, *plain) else [])]}
            ui.select(
                names, label=self._t.key(key), value=value, clearable=True,
                on_change=lambda event: self.form.set(key, event.value),
            ).classes("full-width").props("stack-label")  # fmt: skip
        else:
            hint = "" if default is None else self._t("Default: {value}").format(value=default)
            ui.input(
                self._t.key(key), value="" if value is None else shown(value), placeholder=hint,
                on_change=lambda event: self.form.set(key, event.value),
            ).classes("full-width").props("stack-label")  # fmt: skip

    def _switch(self, key: str, on: bool, default: Any) -> None:
        self.form.set(key, None if on == bool(default) else on)

    def _compute(self) -> None:
        values = self.form.values
        ui.select(
            {"": self._t("automatic"), **{kind: kind for kind in _COMPUTE}},
            label=self._t("computation type"),
            value=next((kind for kind in _COMPUTE if values.get(kind)), ""),
            on_change=lambda event: self._set_compute(event.value),
        ).classes("full-width")

    def _set_compute(self, chosen: str) -> None:
        for kind in _COMPUTE:
            self.form.set(kind, kind == chosen or None)

    def _set_folder(self, folder: str) -> None:
        self._change({"dataset_dir": folder, "dataset": None})

    def _change(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            self.form.set(key, value)
        self._inputs.clear()
        with self._inputs:
            self._fill()

    async def _load(self, event: Any) -> None:
        try:
            values = read_yaml((await event.file.read()).decode("utf-8-sig"))
        except (InputError, UnicodeDecodeError) as error:
            shared.complain(f"{event.file.name}: {error}")
            return
        self.form.replace(values)
        self._change({})
        ui.notify(self._t("{name} was read.").format(name=event.file.name), type="positive")

    # Training

    async def _write(self) -> str:
        """Write the configuration beside the run's folder, have `edge train` check it; its path."""
        if not all(self.form.values.get(key) for key in ("model_name_or_path", "dataset")):
            raise EdgeError(self._t("Choose a base model and at least one data set."))
        if "output_dir" not in self.form.values:
            self._change({"output_dir": f"runs/{self._view.workspace.free_name('run')}"})
        try:
            name = self.form.name
        except InputError as error:
            raise EdgeError(
                self._t(
                    "A run's name begins with a letter or digit; dots, dashes and underscores may follow."
                )
            ) from error
        path = self._view.workspace.root / "runs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.form.yaml(), encoding="utf-8")
        await self._view.ask("train", self._view.workspace.short(path), "--print-config")
        return self._view.workspace.short(path)

    def _argv(self, path: str) -> list[str]:
        return ["train", path, *(["--overwrite"] if self._overwrite.value else [])]

    async def _save(self) -> None:
        path = await self._write()
        ui.notify(self._t("Saved as {name}.").format(name=path), type="positive")

    async def _preview(self) -> None:
        path = await self._write()
        with ui.dialog() as dialog, ui.card().classes("edge-wide") as card:
            ui.label(self._t("Command"))
            ui.code("edge " + shlex.join(self._argv(path)), language="bash").classes("full-width")
            ui.label(self._t("Configuration")).tooltip(path)
            ui.code(self.form.yaml(), language="yaml").classes("full-width")
            plan = shared.words(self._t("Steps, memory and time are being worked out …"))
        dialog.open()
        if self._merges():
            plan.set_visibility(False)
            return
        try:
            found = await self._view.ask(*self._argv(path), "--plan")
        except EdgeError as error:
            plan.set_text(str(error))
            plan.classes("text-negative")
            return
        plan.set_text(self._planned(found))
        with card:
            shared.words("\n".join(found["notes"])).classes("edge-warning")
        if not found["seconds"]:
            with card:
                self._offer_to_try(path, plan)

    def _planned(self, found: dict[str, Any]) -> str:
        """Steps, memory and time in words, with where the time is from."""
        text = self._t(
            "{rows} rows, {held} held out, {steps} steps on {device}; {memory} of memory, {free} are free"
        ).format(
            rows=f"{found['rows']:,}", held=f"{found['held_out']:,}", steps=f"{found['steps']:,}",
            device=found["device"], memory=shared.size(found["memory"]), free=shared.size(found["free"]),
        )  # fmt: skip
        if not found["seconds"]:
            return f"{text}\n" + self._t(
                "How long it takes is not known: no training of this kind has ended here yet."
            )
        source = Path(found["speed_of"])
        where = self._view.workspace.short(source) if source.is_absolute() else self._t("steps just tried")
        return f"{text}\n" + self._t(
            "About {time}, by the {speed} tokens/s of: {source}. Evaluations and checkpoints come on top."
        ).format(time=shared.duration(found["seconds"]), speed=f"{found['speed']:,.0f}", source=where)

    def _offer_to_try(self, path: str, plan: Any) -> None:
        """A button that has a few steps tried, as a job, and says then how long all of them take."""
        place = ui.column().classes("full-width")

        async def start() -> None:
            job = self._view.workspace.start([*self._argv(path), "--plan", "--measure"])
            place.clear()
            with place:
                JobCard(self._view, job, ended=lambda: plan.set_text(self._planned(job.last_line["result"])))

        with place:
            ui.button(self._t("Try a few steps"), icon="timer", on_click=shared.guarded(start)).props(
                "outline"
            )

    async def _start(self) -> None:
        path = await self._write()
        if loaded.servers(self._view.workspace) and not self._merges():
            try:
                await self._view.ask(*self._argv(path), "--plan")
            except EdgeError as error:
                self._name_loaded(str(error))
                return
        self._follow(self._view.workspace.start(self._argv(path)))

    def _merges(self) -> bool:
        """Whether to plan the training is to merge an earlier adapter first."""
        return bool(self.form.values.get("create_new_adapter"))

    def _name_loaded(self, problem: str) -> None:
        """Why the training cannot start, and the loaded models, which may hold the memory that it lacks."""
        self._shown.clear()
        with self._shown:
            shared.words(problem).classes("text-negative")
            ui.label(self._t("Models that are loaded hold memory: unload them, and start again."))
            place = ui.column()

        def show() -> None:
            place.clear()
            with place:
                for server in loaded.servers(self._view.workspace).values():
                    shared.loaded_model(self._view, server, show)

        show()

    def _follow(self, job: Any) -> None:
        folder = self._view.workspace.root / job.argv[2].removesuffix(".yaml")
        self._shown.clear()
        with self._shown:
            JobCard(self._view, job, training=Run(folder))


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
