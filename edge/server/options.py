"""The options of `edge serve`: what a command line, or the `args` of a Ray Serve config, may say."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from edge.arguments import PATH_HELP, add_loading_options
from edge.errors import UsageError
from edge.progress import add_progress_option
from edge.server.access import (
    ADMIN_KEY_VARIABLE,
    KEY_VARIABLE,
    Access,
    check_origin,
    is_loopback,
    read_keys,
)

# What goes with one server of one process alone: Ray keeps the replicas, and each has a single model.
_UNREPLICATED = (
    "lora", "wait", "default", "admin_key_file", "memory_budget", "keep_alive", "max_connections", "kv_store",
)  # fmt: skip
_REPLICAS = re.compile(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="edge serve", description="Serve a model over HTTP.")
    options.add_argument("paths", type=Path, nargs="+", metavar="path", help=PATH_HELP)
    options.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="[NAME=]ADAPTER",
        help="an adapter (edge export lora) on top of the model, asked for by its id; may be given again",
    )
    options.add_argument(
        "--wait",
        action="store_true",
        help="serve at once, and a single model as soon as its export is there",
    )
    options.add_argument("--default", help="with several models: the id for requests that name none")
    _add_access_options(options)
    options.add_argument(
        "--name", help="the id in requests, of a single model (default: the artefact's name)"
    )
    options.add_argument(
        "--accept-any-model", action="store_true", help="a single model answers to whatever id is asked for"
    )
    options.add_argument("--ctx", type=int, help="tokens that one request may hold, answer included")
    options.add_argument("--slots", type=int, help="requests that run at once")
    add_loading_options(options)
    options.add_argument("--kv-type", choices=["f16", "q8_0", "q4_0"], default="f16")
    options.add_argument("--no-tune", action="store_true", help="take the settings as they are, unmeasured")
    options.add_argument("--max-queue", type=int, default=256, help="requests that may wait")
    options.add_argument(
        "--max-connections", type=int, help="open at once (default: 1024, fewer with few file handles)"
    )
    options.add_argument("--memory-budget", type=int, metavar="MIB", help="memory for the loaded models")
    options.add_argument(
        "--keep-alive", type=float, metavar="SECONDS", help="unload a model that is idle for this long"
    )
    options.add_argument(
        "--cache-ram",
        type=int,
        metavar="MIB",
        help="RAM for prompts that had to leave their slot (default: a quarter of what is free, up to 8192)",
    )
    options.add_argument("--kv-store", type=Path, help="a folder that keeps prompt prefixes over restarts")
    options.add_argument("--kv-store-mib", type=int, default=1024, help="the size of that folder at most")
    options.add_argument(
        "--replicas",
        metavar="N or MIN-MAX",
        help="engines behind Ray Serve's proxy (extra `ray`); between two numbers it scales with the load",
    )
    add_progress_option(options)
    options.add_argument("--drain", type=float, default=10.0, help="seconds for running requests at the end")
    return options


def _add_access_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--host", default="127.0.0.1", help="beyond loopback an API key is needed")
    options.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    options.add_argument("--api-key-file", type=Path, help=f"one key a line (or set {KEY_VARIABLE})")
    options.add_argument("--admin-key-file", type=Path, help=f"opens /admin/ (or set {ADMIN_KEY_VARIABLE})")
    options.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        help="the origin of a page or an app that may call; http://localhost:* means any port",
    )


def access_of(args: argparse.Namespace) -> Access:
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


def replicas_of(args: argparse.Namespace) -> tuple[int, int]:
    """(fewest, most) of --replicas. Raises UsageError for anything else, and what does not go with it."""
    match = _REPLICAS.fullmatch(args.replicas)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if most < fewest:
        raise UsageError(f"--replicas {args.replicas} is neither a number nor MIN-MAX", "such as 2, or 1-4")
    if len(args.paths) > 1:
        raise UsageError("--replicas goes with a single model", "serve the others by themselves")
    defaults = parser()
    given = [name for name in _UNREPLICATED if getattr(args, name) != defaults.get_default(name)]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} does not go with --replicas", "leave one of them out"
        )
    return fewest, most
