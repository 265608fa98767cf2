"""Where a server that runs already is: `NAME=URL`, read before anything heavy is imported."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from edge.errors import UsageError

_NAME = re.compile(r"[\w][\w.-]*")


def name_and_url(given: str, option: str) -> tuple[str, str]:
    """(name, URL) of `NAME=URL`. Raises UsageError, which names the option, where it is no such pair."""
    name, _, url = given.partition("=")
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not _NAME.fullmatch(name):
        raise UsageError(
            f"{option}: '{given}' is not NAME=URL",
            "such as vllm=http://127.0.0.1:8000 or ollama=http://127.0.0.1:11434/api#MODEL",
        )
    return name, url
