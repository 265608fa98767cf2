"""`edge serve RUN_OR_FILE`: binds first, loads then, drains at the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from edge import artefact, planning
from edge.backends.onnx_providers import DEVICES
from edge.errors import EdgeError, InputError, UsageError
from edge.server.guard import is_loopback
from edge.supervisor import EngineProcess
from edge.worker import Load

KEY_VARIABLE = "EDGE_API_KEY"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge serve", description="Serve a model over HTTP.")
    parser.add_argument("path", type=Path, help="a run, a folder with a model, or a .gguf or .onnx file")
    parser.add_argument("--host", default="127.0.0.1", help="beyond loopback an API key is needed")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", help="the model's id in requests (default: the artefact's name)")
    parser.add_argument("--ctx", type=int, help="tokens that one request may hold, answer included")
    parser.add_argument("--slots", type=int, help="requests that run at once")
    parser.add_argument("--threads", type=int, help="default: the physical cores it may use")
    parser.add_argument("--backend", choices=list(artefact.SUFFIXES), help="default: what is faster here")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--kv-type", choices=["f16", "q8_0", "q4_0"], default="f16")
    parser.add_argument("--no-tune", action="store_true", help="take the settings as they are, unmeasured")
    parser.add_argument("--max-queue", type=int, default=256, help="requests that may wait")
    parser.add_argument("--api-key-file", type=Path, help=f"one key a line (or set {KEY_VARIABLE})")
    parser.add_argument("--kv-store", type=Path, help="a folder that keeps prefixes over restarts")
    parser.add_argument("--kv-store-mib", type=int, default=1024, help="how much it may hold")
    parser.add_argument("--drain", type=float, default=10.0, help="seconds that requests may finish in")
    args = parser.parse_args(argv)

    keys = read_keys(args.api_key_file)
    if not is_loopback(args.host) and not keys:
        raise UsageError(
            f"--host {args.host} is reachable by others; that needs an API key",
            f"set {KEY_VARIABLE} or give --api-key-file",
        )
    bound = bind(args.host, args.port)
    with bound:
        options = planning.Options(
            context=args.ctx,
            slots=args.slots,
            threads=args.threads,
            device=args.device,
            kv_type=args.kv_type,
        )
        found, why = planning.pick(args.path, args.backend, options)
        settings = planning.plan(found, options)
        load = Load(
            kind=found.kind,
            path=str(found.path),
            settings=dataclasses.asdict(settings),
            stop_ids=sorted(found.stop_ids),
            max_queue=args.max_queue,
            tune=not args.no_tune,
            store=str(args.kv_store.absolute()) if args.kv_store else "",
            store_mib=args.kv_store_mib,
            digest=found.digest,
            why=f"{found.kind}: {why}",
        )
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        name = args.name or found.name
        return serve(bound, load, name=name, found=found, keys=keys, drain=args.drain)


def read_keys(path: Path | None) -> list[str]:
    """API keys from a file (one a line) and the environment. Raises InputError for an empty file."""
    keys = [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    if path is not None:
        if not path.is_file():
            raise InputError(f"no such file: {path}", "write one API key a line into it")
        keys += [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not keys:
            raise InputError(f"{path} holds no key", "write one API key a line into it")
    return keys


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
    load: Load,
    *,
    name: str,
    found: artefact.Artefact | None = None,
    keys: list[str] | None = None,
    drain: float = 10.0,
) -> int:
    """Serve on `bound` until a signal comes; the exit code. Raises EdgeError where the model cannot load."""
    return asyncio.run(_serve(bound, load, name, found, keys or [], drain))


async def _serve(
    bound: socket.socket,
    load: Load,
    name: str,
    found: artefact.Artefact | None,
    keys: list[str],
    drain: float,
) -> int:
    # Imported late: a port that is taken must be said before a second has passed.
    import uvicorn

    from edge.server.app import create_app
    from edge.server.serving import Serving

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

    engine = EngineProcess(load)
    app = create_app(Serving(found, engine, name), keys=keys)
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
    taken = f" with {load.why}" if load.why else ""
    _say(f"{name}: http://{shown}:{port}  (loading{taken}; /docs describes the interface, Ctrl-C ends it)")
    engine.start()
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    loading = asyncio.create_task(engine.wait_ready())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            if loading.exception() is None:
                ready = loading.result()
                _say(
                    f"ready in {ready.load_s:.1f} s on {ready.device} ({ready.why}), "
                    f"{ready.settings.get('threads', '?')} threads, context {ready.context}, "
                    f"{ready.slots} requests at once"
                )
            else:
                server.should_exit = True
        await serving
    finally:
        await engine.stop(0.5)
    if not loading.done():
        loading.cancel()
        return 0
    loading.result()
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
