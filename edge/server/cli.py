"""`edge serve`: its arguments, and the steps from them to a server: bind the port, plan the models, serve."""

from __future__ import annotations

import argparse
import functools
import logging
import socket
import sys
from pathlib import Path

from edge.arguments import PATH_HELP, add_loading_options
from edge.errors import EdgeError, UsageError
from edge.progress import add_progress_option, report
from edge.server.access import (
    ADMIN_KEY_VARIABLE,
    BACKLOG,
    KEY_VARIABLE,
    Access,
    check_origin,
    is_loopback,
    read_keys,
)


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.max_connections is not None and args.max_connections < 1:
        raise UsageError(f"--max-connections {args.max_connections} is not at least 1")
    if args.wait and (len(args.paths) > 1 or args.lora):
        raise UsageError("--wait goes with a single model, without --lora", "leave it out, or serve one")
    access = _access(args)
    with bind(args.host, args.port) as listener:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge serve", description="Serve a model over HTTP.")
    parser.add_argument("paths", type=Path, nargs="+", metavar="path", help=PATH_HELP)
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="[NAME=]ADAPTER",
        help="an adapter (edge export lora) on top of the model, asked for by its id; may be given again",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="serve at once, and a single model as soon as its export is there",
    )
    parser.add_argument("--default", help="with several models: the id for requests that name none")
    parser.add_argument("--host", default="127.0.0.1", help="beyond loopback an API key is needed")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", help="the id in requests, of a single model (default: the artefact's name)")
    parser.add_argument(
        "--accept-any-model", action="store_true", help="a single model answers to whatever id is asked for"
    )
    parser.add_argument("--ctx", type=int, help="tokens that one request may hold, answer included")
    parser.add_argument("--slots", type=int, help="requests that run at once")
    add_loading_options(parser)
    parser.add_argument("--kv-type", choices=["f16", "q8_0", "q4_0"], default="f16")
    parser.add_argument("--no-tune", action="store_true", help="take the settings as they are, unmeasured")
    parser.add_argument("--max-queue", type=int, default=256, help="requests that may wait")
    parser.add_argument(
        "--max-connections", type=int, help="open at once (default: 1024, fewer with few file handles)"
    )
    parser.add_argument("--api-key-file", type=Path, help=f"one key a line (or set {KEY_VARIABLE})")
    parser.add_argument("--admin-key-file", type=Path, help=f"opens /admin/ (or set {ADMIN_KEY_VARIABLE})")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        help="the origin of a page or an app that may call; http://localhost:* means any port",
    )
    parser.add_argument("--memory-budget", type=int, metavar="MIB", help="memory for the loaded models")
    parser.add_argument(
        "--keep-alive", type=float, metavar="SECONDS", help="unload a model that is idle for this long"
    )
    parser.add_argument(
        "--cache-ram",
        type=int,
        metavar="MIB",
        help="RAM for prompts that had to leave their slot (default: a quarter of what is free, up to 8192)",
    )
    parser.add_argument("--kv-store", type=Path, help="a folder that keeps prompt prefixes over restarts")
    parser.add_argument("--kv-store-mib", type=int, default=1024, help="the size of that folder at most")
    add_progress_option(parser)
    parser.add_argument("--drain", type=float, default=10.0, help="seconds for running requests at the end")
    return parser


def _access(args: argparse.Namespace) -> Access:
    """Who may use the server. Raises EdgeError; a server that others can reach needs a key."""
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
    return access


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
