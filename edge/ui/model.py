"""The Model tab: what is on the disk, and what can be had."""

from __future__ import annotations

import os
from pathlib import Path

from nicegui import run as background
from nicegui import ui

from edge.artefact.gguf_header import read_header
from edge.errors import EdgeError
from edge.jobs.job import Job, read
from edge.machine import hardware
from edge.ui import view as shared
from edge.ui.view import JobCard, View, size

EMBEDDED = "smollm2-135m-instruct"
_HUBS = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
# Bytes beside the weights: the process, a cache or activations.
_BESIDE = 2**30
# (share of 16-bit weights that a way of loading them takes, its name), the best first.
SERVING = ((1.0, "fits for serving in 16 bits"), (0.55, "fits for serving in 8 bits"),
           (0.33, "fits for serving in 4 bits"))  # fmt: skip
TRAINING = ((1.0, "LoRA fits for training"), (0.33, "QLoRA fits for training"))
# A processor without bfloat16 computes in 32 bits.
TRAINING_IN_32 = ((2.0, TRAINING[0][1]), TRAINING[1])


def build(view: View) -> None:
    _Tab(view)


class _Tab:
    def __init__(self, view: View) -> None:
        self._view, self._t = view, view.t
        t = self._t
        models = view.workspace.models()
        with ui.row().classes("full-width edge-center"):
            self._name = ui.input(t("Hub id, folder or GGUF file"), value="" if models else EMBEDDED).classes(
                "col"
            )
            self._hub = ui.select(_HUBS, label=t("Hub"), value="huggingface")
            ui.button(t("Get the model"), icon="download", on_click=shared.guarded(self._pull))
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        ui.label(
            t(
                "{name} is embedded and needs no hub; a hub id is ORG/NAME. "
                "The hub is {url}; HF_ENDPOINT names another."
            ).format(name=EMBEDDED, url=endpoint)
        ).classes("edge-help")
        self._shown = ui.column().classes("full-width")
        job = view.workspace.job("pull")
        if job is not None and job.state != "done":
            self._follow(job)
        self._lines = ui.column().classes("full-width")
        if models:
            ui.timer(0.01, self._list, once=True)
        else:
            ui.label(t("No model is here yet."))

    async def _list(self) -> None:
        """The models, once the GPUs have answered, which takes a second where there are some."""
        gpus = await background.io_bound(hardware.gpus) or []
        free = hardware.memory().available
        room = max(gpu.memory_free for gpu in gpus) if gpus else free
        halves = gpus or {"avx512_bf16", "bf16"} & {*hardware.cpu_flags()}
        with self._lines:
            for path in self._view.workspace.models():
                self._line(path, free, room, TRAINING if halves else TRAINING_IN_32)

    def _line(self, path: Path, free: int, room: int, ways: tuple[tuple[float, str], ...]) -> None:
        """free: memory that serving may take; room: that training may, in one of these ways."""
        t, name = self._t, self._view.workspace.short(path)
        with ui.row().classes("full-width edge-line"):
            ui.label(name).classes("text-bold")
            ui.label(" · ".join(filter(None, self._facts(path)))).classes("edge-mono col")
            told = [(fitting(path, free, SERVING), t("too large for serving here"))]
            if trainable(path):
                told.append((fitting(path, room, ways), t("too large for training here")))
            for text, otherwise in told:
                ui.badge(t(text) if text else otherwise).props(
                    f"color={'positive' if text else 'warning'}"
                ).tooltip(t("By the weights' size and the memory that is free now; a plan counts exactly."))
            if trainable(path):
                ui.button(t("Train it"), icon="model_training", on_click=lambda: self._train(name)).props(
                    "outline dense"
                )
            else:
                ui.badge(t("for serving only")).props("color=grey")

    def _facts(self, path: Path) -> list[str]:
        config, about = read(path / "config.json") or {}, read(path / "edge.json") or {}
        licence = licence_of(path)
        total = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        facts = [size(total), str(config.get("model_type", ""))]
        if not config and (file := next(path.glob("*.gguf"), None)):
            header = read_header(file)
            licence = licence or str(header.metadata.get("general.license", ""))
            facts[1] = f"{header.metadata.get('general.architecture', '')} {header.file_type}"
        facts.append(str((about.get("settings") or {}).get("source", "")))
        template = (path / "chat_template.jinja").is_file() or about.get("chat_template")
        facts.append(self._t("chat template") if template else self._t("no chat template"))
        return [*facts, licence]

    def _train(self, name: str) -> None:
        self._view.form().set("model_name_or_path", name)
        self._view.go("Train")

    async def _pull(self) -> None:
        name = str(self._name.value or "").strip()
        if not name or name.startswith("-"):
            raise EdgeError(self._t("Name a model first."))
        hub = str(self._hub.value)
        self._follow(
            self._view.workspace.start(["pull", name, *(["--hub", hub] if hub != "huggingface" else [])])
        )

    def _follow(self, job: Job) -> None:
        self._shown.clear()
        with self._shown:
            JobCard(self._view, job, ended=lambda: self._view.go("Model"))


def trainable(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def licence_of(path: Path) -> str:
    """The first line of the model's licence; "" where no file of one came with it."""
    for file in sorted(path.glob("LICENSE*")):
        text = file.read_text(encoding="utf-8", errors="replace")
        return next((line.strip() for line in text.splitlines() if line.strip()), file.name)
    return ""


def fitting(path: Path, free: int, ways: tuple[tuple[float, str], ...]) -> str:
    """The best way in which a model's weights fit into `free` bytes; "" where none does.

    A GGUF is served as it is; of several the largest counts.
    """
    whole = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if not whole:
        whole = max((file.stat().st_size for file in path.glob("*.gguf")), default=0)
        ways = ((1.0, "fits for serving"),)
    return next((text for share, text in ways if whole * share + _BESIDE <= free), "")
