"""The access log: a request id, a line and a count for every request. Pure ASGI, outermost.

HEAD is answered by the route of GET. A request that the server's end cancels gets a 503.

A line names the route and never quotes a prompt or an answer. A client's own X-Request-Id is kept where it is
short printable ASCII.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.server import error_body
from edge.server.metrics import Metrics
from edge.server.served_model import shutting_down
from edge.server.streaming import SEND

log = logging.getLogger("edge.http")

_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Monitoring asks these again and again: they are logged only when they fail.
_QUIET = frozenset({"/health", "/ready", "/metrics"})


class AccessLog:
    """metrics: counts the answers. The rest of the application reads the id as `scope["edge.id"]`."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client_id = Headers(scope=scope).get("x-request-id", "")
        request_id = client_id if _ID.fullmatch(client_id) else secrets.token_hex(8)
        began = time.monotonic()
        status = 0

        async def start(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("ascii"))]
            await send(message)

        scope["edge.id"] = request_id
        scope[SEND] = send
        method = scope["method"]
        if method == "HEAD":
            # The server keeps the scope that it has made, and sends no body by it.
            scope = {**scope, "method": "GET"}
        try:
            await self._app(scope, receive, start)
        except asyncio.CancelledError:
            if status:
                raise
            await error_body.respond(scope, shutting_down())(scope, receive, start)
        except BaseException:
            status = status or 500
            raise
        finally:
            # Nothing was sent: the client left before there was an answer.
            self._record(scope, method, status or 499, time.monotonic() - began)

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.answered(route, method, status)
        if route in _QUIET and status < 400:
            return
        fields: dict[str, Any] = {
            "id": scope["edge.id"],
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000),
            "model": scope.get("state", {}).get("model"),
        }
        log.info(" ".join(f"{key}={_logfmt(value)}" for key, value in fields.items() if value is not None))


def _logfmt(value: Any) -> str:
    """The value as logfmt has it: quoted where it must be."""
    text = str(value)
    if re.fullmatch(r"[^\s\"=\x00-\x1f\x7f]+", text):
        return text
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
