"""Who gets in, and with how much: keys, Host and Origin, body size. Pure ASGI, before any route."""

from __future__ import annotations

import base64
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import RequestError
from edge.server import error_body

MAX_BODY = 4 * 2**20
OPEN_PATHS = frozenset({"/health"})
PAGES = frozenset({"/", "/docs"})
ADMIN = "/admin/"
_PREFLIGHT_S = 600


@dataclass(frozen=True, slots=True)
class Access:
    """keys: any of them opens every route; none: no key is asked.

    admin_keys: open what changes the server as well; none: nobody may. origins: pages that may call, as
    `https://host[:port]`.
    """

    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address) means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses what must not reach a route.

    Without a key only this machine's own names are taken as Host, so that a web page whose name points here
    cannot drive the server; a page of another origin is refused as well, unless it was configured.
    """

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._admin_keys = [key.encode("utf-8") for key in access.admin_keys]
        # Who may change the server may also ask it.
        self._keys = [key.encode("utf-8") for key in access.keys]
        self._origins = frozenset(access.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        shared = origin is not None and origin in self._origins
        if shared:
            assert origin is not None
            send = _with_cors(send, origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await Response(status_code=204)(scope, receive, send)
                return
        error = self._refusal(scope["path"], headers, shared)
        if error is not None:
            refused = error_body.respond(scope["path"], error)
            if error.status == 401:
                # A browser asks its user for the key, and sends it along from then on.
                scheme = 'Basic realm="edge: the API key is the password"'
                refused.headers["www-authenticate"] = scheme if scope["path"] in PAGES else "Bearer"
            await refused(scope, receive, send)
            return
        if scope["method"] == "POST":
            # Every body here is JSON, whatever it is called: `curl -d` and some clients call it a form.
            kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*kept, (b"content-type", b"application/json")]
        await self._app(scope, self._counted(receive), send)

    def _refusal(self, path: str, headers: Headers, shared: bool) -> RequestError | None:
        try:
            host = urlsplit("//" + headers.get("host", "")).hostname or ""
        except ValueError:
            host = ""
        origin = headers.get("origin")
        if not self._keys and not is_loopback(host):
            return RequestError(
                f"this server does not answer to the host name '{host}'",
                status=403,
                code="wrong_host",
                hint="ask for 127.0.0.1 or localhost, or serve with an API key",
            )
        if origin is not None and not shared and not _same(origin, headers.get("host")):
            return RequestError(
                f"pages of {origin} may not use this server",
                status=403,
                code="wrong_origin",
                hint="--cors-origin allows one",
            )
        if path not in PAGES and headers.get("sec-fetch-site") in ("cross-site", "same-site") and not shared:
            # An image or a form of a foreign page: browsers send no Origin with all of those.
            return RequestError("pages of others may not use this server", status=403, code="wrong_origin")
        if path.startswith(ADMIN):
            if not self._admin_keys:
                return RequestError(
                    "this server has no admin key, so nobody may change it",
                    status=403,
                    code="no_admin_key",
                    hint="serve with --admin-key-file",
                )
            if not _has_key(headers, self._admin_keys):
                return RequestError("an admin key is needed", status=401, code="invalid_api_key")
        elif path not in OPEN_PATHS and self._keys and not _has_key(headers, self._keys + self._admin_keys):
            return RequestError(
                "a valid API key is needed: Authorization: Bearer ...", status=401, code="invalid_api_key"
            )
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > MAX_BODY:
            return too_large()
        return None

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY:
                # FastAPI lets this kind of exception through while it reads a body.
                raise HTTPException(413)
            return message

        return counted


def _has_key(headers: Headers, keys: list[bytes]) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        given = _password(given)
    elif scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    # Every key is compared, each in constant time.
    return any([hmac.compare_digest(key, given.encode("utf-8")) for key in keys])


def _password(given: str) -> str:
    try:
        return base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


def _same(origin: str, host: str | None) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _with_cors(send: Send, origin: str) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = {
                "access-control-allow-origin": origin,
                "access-control-allow-methods": "GET, POST, DELETE",
                "access-control-allow-headers": "authorization, content-type, x-api-key, x-request-id",
                "access-control-expose-headers": "x-request-id, x-edge-model, x-edge-digest, x-edge-device",
                "access-control-max-age": str(_PREFLIGHT_S),
                "vary": "origin",
            }
            rows = [(name.encode("ascii"), value.encode("ascii")) for name, value in extra.items()]
            message["headers"] = [*message["headers"], *rows]
        await send(message)

    return sender


def too_large() -> RequestError:
    return RequestError(f"the body is over {MAX_BODY} bytes", status=413, code="body_too_large")
