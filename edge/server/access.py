"""Who may use the server: keys, origins of pages, and which host names mean this machine."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from edge.errors import InputError, UsageError

# Apps have schemes of their own (app, tauri, chrome-extension, capacitor); these are no page's.
_NOT_A_PAGE = frozenset({"about", "blob", "data", "file", "ftp", "javascript", "ws", "wss"})
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?:\d{1,5}|\*))?")

# Connections that the operating system holds until they are accepted.
BACKLOG = 1024
KEY_VARIABLE = "EDGE_API_KEY"
ADMIN_KEY_VARIABLE = "EDGE_ADMIN_KEY"


@dataclass(frozen=True, slots=True)
class Access:
    """What opens the server.

    keys: each opens every route; without any, no key is asked. admin_keys: open /admin/ as well; without any,
    nobody may use it. origins: pages that may call, as `scheme://host[:port]`; the port `*` means any.
    """

    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def allows(self, origin: str) -> bool:
        """Whether pages of `origin` may call."""
        return origin in self.origins or re.sub(r":\d+$", "", origin) + ":*" in self.origins


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address) means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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
    match = _ORIGIN.fullmatch(origin)
    if match is None or match[1] in _NOT_A_PAGE:
        raise UsageError(
            f"--cors-origin {origin} is no origin",
            "give it as browsers send it: https://host, http://host:port, http://localhost:* for any port, "
            "app://name; a * stands for the port alone",
        )
    return origin
