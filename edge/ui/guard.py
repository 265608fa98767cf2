"""The checks before the page and its websocket: Host, Origin and key. Pure ASGI."""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import RequestError
from edge.server.auth import check_host, has_key, same_host

COOKIE = "edge-page"
# Nothing of another host is loaded, whatever a model's text says. Vue compiles templates: unsafe-eval.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'self'"
)


class Guard:
    """Refuses requests that must not reach the page.

    Without keys the Host header must be a name of this machine. A page of another origin is refused always,
    on the websocket too. A key comes as a password, once: a cookie carries it on, for some browsers send no
    password with a websocket.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, [key.encode("utf-8") for key in keys]
        self._token = secrets.token_urlsafe()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(headers)
        except RequestError as error:
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before it was accepted: HTTP 403
                return
            asks = {"www-authenticate": 'Basic realm="edge: the API key is the password"'}
            response = PlainTextResponse(str(error), error.status, asks if error.status == 401 else {})
            await response(scope, receive, send)
            return

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["content-security-policy"] = _POLICY
                answer["x-content-type-options"] = "nosniff"
                if self._keys and not self._has_cookie(headers):
                    cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                    answer.append("set-cookie", cookie)
            await send(message)

        await self._app(scope, receive, sender)

    def _check(self, headers: Headers) -> None:
        hosts = [headers.get("host", "")]
        if self._keys:
            # A proxy's: pages of other sites cannot set it.
            hosts.append(headers.get("x-forwarded-host", ""))
        else:
            check_host(hosts[0])
        origin = headers.get("origin")
        if origin is not None and not any(same_host(origin, host) for host in hosts):
            raise RequestError(f"pages of {origin} may not use this one", status=403)
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and (
            headers.get("sec-fetch-mode") != "navigate"
        ):
            raise RequestError("pages of other sites may not use this one", status=403)
        if self._keys and not (self._has_cookie(headers) or has_key(headers, self._keys)):
            raise RequestError("the API key is needed, as the password", status=401)

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value, self._token)
