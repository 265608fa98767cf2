"""The page: a frame with tabs, in two languages, on FastAPI and NiceGUI."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from nicegui import ui
from pygments.formatters import HtmlFormatter
from starlette.responses import RedirectResponse

from edge.ui import chat, data, export, measure, model, runs, take_home, train
from edge.ui.guard import Guard
from edge.ui.texts import LANGUAGES, Texts
from edge.ui.view import View, complain
from edge.ui.workspace import Workspace

TABS: dict[str, tuple[str, Callable[[View], None]]] = {
    "Model": ("psychology", model.build),
    "Data": ("dataset", data.build),
    "Train": ("model_training", train.build),
    "Runs": ("show_chart", runs.build),
    "Chat": ("chat", chat.build),
    "Export": ("output", export.build),
    "Measure": ("speed", measure.build),
}
_LASTS = "path=/; SameSite=Strict; max-age=31536000"
_THEMES = {"auto": None, "light": False, "dark": True}
_STYLE = """
body { --q-primary: #2a5db0 !important; }
body { font-family: system-ui, "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", sans-serif; }
body.body--dark { --q-primary: #8ab4f8 !important; }
.body--dark .q-header, .body--dark .q-btn--standard { --q-primary: #2a5db0; }
.q-tab, .q-btn { text-transform: none; }
.q-badge.bg-positive { background: #1e7d37 !important; }
.q-badge.bg-warning { color: #222; }
.edge-page { width: 100%; max-width: 72rem; margin: 0 auto; }
.edge-grid { display: grid; gap: 0.75rem 1.25rem; }
.edge-grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.edge-help { font-size: 0.8rem; opacity: 0.75; line-height: 1.3; }
.edge-words { white-space: pre-wrap; overflow-wrap: anywhere; }
.edge-mono { font-family: ui-monospace, Consolas, monospace; font-size: 0.8rem; overflow-wrap: anywhere; }
.edge-chart { height: 18rem; }
.edge-wide { width: min(92vw, 60rem); max-width: none !important; }
.edge-tight { gap: 0.15rem; }
.edge-center, .edge-line { align-items: center; }
.edge-line { border-bottom: 1px solid #8884; padding: 0.25rem 0; }
.edge-center > .col, .edge-line > .col { flex: 1 1 14rem; }
.edge-editor { height: 20rem; }
.edge-tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; }
.edge-tokens > div { display: inline; opacity: 0.75; border-radius: 2px; }
.edge-tokens > .edge-learnt { background: #2f9e5b55; opacity: 1; }
.edge-tokens > .edge-learnt:nth-child(odd) { background: #2f9e5b88; }
.edge-page, .edge-page .q-tab-panel, .edge-page .q-panel { overflow: visible; }
.edge-chip { border: 1px solid #8886; border-radius: 6px; padding: 0 0.5rem; gap: 0.5rem; flex-wrap: nowrap; }
.edge-composer, .edge-bar { bottom: 0; z-index: 1; padding: 0.5rem 0; background: #fff; }
.edge-composer { position: sticky; }
.body--dark :is(.edge-composer, .edge-bar) { background: var(--q-dark); }
.edge-question { background: #2a5db01f; border-radius: 6px; padding: 0.4rem 0.75rem; }
.edge-answers { display: grid; gap: 1rem; }
.edge-answers { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.edge-answer, .edge-markdown { min-width: 0; overflow-wrap: anywhere; }
.edge-markdown pre { overflow-x: auto; padding: 0.6rem; border-radius: 6px; background: #8882; }
.edge-markdown :is(h1, h2, h3, h4) { font-size: 1.1rem; line-height: 1.4; font-weight: 600; }
.edge-markdown table { border-collapse: collapse; }
.edge-markdown :is(td, th) { border: 1px solid #8886; padding: 0.15rem 0.5rem; text-align: left; }
.nicegui-code :is(pre, code) { white-space: pre-wrap; overflow-wrap: anywhere; }
.edge-warning { color: #8a5a00; }
.body--dark .edge-warning { color: #f2c037; }
.edge-title { margin-right: auto; }
@media (min-width: 800px) {
  .edge-tabs { flex-grow: 1; }
  .edge-title { margin-right: 0; }
  .edge-bar { position: sticky; }
}
@media (max-width: 799px) {
  .edge-tabs { order: 3; flex-basis: 100%; }
  .edge-tabs .q-tab { flex: 1 1 0; min-width: 0; padding: 0 2px; }
  .edge-tabs .q-tab__content { flex-direction: column; min-width: 0; padding: 4px 0; }
  .edge-tabs .q-tab__label { margin: 0; padding: 0; font-size: 0.7rem; line-height: 1.1; }
}
"""
_CODE = "\n".join(
    HtmlFormatter(nobackground=True, style=style).get_style_defs(f"body.body--{theme} .codehilite")
    for theme, style in (("light", "default"), ("dark", "github-dark"))
)


def serve(listener: socket.socket, root: Path, *, keys: tuple[str, ...], root_path: str) -> None:
    """Serve the page of the folder `root` on `listener` until a signal comes. root_path: a proxy's prefix."""
    config = uvicorn.Config(
        create_app(Workspace(root), keys),
        root_path=root_path,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    # uvicorn raises the signal that ended it once more.
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def create_app(workspace: Workspace, keys: tuple[str, ...]) -> Guard:
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def preferred(request: Request) -> RedirectResponse:
        wanted = request.cookies.get("edge-language") or request.headers.get("accept-language", "")
        language = "zh" if wanted.lower().startswith("zh") else "en"
        prefix = request.headers.get("x-forwarded-prefix", "") + request.scope.get("root_path", "")
        return RedirectResponse(f"{prefix}/{language}")

    api.get("/")(preferred)
    take_home.add_route(api, workspace)
    for language, quasar in LANGUAGES.items():
        ui.page(f"/{language}", title="edge", language=quasar)(_page(workspace, language))
    # Nothing of the page is kept by NiceGUI; this is where it would look.
    os.environ.setdefault("NICEGUI_STORAGE_PATH", str(workspace.jobs_folder / ".page"))
    ui.run_with(
        api, binding_refresh_interval=None, show_welcome_message=False, tailwind=False, reconnect_timeout=30
    )
    return Guard(api, keys)


def _page(workspace: Workspace, language: str) -> Callable[[Request], None]:
    def page(request: Request) -> None:
        _frame(workspace, Texts(language), request)

    return page


def _frame(workspace: Workspace, t: Texts, request: Request) -> None:
    ui.add_css(_STYLE + _CODE)
    ui.on_exception(complain)
    theme = request.cookies.get("edge-theme", "auto")
    dark = ui.dark_mode(_THEMES.get(theme))
    wanted = request.query_params.get("tab", "")
    first = wanted if wanted in TABS else next(iter(TABS))
    panels: dict[str, Any] = {}

    def show(name: str) -> None:
        # A tab is made when it is looked at: it shows what is on the disk.
        panels[name].clear()
        with panels[name]:
            TABS[name][1](view)
        ui.navigate.history.replace(f"?tab={name}")

    def go(name: str) -> None:
        if tabs.value == name:
            show(name)
        else:
            tabs.set_value(name)

    def set_theme() -> None:
        dark.value = not dark.value
        ui.run_javascript(f"document.cookie = 'edge-theme={'dark' if dark.value else 'light'}; {_LASTS}'")

    with ui.header().classes("edge-center q-py-none"):
        ui.label("edge").classes("text-h6 edge-title")
        tabs = ui.tabs().classes("edge-tabs").props("dense inline-label align=left")
        with tabs:
            for name, (icon, _) in TABS.items():
                ui.tab(name, t(name), icon)
        other = "en" if t.language == "zh" else "zh"
        ui.button({"en": "English", "zh": "中文"}[other], on_click=lambda: ui.run_javascript(
            f"document.cookie = 'edge-language={other}; {_LASTS}'; location.pathname = "
            f"location.pathname.replace(/[^/]*$/, '{other}')"
        )).props(f'flat dense color=white aria-label="{t("Language")}"')  # fmt: skip
        ui.button(icon="contrast", on_click=set_theme).props(
            f'flat dense color=white aria-label="{t("Light or dark")}"'
        )
    view = View(t, workspace, go)
    with ui.tab_panels(tabs, value=first).classes("edge-page").props("keep-alive"):
        for name in TABS:
            with ui.tab_panel(name):
                panels[name] = ui.column().classes("full-width")
    show(first)
    tabs.on_value_change(lambda event: show(event.value))
