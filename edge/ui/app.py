"""The page: a frame with tabs, in two languages, on FastAPI and NiceGUI."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from nicegui import ui
from starlette.responses import RedirectResponse

from edge.ui import train
from edge.ui.guard import Guard
from edge.ui.texts import LANGUAGES, Texts
from edge.ui.view import View
from edge.ui.workspace import Workspace

TABS: dict[str, tuple[str, Callable[[View], None]]] = {
    "Train": ("model_training", train.build),
}
_LASTS = "path=/; SameSite=Strict; max-age=31536000"
_THEMES = {"auto": None, "light": False, "dark": True}
_STYLE = """
:root { --nicegui-default-padding: 0.75rem; }
body { font-family: system-ui, "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", sans-serif; }
.edge-page { width: 100%; max-width: 72rem; margin: 0 auto; }
.edge-grid { display: grid; gap: 0.75rem 1.25rem; }
.edge-grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.edge-help { font-size: 0.8rem; opacity: 0.75; line-height: 1.3; }
.edge-words { white-space: pre-wrap; overflow-wrap: anywhere; }
.edge-mono { font-family: ui-monospace, Consolas, monospace; font-size: 0.8rem; overflow-wrap: anywhere; }
.edge-chart { height: 18rem; }
.edge-tight { gap: 0.15rem; }
.edge-wide { width: min(92vw, 60rem); max-width: none !important; }
.body--dark .q-btn--outline { color: #8ab4f8 !important; }
.q-tab { text-transform: none; }
.q-btn { text-transform: none; }
"""


def serve(listener: socket.socket, root: Path, *, keys: tuple[str, ...], root_path: str) -> None:
    """Serve the page of the folder `root` on `listener` until a signal comes. root_path: a proxy's prefix."""
    config = uvicorn.Config(
        create_app(Workspace(root), keys),
        root_path=root_path,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def create_app(workspace: Workspace, keys: tuple[str, ...]) -> Guard:
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def preferred(request: Request) -> RedirectResponse:
        wanted = request.cookies.get("edge-language") or request.headers.get("accept-language", "")
        language = "zh" if wanted.lower().startswith("zh") else "en"
        prefix = request.headers.get("x-forwarded-prefix", "") + request.scope.get("root_path", "")
        return RedirectResponse(f"{prefix}/{language}")

    api.get("/")(preferred)
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
    ui.add_css(_STYLE)
    ui.colors(primary="#2a5db0")
    theme = request.cookies.get("edge-theme", "auto")
    dark = ui.dark_mode(_THEMES.get(theme))
    wanted = request.query_params.get("tab", "")
    first = wanted if wanted in TABS else next(iter(TABS))
    panels: dict[str, Any] = {}

    def show(name: str) -> None:
        # A tab is made when it is first looked at.
        if name in panels:
            with panels.pop(name):
                TABS[name][1](view)
        ui.navigate.history.replace(f"?tab={name}")

    def set_theme() -> None:
        dark.value = not dark.value
        ui.run_javascript(f"document.cookie = 'edge-theme={'dark' if dark.value else 'light'}; {_LASTS}'")

    with ui.header().classes("items-center q-py-none"):
        ui.label("edge").classes("text-h6")
        tabs = (
            ui.tabs(on_change=lambda event: show(event.value))
            .classes("col-grow")
            .props("dense inline-label outside-arrows mobile-arrows align=left")
        )
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
    view = View(t, workspace, lambda name: tabs.set_value(name))
    with ui.tab_panels(tabs, value=first).classes("edge-page").props("keep-alive"):
        for name in TABS:
            with ui.tab_panel(name):
                panels[name] = ui.column().classes("full-width")
    show(first)
