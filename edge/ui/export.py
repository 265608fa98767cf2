"""The Export tab: a run merged, exported with its proof, and served."""

from __future__ import annotations

import functools
import json
import os
import shlex
from typing import Any

from nicegui import ui

from edge.artefact import manifest
from edge.errors import EdgeError
from edge.jobs.job import RUNNING, Job, read
from edge.server.access import KEY_VARIABLE, read_keys
from edge.ui import proof
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
        shared.nothing(view, view.t("No run with a result yet: train first."), "Train")
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
        ui.label(
            t(
                "GGUF is what a laptop runs: here, in Ollama and in LM Studio. "
                "What an export needs is merged first."
            )
        ).classes("edge-help")
        self._jobs = ui.column().classes("full-width")
        self._proofs()
        self._ladder()
        if {"gguf", "onnx"} & set(run.stages):
            self._serving()
        else:
            ui.label(t("What is exported as GGUF or ONNX can be served here.")).classes("edge-help")
        self._served = ui.column().classes("full-width")
        for job in view.workspace.jobs():
            if job.argv[1] in _VERBS and self._path in job.argv and job.state in (*RUNNING, "failed", "lost"):
                self._follow(job)

    def _button(self, text: str, action: Any) -> None:
        ui.button(text, on_click=shared.guarded(action)).props("outline")

    def _start(self, *argv: str) -> None:
        self._follow(self._view.workspace.start([*argv]))

    def _follow(self, job: Job) -> None:
        serves = job.argv[1] == "serve"
        with self._served if serves else self._jobs:
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
            about = read(self._run.folder / stage / manifest.FILE) or {}
            total = sum(file.get("size", 0) for file in (about.get("files") or {}).values())
            verify = about.get("verify") or {}
            with ui.row().classes("full-width edge-line"):
                ui.label(f"{self._path}/{stage}").classes("text-bold")
                ui.label(" · ".join(filter(None, (size(total), str(verify.get("kind", "")))))).classes(
                    "edge-mono col"
                )
            if rows := proof.rows(verify, t):
                before = str((verify.get("against") or {}).get("stage", ""))
                titles = {"name": t("compared with {stage}").format(stage=before), "result": t("result"),
                          "meaning": t("what it means")}  # fmt: skip
                shared.table(titles, rows)
            shared.words("\n".join(map(str, verify.get("warnings") or []))).classes("edge-warning")

    def _ladder(self) -> None:
        record = read(self._run.folder / "gguf" / "ladder.json")
        if record is None:
            return
        t = self._t
        titles = {"type": t("type"), "size": t("size"), "decode": t("tokens/s"), "kl": "KL"}
        rows = []
        for candidate in record["rungs"]:
            name = " + ".join(filter(None, (candidate["quant"], candidate["rounding"])))
            best = f" ✓ {t('recommended')}" if name == record["chosen"] else ""
            rows.append({"type": name + best, "size": size(candidate["size"]),
                         "decode": f"{candidate['decode']:.0f}", "kl": f"{candidate['kl']:.2g}"})  # fmt: skip
        shared.table(titles, rows)

    # Serving

    def _serving(self) -> None:
        t = self._t
        with ui.row().classes("full-width edge-center"):
            port = ui.input(t("Port"), value="8000").classes("col")
            key = ui.input(t("API key, empty for none")).classes("col").props("autocomplete=off")

            async def serve() -> None:
                if not str(port.value).isdecimal() or not 0 < int(port.value) < 2**16:
                    raise EdgeError(t("A port is a number from 1 to 65535."))
                options = ["--api-key-file", self._key_file(port.value, key.value)] if key.value else []
                self._start("serve", self._path, "--port", str(port.value), *options)

            self._button(t("Serve it"), serve)

    def _key_file(self, port: str, key: str) -> str:
        """Keep the key where this user alone can read it, not in a command that all can see; its path."""
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise EdgeError(self._t("A key has ASCII letters, digits and signs, and no spaces."))
        path = self._view.workspace.jobs_folder / f"key-{port}.txt"
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(key + "\n", encoding="utf-8")
        return self._view.workspace.short(path)

    def _snippets(self, job: Job) -> None:
        """How to ask what is served."""
        url = f"http://127.0.0.1:{job.argv[job.argv.index('--port') + 1]}"
        question = self._t("Hello!")
        body = json.dumps({"messages": [{"role": "user", "content": question}]}, ensure_ascii=False)
        curl = shlex.join(["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"])
        imports, secret = "", '"none"'
        if "--api-key-file" in job.argv:
            file = self._view.workspace.root / job.argv[job.argv.index("--api-key-file") + 1]
            key = read_keys(file, "")[0]
            curl += " -H " + shlex.quote(f"Authorization: Bearer {key}")
            secret = json.dumps(key)
        elif os.environ.get(KEY_VARIABLE):
            # The server has the page's environment, and so its key.
            curl += f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
            imports, secret = "import os\n\n", f'os.environ["{KEY_VARIABLE}"]'
        ui.link(url, url, new_tab=True)
        ui.code(f"{curl} -d {shlex.quote(body)}", language="bash").classes("full-width")
        ui.code(
            f"{imports}from openai import OpenAI\n\n"
            f'client = OpenAI(base_url="{url}/v1", api_key={secret})\n'
            f'messages = [{{"role": "user", "content": "{question}"}}]\n'
            f'answer = client.chat.completions.create(model="{self._run.name}", messages=messages)\n'
            "print(answer.choices[0].message.content)",
            language="python",
        ).classes("full-width")
