"""The checks before any route: Host and Origin, keys, body size. Pure ASGI."""

from __future__ import annotations

import base64
import hmac
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import RequestError
from edge.server import error_body
from edge.server.access import Access, is_loopback

MAX_BODY = 4 * 2**20
OPEN_PATHS = frozenset({"/health"})
PAGES = frozenset({"/", "/docs"})
ADMIN = "/admin/"
_PREFLIGHT_S = 600
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d*)?")
_FIELD_NAMES = re.compile(r"[A-Za-z0-9_-]+(?:[ \t]*,[ \t]*[A-Za-z0-9_-]+)*")


class Guard:
    """Refuses requests that must not reach a route.

    Without a key the Host header must be a name of this machine: a web page whose host name was made to point
    here cannot drive the server. A page of another origin is refused too, unless it was configured.
    """

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._admin_keys = [key.encode("utf-8") for key in access.admin_keys]
        self._keys = [key.encode("utf-8") for key in access.keys]
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin is not None and self._access.allows(origin)
        if origin is not None and allowed:
            send = _with_cors(send, origin, headers.get("access-control-request-headers", ""))
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await Response(status_code=204)(scope, receive, send)
                return
        try:
            hosts = headers.getlist("host")
            if len(hosts) > 1:
                # A reader before this one may have taken the other (RFC 9112, 3.2).
                raise RequestError("the request has several Host headers", code="invalid_http")
            if not self._keys:
                check_host("".join(hosts))
                _check_listener(scope.get("server"))
            if not allowed:
                _check_origin(scope["path"], headers)
            self._check_key(scope["path"], headers)
            _check_length(headers.get("content-length", "0"))
        except RequestError as error:
            response = error_body.respond(scope, error)
            if error.status == 401:
                # A browser asks its user for the key, and sends it along from then on.
                scheme = 'Basic realm="edge: the API key is the password"'
                response.headers["www-authenticate"] = scheme if scope["path"] in PAGES else "Bearer"
            await response(scope, receive, send)
            return
        if scope["method"] == "POST":
            # Every body here is JSON, whatever its type says: `curl -d` and some clients call it a form.
            others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*others, (b"content-type", b"application/json")]
        await self._app(scope, _limited(receive), send)

    def _check_key(self, path: str, headers: Headers) -> None:
        if path.startswith(ADMIN):
            if not self._admin_keys:
                raise _forbidden(
                    "this server has no admin key, so nobody may change it",
                    "no_admin_key",
                    "serve with --admin-key-file",
                )
            keys, message = self._admin_keys, "an admin key is needed"
        elif path in OPEN_PATHS or not self._keys:
            return
        else:
            # An admin key opens every other route too.
            keys = self._keys + self._admin_keys
            message = "a valid API key is needed: Authorization: Bearer ..."
        if not has_key(headers, keys):
            raise RequestError(message, status=401, code="invalid_api_key")


def check_host(given: str) -> None:
    """Raise RequestError for a Host header that is no name of this machine."""
    match = _HOST.fullmatch(given)
    if match is None or not is_loopback(match[1].lower()):
        raise _forbidden(
            f"this server does not answer to the host name '{given[:100]}'",
            "wrong_host",
            "ask for 127.0.0.1 or localhost, or serve with an API key",
        )


def _check_listener(server: tuple[str, int | None] | None) -> None:
    """Another server that runs this application, as Ray's proxy does, may listen beyond this machine."""
    if server is not None and not is_loopback(server[0]):
        raise _forbidden(
            f"this server has no API key, so it does not answer at {server[0]}",
            "no_api_key",
            "listen on 127.0.0.1, or serve with an API key",
        )


def _forbidden(message: str, code: str, hint: str = "") -> RequestError:
    return RequestError(message, status=403, code=code, hint=hint)


def _check_origin(path: str, headers: Headers) -> None:
    origin = headers.get("origin")
    if origin is not None and not same_host(origin, headers.get("host")):
        raise _forbidden(
            f"pages of {origin} may not use this server", "wrong_origin", "--cors-origin allows one"
        )
    if path not in PAGES and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        # An image or a form of another site's page: browsers send no Origin with all of those.
        raise _forbidden("pages of other sites may not use this server", "wrong_origin")


def _check_length(length: str) -> None:
    if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > MAX_BODY:
        raise too_large()


def _limited(receive: Receive) -> Receive:
    """Count a body while it comes: a chunked one has no length to check before."""
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY:
            # FastAPI lets this kind of exception through while it reads a body.
            raise HTTPException(413)
        return message

    return limited


def has_key(headers: Headers, keys: list[bytes]) -> bool:
    """Whether a request brings one of the keys: as a bearer token, a password or x-api-key."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        key = _password(key)
    elif scheme.lower() != "bearer":
        key = headers.get("x-api-key", "")
    # Every key is compared, each in constant time.
    return any([hmac.compare_digest(valid, key.encode("utf-8")) for valid in keys])


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


def same_host(origin: str, host: str | None) -> bool:
    """Whether a page's origin is the host that it asks."""
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _with_cors(send: Send, origin: str, asked: str) -> Send:
    """A sender that lets pages of `origin` read the answer. asked: the headers that they want to send."""
    usual = "authorization, content-type, x-api-key, x-request-id"

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = {
                "access-control-allow-origin": origin,
                "access-control-allow-methods": "GET, POST, DELETE",
                "access-control-allow-headers": asked if _FIELD_NAMES.fullmatch(asked) else usual,
                "access-control-expose-headers": "x-request-id, x-edge-model, x-edge-digest, x-edge-device",
                "access-control-max-age": str(_PREFLIGHT_S),
                "vary": "origin, access-control-request-headers",
            }
            rows = [(name.encode("ascii"), value.encode("ascii")) for name, value in extra.items()]
            message["headers"] = [*message["headers"], *rows]
        await send(message)

    return sender


def too_large() -> RequestError:
    return RequestError(f"the body is over {MAX_BODY} bytes", status=413, code="body_too_large")
