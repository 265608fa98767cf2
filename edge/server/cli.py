"""`edge serve`: its arguments, and the steps from them to a server: bind the port, plan the models, serve."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator

from edge import child_process
from edge.errors import EdgeError, UnavailableError, UsageError
from edge.progress import report
from edge.server.access import BACKLOG
from edge.server.options import access_of, parser, replicas_of
from edge.setup import install_command


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.max_connections is not None and args.max_connections < 1:
        raise UsageError(f"--max-connections {args.max_connections} is not at least 1")
    if args.wait and (len(args.paths) > 1 or args.lora):
        raise UsageError("--wait goes with a single model, without --lora", "leave it out, or serve one")
    access = access_of(args)
    if args.replicas is not None:
        args.replicas = replicas_of(args)
        if importlib.util.find_spec("ray") is None:
            raise UnavailableError(
                "--replicas needs the package 'ray', which is not installed", install_command("ray")
            )
        # Bound and closed: Ray would share the port with a server that has it.
        with bind(args.host, args.port) as listener:
            args.port = listener.getsockname()[1]
        from edge.server import ray_app

        return ray_app.main(args, access)
    early = contextlib.nullcontext() if args.wait else _early_worker()
    with bind(args.host, args.port) as listener, early as process:
        # Imported late: --help, a wrong argument and a port in use are answered at once.
        from edge.artefact import find
        from edge.server import model_plans

        report("planning")
        models = model_plans.plan_all(args)
        if args.default is not None and args.default not in models:
            raise UsageError(f"--default {args.default} is none of: {', '.join(models)}")
        if args.accept_any_model and len(models) > 1:
            raise UsageError("--accept-any-model goes with a single model", "leave it out, or serve one")
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        if process is not None:
            first = args.default or next(iter(models))
            models[first] = model_plans.begin(models[first], process)

        from edge.server import launch

        return launch.serve(
            listener,
            models,
            default=args.default,
            access=access,
            budget=None if args.memory_budget is None else args.memory_budget * 2**20,
            keep_alive=args.keep_alive,
            drain=args.drain,
            accept_any=args.accept_any_model,
            max_connections=args.max_connections,
            awaited=functools.partial(find.models_state, args.paths[0]) if args.wait else None,
        )


@contextlib.contextmanager
def _early_worker() -> Iterator[subprocess.Popen[bytes]]:
    """The first engine process, which imports while this one does; it has ended with the block."""
    process = child_process.start(child_process.ENGINE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises EdgeError where the address cannot be used."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} is not within 0..65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}", "give an address of this machine") from error
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform == "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise EdgeError(
            f"{host}:{port} cannot be used: {error.strerror}",
            "another server may run there: stop it, or give another --port",
        ) from error
    return listener
