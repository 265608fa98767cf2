"""The HTTP process: serves on a bound socket while the first model loads, and drains at a signal."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from edge.console import STOP_SIGNALS, handling
from edge.machine import build_llamacpp
from edge.machine.llamacpp_source import PACKAGE
from edge.progress import report
from edge.rendering.client import RENDERER
from edge.server.access import BACKLOG, Access
from edge.server.app import create_app
from edge.server.connections import Connection, default_limit, loop_error
from edge.server.model_registry import Planned, Registry
from edge.server.served_model import ServedModel

_LAST_WORDS_S = 1.0


def serve(
    listener: socket.socket,
    models: dict[str, Callable[[], Planned]],
    *,
    default: str | None = None,
    access: Access | None = None,
    budget: int | None = None,
    keep_alive: float | None = None,
    drain: float = 10.0,
    accept_any: bool = False,
    max_connections: int | None = None,
    awaited: Callable[[], object] | None = None,
) -> int:
    """Serve `models` on `listener` until a signal comes; the exit code.

    budget: bytes that loaded models may take. keep_alive, drain: seconds. accept_any: an unknown id means the
    default model. max_connections: open at once. awaited: as of Registry. Raises EdgeError where the default
    model cannot be loaded, unless it is awaited.
    """
    registry = Registry(
        models, default=default, budget=budget, keep_alive=keep_alive, accept_any=accept_any, awaited=awaited
    )
    app = create_app(registry, access or Access())
    server = Server(config(app, drain, max_connections))
    # From before an engine is started, which has to be ended.
    with server.capture_signals():
        return asyncio.run(_serve(listener, registry, server))


def config(app: ASGIApp, drain: float, max_connections: int | None = None) -> uvicorn.Config:
    """uvicorn's configuration. drain: seconds."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        # The event loop accepts so many in a row before one of them can be refused, each with a file handle.
        backlog=64,
        limit_concurrency=max_connections or default_limit(),
        log_config=None,
        access_log=False,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(drain)),
    )


class Server(uvicorn.Server):
    """uvicorn's server on a long queue of connections. Its streams end with words of their own."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # What the drain did not finish was cancelled, and now writes its last event.
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORDS_S)

    # uvicorn raises the signal that ended it once more; a drained server ends with code 0.
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with handling(STOP_SIGNALS, self.handle_exit):
            yield


async def _serve(listener: socket.socket, registry: Registry, server: Server) -> int:
    asyncio.get_running_loop().set_exception_handler(loop_error)
    host, port = listener.getsockname()[:2]
    names = ", ".join(registry.entries)
    url = url_of(host, port)
    say(f"{names}: {url}  (loading; /docs describes the interface, Ctrl-C ends it)")
    report("loading", url=url, models=[*registry.entries])
    loading = registry.start()
    # It is ready before the model is, and costs the first request nothing.
    RENDERER.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is None:
            say(_ready_line(loading.result()))
            report("ready", url=url, models=[*registry.entries])
        elif loading.done():
            server.should_exit = True
        await serving
    finally:
        await registry.close(0.5)
    if not loading.cancelled():
        loading.result()
    return 0


def _ready_line(model: ServedModel) -> str:
    ready = model.ready
    stock = ready.settings.get("build", "").startswith("stock")
    origin = f"\n{PACKAGE} is {build_llamacpp.stock()}" if stock else ""
    return (
        f"ready in {model.engine.load_s:.1f} s on {ready.device} ({ready.why}) "
        f"by {ready.settings.get('chosen', ready.kind)}, "
        f"{ready.settings.get('threads', '?')} threads, context {ready.context}, "
        f"{ready.slots} requests at once{origin}"
    )


def url_of(host: str, port: int) -> str:
    """Where a server on that address is asked."""
    address = f"[{host}]" if ":" in host else host
    return f"http://{address}:{port}"


def say(text: str) -> None:
    """A line for whoever started the server, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
