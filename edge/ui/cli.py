"""`edge ui`: the page. Its arguments, and the steps from them to a server."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from edge.errors import UsageError
from edge.server.access import KEY_VARIABLE, is_loopback, read_keys
from edge.server.cli import bind


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="edge ui", description="Tune, compare, export and serve in the browser, in this folder."
    )
    parser.add_argument("--host", default="127.0.0.1", help="beyond loopback an API key is needed")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one (%(default)s)")
    parser.add_argument("--root-path", default="", metavar="/PATH", help="where a proxy has put the page")
    parser.add_argument("--api-key-file", type=Path, help=f"one key a line (or set {KEY_VARIABLE})")
    args = parser.parse_args(argv)
    keys = tuple(read_keys(args.api_key_file, KEY_VARIABLE))
    if not is_loopback(args.host) and not keys:
        raise UsageError(
            f"--host {args.host} is reachable by others; that needs an API key",
            f"set {KEY_VARIABLE} or give --api-key-file",
        )
    root = args.root_path.rstrip("/")
    if root and not root.startswith("/"):
        raise UsageError(f"--root-path {args.root_path} does not begin with a /")
    with bind(args.host, args.port) as listener:
        # Imported late: --help, a wrong argument and a port in use are answered at once.
        from edge.ui import app

        port = listener.getsockname()[1]
        sys.stdout.write(addresses(args.host, port, root))
        sys.stdout.flush()
        app.serve(listener, Path.cwd(), keys=keys, root_path=root)
    return 0


def addresses(host: str, port: int, root: str) -> str:
    """The lines that say where the page is, from here and from another machine."""
    shown = f"[{host}]" if ":" in host else host
    lines = f"http://{shown}:{port}{root}/  (Ctrl-C ends the page; what it started goes on)\n"
    if is_loopback(host):
        lines += f"from another machine: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}\n"
    return lines
