"""The Data tab: files and dataset_info.json, kept whole by the page; and what a model would learn of them."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from nicegui import run, ui

from edge.errors import EdgeError, InputError
from edge.ui import datasets
from edge.ui import view as shared
from edge.ui.row_editor import RowEditor
from edge.ui.view import View

# Rows that are shown token by token, and reasons that are listed.
_ROWS, _REASONS, _BARS = 5, 50, 24
_NUMBER = re.compile(r", row (\d+)")


def build(view: View) -> None:
    _Tab(view)


class _Tab:
    def __init__(self, view: View) -> None:
        self._view, self._t = view, view.t
        self._folder_name = str(view.form().values.get("dataset_dir", "data"))
        # Outlives what `_show` makes anew.
        self._dialogs = ui.element()
        self._all = ui.column().classes("full-width")
        self._editors: dict[str, RowEditor] = {}
        self._show()

    @property
    def _folder(self) -> Path:
        return self._view.workspace.root / self._folder_name

    def _show(self) -> None:
        t = self._t
        self._all.clear()
        with self._all:
            with ui.row().classes("full-width edge-center"):
                ui.select(
                    sorted({*datasets.folders(self._view.workspace.root), self._folder_name}),
                    label=t("Folder of the data sets"),
                    value=self._folder_name,
                    with_input=True,
                    new_value_mode="add-unique",
                    on_change=lambda event: self._set_folder(event.value),
                ).classes("col")
                upload = ui.upload(auto_upload=True, multiple=True, on_upload=self._upload)
                upload.props(f'accept="{",".join(datasets.SUFFIXES)}"').classes("hidden")
                ui.button(
                    t("Upload files"), icon="upload", on_click=lambda: upload.run_method("pickFiles")
                ).tooltip(t("json, jsonl, csv or parquet; they are put into the folder."))
            self._list()
            self._shown = ui.column().classes("full-width")

    def _set_folder(self, name: str) -> None:
        self._folder_name = name or "data"
        self._show()

    def _list(self) -> None:
        """The data sets, or what is wrong with their file and the text to mend."""
        t = self._t
        try:
            sets = datasets.load(self._folder)
        except InputError as error:
            shared.words(str(error)).classes("text-negative")
            self._editor()
            return
        if not sets:
            ui.label(t("No data set yet: upload a file."))
        for name, entry in sets.items():
            with ui.row().classes("full-width edge-line"):
                ui.label(name).classes("text-bold")
                ui.label(datasets.described(entry)).classes("edge-mono col")
                ui.button(t("Preview"), icon="visibility").props("outline dense").on_click(
                    shared.guarded(functools.partial(self._preview, name))
                )
                if path := datasets.editable(self._folder, entry):
                    editor = self._editors[name] = RowEditor(self._view, path, self._shown_is_old)
                    ui.button(t("Edit rows"), icon="edit", on_click=shared.guarded(editor.open)).props(
                        "outline dense"
                    )
        for path in datasets.unlisted(self._folder, sets):
            with ui.row().classes("full-width edge-line"):
                ui.label(path.name).classes("edge-mono col")
                ui.button(t("Use it"), icon="add").props("outline dense").on_click(
                    functools.partial(self._use, path)
                )
        with ui.expansion(datasets.INFO, icon="edit_note").classes("full-width"):
            self._editor()

    def _editor(self) -> None:
        path = self._folder / datasets.INFO
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "{}\n"
        editor = ui.codemirror(text, language="JSON").classes("full-width edge-editor")

        async def mend() -> None:
            editor.value = datasets.mended(editor.value)

        async def save() -> None:
            datasets.save(self._folder, editor.value)
            ui.notify(self._t("Saved as {name}.").format(name=datasets.INFO), type="positive")
            self._show()

        with ui.row():
            ui.button(self._t("Mend"), icon="auto_fix_high", on_click=shared.guarded(mend)).props("outline")
            ui.button(self._t("Save"), icon="save", on_click=shared.guarded(save)).props("outline")

    async def _upload(self, event: Any) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = datasets.free_name(self._folder, event.file.name)
            with shared.whole(path):
                await event.file.save(path)
        except (EdgeError, OSError) as error:
            shared.complain(error)
            return
        await self._use(path, uploaded=True)

    async def _use(self, path: Path, *, uploaded: bool = False) -> None:
        """Make a data set of a file, or say what is wrong with it."""
        try:
            await self._add(path)
        except (EdgeError, OSError) as error:
            self._ask_to_mend(path, str(error), uploaded=uploaded)

    async def _add(self, path: Path) -> None:
        """Make a data set of a file. Raises InputError where it cannot be read."""
        if path.suffix == ".parquet":
            row: dict[str, Any] = {}
            entry: dict[str, Any] = {"file_name": path.name}
        else:
            row = dict(await run.io_bound(datasets.first_row, path) or {})
            entry = datasets.entry_for(path.name, row) or {}
        if not entry:
            self._ask_for_columns(path, list(row))
            return
        datasets.add(self._folder, path.stem, entry)
        with self._all:
            ui.notify(self._t("{name} was read.").format(name=path.name), type="positive")
            self._show()

    def _ask_to_mend(self, path: Path, problem: str, *, uploaded: bool) -> None:
        t = self._t

        async def mend() -> None:
            await run.io_bound(datasets.mend_rows, path)
            await self._add(path)
            dialog.close()

        def leave() -> None:
            if uploaded:
                path.unlink(missing_ok=True)
            dialog.close()

        with self._dialogs, ui.dialog().props("persistent") as dialog, ui.card():
            shared.words(problem).classes("text-negative")
            with ui.row():
                if path.suffix in (".json", ".jsonl"):
                    ui.button(t("Mend"), icon="auto_fix_high", on_click=shared.guarded(mend))
                ui.button(t("Leave it out"), on_click=leave).props("outline")
        dialog.open()

    def _ask_for_columns(self, path: Path, names: list[str]) -> None:
        """Which column is the question, which the answer."""
        t, chosen = self._t, {}
        with self._all, ui.dialog() as dialog, ui.card().classes("edge-wide"):
            ui.label(t("Which column of {name} is what?").format(name=path.name))
            for column in datasets.COLUMNS:
                ui.select(
                    names, label=column, clearable=True,
                    on_change=lambda event, column=column: chosen.update({column: event.value}),
                ).classes("full-width")  # fmt: skip

            async def save() -> None:
                columns = {column: name for column, name in chosen.items() if name}
                entry: dict[str, Any] = {"file_name": path.name, "columns": columns}
                if {"chosen", "rejected"} <= set(columns):
                    entry["ranking"] = True
                datasets.add(self._folder, path.stem, entry)
                dialog.close()
                self._show()

            ui.button(t("Save"), icon="save", on_click=shared.guarded(save))
        dialog.open()

    async def _preview(self, name: str) -> None:
        """What would be trained of a data set, by the settings of the Train tab."""
        form = self._view.form()
        if not form.values.get("model_name_or_path"):
            raise EdgeError(
                self._t("Choose a base model in the Train tab: its tokenizer and template are used.")
            )
        draft = form.draft({"dataset": name, "dataset_dir": self._folder_name, "eval_dataset": None})
        self._shown.clear()
        with self._shown:
            ui.spinner(size="lg")
        try:
            found = await self._view.ask("data", self._view.workspace.short(draft), "--rows", str(_ROWS))
        finally:
            self._shown.clear()
        with self._shown:
            self._facts(name, found)

    def _facts(self, name: str, found: dict[str, Any]) -> None:
        t = self._t
        ui.label(
            t("{name}: {rows} rows, {trained} to train on, {held} held out, {left} left out").format(
                name=name, rows=f"{found['rows']:,}", trained=f"{found['trained']:,}",
                held=f"{found['held_out']:,}", left=f"{len(found['left_out']):,}",
            )
        ).classes("text-bold")  # fmt: skip
        if found["left_out"]:
            with ui.expansion(t("Rows that are left out"), icon="warning").classes("full-width"):
                for row, why in found["left_out"][:_REASONS]:
                    self._row(name, row, shared.words(f"{row}: {why}"))
        shared.words("\n".join(found["notes"])).classes("edge-warning")
        ui.label(
            t("{tokens} tokens in an epoch, {learnt} of them with loss; {cut} rows are cut").format(
                tokens=f"{found['tokens']:,}", learnt=f"{found['tokens_with_loss']:,}", cut=found["cut"]
            )
        )
        ui.echart(histogram(found["lengths"], t("tokens in a row"))).classes("full-width edge-chart")
        ui.label(t("The exact tokens; those with loss are coloured.")).classes("edge-help")
        for sample in found["samples"]:
            self._row(name, sample["source"], ui.label(sample["source"]).classes("text-bold"))
            with ui.element("div").classes("edge-tokens"):
                for text, learnt in stretches(sample["tokens"]):
                    ui.label(text).classes("edge-learnt" if learnt else "")

    def _row(self, name: str, source: str, label: Any) -> None:
        """Put a button beside the label of a row, which opens that row. source: "NAME, row N" and more."""
        number = _NUMBER.match(source.removeprefix(name))
        if number is None or name not in self._editors:
            return
        with ui.row().classes("edge-center") as line:
            label.move(line)
            ui.button(
                icon="edit",
                on_click=shared.guarded(functools.partial(self._editors[name].open, int(number[1]))),
            ).props(f'flat dense size=sm aria-label="{self._t("Edit")}"')

    def _shown_is_old(self) -> None:
        self._shown.clear()


def stretches(tokens: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """(text, whether it has loss) of each token; line ends are shown as such."""
    return [(token["text"].replace("\n", "↵\n"), token["loss"]) for token in tokens]


def histogram(lengths: list[int], title: str) -> dict[str, Any]:
    """ECharts' bars: how many rows are how long. lengths: in tokens."""
    low, high = min(lengths, default=0), max(lengths, default=0)
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    labels = [f"{low + n * width}" for n in range(len(counts))]
    grey = {"color": "#888"}
    return {
        "animation": False,
        "title": {"text": title, "textStyle": {**grey, "fontSize": 12}},
        "grid": {"left": 50, "right": 16, "top": 36, "bottom": 28},
        "tooltip": {"trigger": "axis", "confine": True},
        "xAxis": {"type": "category", "data": labels, "axisLabel": grey},
        "yAxis": {
            "type": "value",
            "minInterval": 1,
            "axisLabel": grey,
            "splitLine": {"lineStyle": {"opacity": 0.3}},
        },
        "series": [{"type": "bar", "data": counts, "itemStyle": {"color": "#2a78d6"}}],
    }
