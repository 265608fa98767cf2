"""A request id, a line in the log and a count for every request. Pure ASGI, outermost.

The line has the route, never what was asked or answered. A client's own X-Request-Id is kept if it is sane.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.server.metrics import Metrics
from edge.server.streaming import SEND

log = logging.getLogger("edge.http")

_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Asked again and again by programs that watch: logged only when they fail.
_QUIET = frozenset({"/health", "/ready", "/metrics"})


class Trace:
    """metrics: counts the answers. The rest of the application sees the id as `scope["edge.id"]`."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else secrets.token_hex(8)
        began = time.monotonic()
        status = 0

        async def start(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode("ascii"))]
            await send(message)

        scope["edge.id"] = name
        scope[SEND] = send
        try:
            await self._app(scope, receive, start)
        except BaseException:
            status = status or 500
            raise
        finally:
            # Nothing was sent: the client had gone before there was an answer.
            self._close(scope, name, status or 499, time.monotonic() - began)

    def _close(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.answered(route, scope["method"], status)
        if route in _QUIET and status < 400:
            return
        fields: dict[str, Any] = {
            "id": name,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000),
        }
        if (model := scope.get("state", {}).get("model")) is not None:
            fields["model"] = model
        log.info(" ".join(f"{key}={_value(value)}" for key, value in fields.items()))


def _value(value: Any) -> str:
    """For logfmt: quoted where it has to be."""
    text = str(value)
    if re.fullmatch(r"[^\s\"=\x00-\x1f\x7f]+", text):
        return text
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
