"""`edge serve RUN_OR_FILE ...`: binds first, loads then, drains at the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from edge.artefact import find
from edge.backends.onnx_providers import DEVICES
from edge.engine.worker import Load
from edge.errors import EdgeError, InputError, UsageError
from edge.loading import load_plan
from edge.server.auth import Access, is_loopback
from edge.server.model_registry import Planned, Registry

KEY_VARIABLE = "EDGE_API_KEY"
ADMIN_KEY_VARIABLE = "EDGE_ADMIN_KEY"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge serve", description="Serve a model over HTTP.")
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="path",
        help="a run, a folder with a model, or a .gguf or .onnx file",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="[NAME=]ADAPTER",
        help="an adapter (edge export lora) on top of the model, asked for by its id; may be given again",
    )
    parser.add_argument("--default", help="with several: the id of the one for requests that name none")
    parser.add_argument("--host", default="127.0.0.1", help="beyond loopback an API key is needed")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", help="the id in requests, of a single model (default: the artefact's name)")
    parser.add_argument("--ctx", type=int, help="tokens that one request may hold, answer included")
    parser.add_argument("--slots", type=int, help="requests that run at once")
    parser.add_argument("--threads", type=int, help="default: the physical cores it may use")
    parser.add_argument("--backend", choices=list(find.SUFFIXES), help="default: what is faster here")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--kv-type", choices=["f16", "q8_0", "q4_0"], default="f16")
    parser.add_argument("--no-tune", action="store_true", help="take the settings as they are, unmeasured")
    parser.add_argument("--max-queue", type=int, default=256, help="requests that may wait")
    parser.add_argument("--api-key-file", type=Path, help=f"one key a line (or set {KEY_VARIABLE})")
    parser.add_argument("--admin-key-file", type=Path, help=f"opens /admin/ (or set {ADMIN_KEY_VARIABLE})")
    parser.add_argument("--cors-origin", action="append", default=[], help="a page's origin that may call")
    parser.add_argument("--memory-budget", type=int, metavar="MIB", help="what loaded models may take")
    parser.add_argument("--keep-alive", type=float, metavar="SECONDS", help="unload a model idle for so long")
    parser.add_argument("--kv-store", type=Path, help="a folder that keeps prefixes over restarts")
    parser.add_argument("--kv-store-mib", type=int, default=1024, help="how much it may hold")
    parser.add_argument("--drain", type=float, default=10.0, help="seconds that requests may finish in")
    args = parser.parse_args(argv)

    access = Access(
        keys=tuple(read_keys(args.api_key_file, KEY_VARIABLE)),
        admin_keys=tuple(read_keys(args.admin_key_file, ADMIN_KEY_VARIABLE)),
        origins=tuple(check_origin(origin) for origin in args.cors_origin),
    )
    if not is_loopback(args.host) and not access.keys:
        raise UsageError(
            f"--host {args.host} is reachable by others; that needs an API key",
            f"set {KEY_VARIABLE} or give --api-key-file",
        )
    bound = bind(args.host, args.port)
    with bound:
        models = sources(args)
        if args.default is not None and args.default not in models:
            raise UsageError(f"--default {args.default} is none of: {', '.join(models)}")
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        return serve(
            bound,
            models,
            default=args.default,
            access=access,
            budget=None if args.memory_budget is None else args.memory_budget * 2**20,
            keep_alive=args.keep_alive,
            drain=args.drain,
        )


def sources(args: argparse.Namespace) -> dict[str, Callable[[], Planned]]:
    """What each id stands for, each looked at once already. Raises EdgeError for what cannot be served.

    The model that is loaded at the start is loaded as it was seen; all else is looked at afresh when it is
    loaded, for it may be another export by then.
    """
    models: dict[str, Callable[[], Planned]] = {}
    if args.name is not None and len(args.paths) > 1:
        raise UsageError("--name goes with a single model", "the ids of several are their artefacts' names")
    if args.lora and len(args.paths) > 1:
        raise UsageError("--lora goes with a single model", "serve the model under the adapters by itself")
    # Whoever gives an adapter wants it: it stands for requests that name no model.
    wanted = [(*named(given), args.paths[0]) for given in args.lora]
    for name, lora, path in [*wanted, *((args.name, None, path) for path in args.paths)]:
        plan = functools.partial(planned, path, args, lora)
        # A path that cannot be served is said at once, not when it is first asked for.
        seen = [plan()]
        found = seen[0].artefact
        name = name or (found.name if found is not None else path.name)
        if name in models:
            hint = (
                "name the adapters: --lora NAME=ADAPTER"
                if args.lora
                else "serve them one by one, with --name"
            )
            raise UsageError(f"two of the models have the id '{name}'", hint)
        models[name] = plan
        if name == args.default or (args.default is None and len(models) == 1):
            models[name] = functools.partial(_once, seen, plan)
    return models


def _once(seen: list[Planned], again: Callable[[], Planned]) -> Planned:
    return seen.pop() if seen else again()


def named(given: str) -> tuple[str | None, Path]:
    """(id, path) of `NAME=ADAPTER`, or of a path alone. Raises UsageError for an empty half."""
    name, equals, path = given.partition("=")
    if not equals or Path(given).exists():
        return None, Path(given)
    if not name or not path:
        raise UsageError(f"--lora {given}: a name or a path lacks", "give it as NAME=ADAPTER")
    return name, Path(path)


def planned(path: Path, args: argparse.Namespace, lora: Path | None = None) -> Planned:
    """How the artefact at `path` is to be loaded on this machine now. Raises EdgeError.

    lora: an adapter on top. llama.cpp puts it on a whole context, so each adapter has a process of its own;
    what they map of the base's file is in memory once.
    """
    options = load_plan.Options(
        context=args.ctx,
        slots=args.slots,
        threads=args.threads,
        device=args.device,
        kv_type=args.kv_type,
    )
    # An adapter in GGUF goes on top of a GGUF.
    found, why = load_plan.pick(path, "llamacpp" if args.lora else args.backend, options)
    if lora is not None:
        found = find.with_lora(found, lora)
    plan = load_plan.plan(found, options)
    load = Load.of(
        found,
        plan.settings,
        max_queue=args.max_queue,
        tune=not args.no_tune,
        store=str(args.kv_store.absolute()) if args.kv_store else "",
        store_mib=args.kv_store_mib,
        why=f"{found.kind}: {why}",
    )
    return Planned(load, found, plan.bytes)


def read_keys(path: Path | None, variable: str) -> list[str]:
    """API keys from the environment and a file (one a line). Raises InputError for a file without any."""
    keys = [key] if (key := os.environ.get(variable, "").strip()) else []
    if path is not None:
        if not path.is_file():
            raise InputError(f"no such file: {path}", "write one API key a line into it")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{path} holds no key", "write one API key a line into it")
        keys += lines
    return keys


def check_origin(origin: str) -> str:
    """A page's origin as browsers send it. Raises UsageError for anything else."""
    parts = urlsplit(origin)
    if (
        parts.scheme not in ("http", "https")
        or origin != f"{parts.scheme}://{parts.netloc}"
        or not parts.netloc
    ):
        raise UsageError(
            f"--cors-origin {origin} is no origin", "give it as https://host or http://host:port"
        )
    return origin


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded. Raises EdgeError where the port is taken."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} is not within 0..65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}", "give an address of this machine") from error
    sock = socket.socket(family, kind, protocol)
    try:
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise EdgeError(
            f"{host}:{port} cannot be used: {error.strerror}",
            "another server may run there: stop it, or give another --port",
        ) from error
    return sock


def serve(
    bound: socket.socket,
    models: dict[str, Callable[[], Planned]],
    *,
    default: str | None = None,
    access: Access | None = None,
    budget: int | None = None,
    keep_alive: float | None = None,
    drain: float = 10.0,
) -> int:
    """Serve `models` on `bound` until a signal comes; the exit code.

    budget: bytes that loaded models may take. keep_alive, drain: seconds. Raises EdgeError where the default
    model cannot be loaded.
    """
    registry = Registry(models, default=default, budget=budget, keep_alive=keep_alive)
    return asyncio.run(_serve(bound, registry, access or Access(), drain))


async def _serve(bound: socket.socket, registry: Registry, access: Access, drain: float) -> int:
    # Imported late: a port that is taken must be said before a second has passed.
    import uvicorn

    from edge.server.app import create_app

    class Server(uvicorn.Server):
        # uvicorn raises the signal that ended it once more; a drained server ends with code 0.
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    app = create_app(registry, access)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(drain)),
    )
    server = Server(config)
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(registry.names)
    _say(f"{names}: http://{shown}:{port}  (loading; /docs describes the interface, Ctrl-C ends it)")
    loading = registry.start()
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            if loading.exception() is None:
                loaded = loading.result()
                ready = loaded.ready
                _say(
                    f"ready in {loaded.engine.load_s:.1f} s on {ready.device} ({ready.why}) "
                    f"by {ready.settings.get('chosen', ready.kind)}, "
                    f"{ready.settings.get('threads', '?')} threads, context {ready.context}, "
                    f"{ready.slots} requests at once"
                )
            else:
                server.should_exit = True
        await serving
    finally:
        await registry.close(0.5)
    if not loading.cancelled():
        loading.result()
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
