"""A dialog in which one row of a data file is read and changed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import run, ui

from edge.errors import InputError
from edge.ui import rows
from edge.ui import view as shared
from edge.ui.view import View

_FEW = 100


class RowEditor:
    """Shows the row `number` of a file, or the one behind it; `saved` is called after each change."""

    def __init__(self, view: View, path: Path, saved: Callable[[], None]) -> None:
        self._view, self._path, self._saved = view, path, saved
        self._rows: list[rows.Row] = []
        self._at = 0
        t = view.t
        with ui.dialog() as self._dialog, ui.card().classes("edge-wide"):
            self._title = ui.label().classes("text-bold")
            with ui.row().classes("edge-center no-wrap"):
                self._step(-1, "chevron_left", t("Earlier row"))
                self._number = ui.input(t("Row"))
                self._number.on("change", lambda: self._go(self._number.value))
                self._step(1, "chevron_right", t("Later row"))
            self._fields = ui.column().classes("full-width")
            with ui.row():
                ui.button(t("Save"), icon="save", on_click=shared.guarded(self._save))
                ui.button(t("Close"), on_click=self._dialog.close).props("outline")

    async def open(self, number: int = 1) -> None:
        """Raises InputError for a file that cannot be read."""
        self._rows = await run.io_bound(rows.rows, self._path) or []
        if not self._rows:
            raise InputError(f"{self._path.name} has no row")
        self._at = 0
        self._go(str(number))
        self._dialog.open()

    def _step(self, step: int, icon: str, text: str) -> None:
        move = functools.partial(self._move, step)
        ui.button(icon=icon, on_click=move).props(f'flat dense aria-label="{text}"')

    def _move(self, step: int) -> None:
        self._at = max(0, min(len(self._rows) - 1, self._at + step))
        self._show()

    def _go(self, number: str) -> None:
        if str(number).isdecimal() and int(number) != self._rows[self._at].number:
            later = (index for index, row in enumerate(self._rows) if row.number >= int(number))
            self._at = next(later, len(self._rows) - 1)
        self._show()

    def _show(self) -> None:
        t, row = self._view.t, self._rows[self._at]
        self._title.set_text(t("{name}, row {number}").format(name=self._path.name, number=row.number))
        self._number.set_value(str(row.number))
        self._typed: dict[str, Any] = {}
        self._fields.clear()
        with self._fields:
            if row.value is None:
                ui.label(t("This row is no JSON object: mend its text.")).classes("text-negative")
            shown = {"": row.raw} if row.value is None else dict.fromkeys(self._columns(), "") | row.value
            for key, value in shown.items():
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
                self._typed[key] = (
                    ui.textarea(key or t("Row"), value=text).classes("full-width").props("autogrow outlined")
                )

    async def _save(self) -> None:
        row = self._rows[self._at]
        value = str(self._typed[""].value) if row.value is None else self._values(row.value)
        if value not in (row.value, row.raw):
            await run.io_bound(rows.write, self._path, row, value)
            self._saved()
        self._rows = await run.io_bound(rows.rows, self._path) or []
        self._show()
        ui.notify(self._view.t("Saved as {name}.").format(name=self._path.name), type="positive")

    def _columns(self) -> list[str]:
        """The columns of the first rows: a row that lacks one can be given it."""
        return [key for row in self._rows[:_FEW] for key in row.value or ()]

    def _values(self, earlier: dict[str, Any]) -> dict[str, Any]:
        """What was typed, by column; a column of another type than a text is JSON."""
        values: dict[str, Any] = {}
        for key, typed in self._typed.items():
            text = str(typed.value or "")
            try:
                if key in earlier or text:
                    values[key] = text if isinstance(earlier.get(key, ""), str) else json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{key} is not valid JSON: {error}") from error
        return values
