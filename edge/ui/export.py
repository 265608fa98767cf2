"""The Export tab: a run merged, exported with its proof, and served."""

from __future__ import annotations

import functools
import os
from typing import Any

from nicegui import ui

from edge.artefact import manifest
from edge.errors import EdgeError
from edge.jobs.job import RUNNING, Job, read
from edge.server.access import KEY_VARIABLE
from edge.ui import view as shared
from edge.ui.view import JobCard, View, size
from edge.ui.workspace import Run

# "" leaves the choice to the command, by the model's size.
QUANTS = ("", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
PRECISIONS = ("", "int4", "int8", "fp16", "fp32")
_LADDER = "ladder"
_VERBS = ("merge", "export", "serve")


def build(view: View) -> None:
    runs = [run for run in view.workspace.runs() if run.stages]
    if not runs:
        ui.label(view.t("No run with a result yet: train first."))
        return
    names = [run.name for run in runs]
    place = ui.column().classes("full-width")

    def choose(name: str) -> None:
        place.clear()
        with place:
            _Export(view, next(run for run in runs if run.name == name))

    with ui.row().classes("full-width") as row:
        ui.select(
            names, label=view.t("Run"), value=names[0], on_change=lambda event: choose(event.value)
        ).classes("full-width")
    row.move(target_index=0)
    choose(names[0])


class _Export:
    def __init__(self, view: View, run: Run) -> None:
        self._view, self._t, self._run = view, view.t, run
        self._path = view.workspace.short(run.folder)
        t = self._t
        with ui.row().classes("full-width edge-center"):
            self._quant = ui.select(
                {**{name: name or t("by size") for name in QUANTS}, _LADDER: t("measure several here")},
                label="GGUF", value="",
            ).classes("col")  # fmt: skip
            self._button(t("Export GGUF"), self._gguf)
            self._precision = ui.select(
                {name: name or t("by size") for name in PRECISIONS}, label="ONNX", value=""
            ).classes("col")
            self._button(t("Export ONNX"), self._onnx)
        with ui.row().classes("full-width edge-center"):
            self._button(t("Merge"), self._merge)
            self._button(t("Export LoRA"), functools.partial(self._export, "lora", needs=""))
            self._button(t("For Ollama"), functools.partial(self._export, "ollama", needs="gguf"))
            self._overwrite = ui.checkbox(t("Replace an earlier result"))
        self._jobs = ui.column().classes("full-width")
        for job in view.workspace.jobs():
            if job.argv[1] in _VERBS and self._path in job.argv and job.state in (*RUNNING, "failed", "lost"):
                self._follow(job)
        self._proofs()
        self._ladder()
        if {"gguf", "onnx"} & set(run.stages):
            self._serving()

    def _button(self, text: str, action: Any) -> None:
        ui.button(text, on_click=shared.guarded(action)).props("outline")

    def _start(self, *argv: str) -> None:
        self._follow(self._view.workspace.start([*argv]))

    def _follow(self, job: Job) -> None:
        with self._jobs:
            serves = job.argv[1] == "serve"
            JobCard(self._view, job, ended=lambda: None if serves else self._view.go("Export"))
            if serves and job.state in RUNNING:
                self._snippets(job)

    # Exports

    async def _merge(self) -> None:
        self._start("merge", self._path, *self._replace())

    async def _gguf(self) -> None:
        chosen = self._quant.value
        options = ["--ladder"] if chosen == _LADDER else ["--quant", chosen] if chosen else []
        await self._export("gguf", *options, needs="merged")

    async def _onnx(self) -> None:
        chosen = self._precision.value
        await self._export("onnx", *(["--precision", chosen] if chosen else []), needs="merged")

    async def _export(self, kind: str, *options: str, needs: str) -> None:
        """Start an export, behind the merge that it needs."""
        if needs == "gguf" and needs not in self._run.stages:
            raise EdgeError(self._t("Export GGUF first."))
        if needs == "merged" and needs not in self._run.stages:
            self._start("merge", self._path)
        replace = self._replace() if kind != "ollama" else []
        self._start("export", kind, self._path, *options, *replace)

    def _replace(self) -> list[str]:
        return ["--overwrite"] if self._overwrite.value else []

    # What there is

    def _proofs(self) -> None:
        """Each stage with what was compared, in plain words."""
        t = self._t
        for stage in self._run.stages:
            folder = self._run.folder / stage
            about = read(folder / manifest.FILE) or {}
            total = sum(file.get("size", 0) for file in (about.get("files") or {}).values())
            verify = about.get("verify") or {}
            with ui.row().classes("full-width edge-line"):
                ui.label(f"{self._path}/{stage}").classes("text-bold")
                ui.label(" · ".join(filter(None, (size(total), str(verify.get("kind", "")))))).classes(
                    "edge-mono col"
                )
                for text, good in proof(verify):
                    ui.badge(t(text)).props(f"color={'positive' if good else 'negative'}")
            logits = verify.get("logits") or {}
            if "kl_mean" in logits:
                text = t(
                    "{equal} of the most likely next tokens are the same; the mean KL divergence is {kl}"
                )
                shared.words(text.format(equal=f"{logits['top1']:.1%}", kl=f"{logits['kl_mean']:.1e}"))
            shared.words("\n".join(map(str, verify.get("warnings") or []))).classes("edge-warning")

    def _ladder(self) -> None:
        record = read(self._run.folder / "gguf" / "ladder.json")
        if record is None:
            return
        t = self._t
        titles = {"type": t("type"), "size": t("size"), "decode": t("tokens/s"), "kl": "KL", "": ""}
        rows = []
        for candidate in record["rungs"]:
            name = (
                f"{candidate['quant']} + {candidate['rounding']}"
                if candidate["rounding"]
                else candidate["quant"]
            )
            best = t("recommended") if name == record["chosen"] else ""
            rows.append({"type": name, "size": size(candidate["size"]), "decode": candidate["decode"],
                         "kl": f"{candidate['kl']:.2e}", "": best})  # fmt: skip
        shared.table(titles, rows)

    # Serving

    def _serving(self) -> None:
        t = self._t
        with ui.row().classes("full-width edge-center"):
            port = ui.input(t("Port"), value="8000").classes("col")

            async def serve() -> None:
                if not str(port.value).isdecimal():
                    raise EdgeError(t("A port is a number."))
                self._start("serve", self._path, "--port", str(port.value))

            self._button(t("Serve it"), serve)

    def _snippets(self, job: Job) -> None:
        """How to ask what is served."""
        url = f"http://127.0.0.1:{job.argv[job.argv.index('--port') + 1]}"
        body = '{"messages": [{"role": "user", "content": "Hello"}]}'
        # The server has the page's environment, and so its key.
        keyed = bool(os.environ.get(KEY_VARIABLE))
        key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if keyed else ""
        ui.link(url, url, new_tab=True)
        ui.code(
            f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
            language="bash",
        ).classes("full-width")
        secret = f'os.environ["{KEY_VARIABLE}"]' if keyed else '"none"'
        ui.code(
            "import os\n\nfrom openai import OpenAI\n\n"
            f"client = OpenAI(base_url='{url}/v1', api_key={secret})\n"
            f"answer = client.chat.completions.create(model='{self._run.name}', "
            "messages=[{'role': 'user', 'content': 'Hello'}])\n"
            "print(answer.choices[0].message.content)",
            language="python",
        ).classes("full-width")


def proof(verify: dict[str, Any]) -> list[tuple[str, bool]]:
    """(words, whether it is equal) of what was compared with the stage before."""
    words = {
        "chat_template": ("same chat template", "another chat template"),
        "token_ids": ("same token ids", "other token ids"),
        "stops": ("same stop tokens", "other stop tokens"),
    }
    return [
        (pair[verify[key] != "equal"], verify[key] == "equal") for key, pair in words.items() if key in verify
    ]
