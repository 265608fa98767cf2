"""Who gets in, and with how much: keys, Host and Origin, body size. Pure ASGI, before any route."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import RequestError

MAX_BODY = 4 * 2**20
OPEN_PATHS = frozenset({"/health"})


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address) means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses what must not reach a route. keys: any of them opens every route; none: no key is asked.

    Without a key only this machine's own names are taken as Host, so that a web page whose name points here
    cannot drive the server; a page of another origin is refused as well.
    """

    def __init__(self, app: ASGIApp, *, keys: list[str], max_body: int = MAX_BODY) -> None:
        self._app = app
        self._keys = [key.encode("utf-8") for key in keys]
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._refusal(scope["path"], headers)
        if error is not None:
            await JSONResponse(error.body(), status_code=error.status)(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _refusal(self, path: str, headers: Headers) -> RequestError | None:
        host = urlsplit("//" + headers.get("host", "")).hostname or ""
        origin = headers.get("origin")
        if not self._keys and not is_loopback(host):
            return RequestError(
                f"this server does not answer to the host name '{host}'",
                status=403,
                code="wrong_host",
                hint="ask for 127.0.0.1 or localhost, or serve with an API key",
            )
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return RequestError(f"pages of {origin} may not use this server", status=403, code="wrong_origin")
        if self._keys and path not in OPEN_PATHS and not self._has_key(headers):
            return RequestError(
                "a valid API key is needed: Authorization: Bearer ...", status=401, code="invalid_api_key"
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._max_body:
            return _too_large(self._max_body)
        return None

    def _has_key(self, headers: Headers) -> bool:
        given = headers.get("authorization", "")
        given = given[7:] if given[:7].lower() == "bearer " else headers.get("x-api-key", "")
        # Every key is compared, each in constant time.
        return any([hmac.compare_digest(key, given.encode("utf-8")) for key in self._keys])

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body:
                # FastAPI lets this kind of exception through while it reads a body.
                raise HTTPException(413, str(_too_large(self._max_body)))
            return message

        return counted


def _too_large(bound: int) -> RequestError:
    return RequestError(f"the body is over {bound} bytes", status=413, code="body_too_large")
