"""JSON over HTTP with a server that somebody else runs: whatever it answers becomes a value or a sentence."""

from __future__ import annotations

import http.client
import json
import re
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from edge.arguments import VERIFY_KEY
from edge.errors import EdgeError, InputError

T = TypeVar("T")

# Bytes of an answer; the largest that is meant has 24 tokens with 20 alternatives each.
_MOST = 64 << 20
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")


class Refused(InputError):
    """The server has no such route, refuses what was asked for, or answers with something else."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None leaves the redirect to whoever asked: a key must not follow it."""


@dataclass(frozen=True)
class Api:
    """root: the URL before `/v1`. key: sent as a bearer token, "" for none. limit: seconds without a byte."""

    root: str
    key: str = ""
    limit: float = 300.0

    def ask(self, path: str, shape: type[T], body: Any = None) -> T:
        """What `path` answers, as `shape`; a POST where there is a body.

        Raises Refused where it has no such thing, EdgeError where nothing answers, or a key is wanted.
        """
        url = self.root + path
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode("utf-8")
        try:
            request = urllib.request.Request(url, data, headers)
            with self._opener().open(request, timeout=self.limit) as response:
                kind = response.headers.get("Content-Type", "")
                text = response.read(_MOST + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._status(url, error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._silence(url, error) from error
        if len(text) > _MOST:
            raise Refused(f"{url} answers with more than {_MOST >> 20} MiB", "is this a model's server?")
        try:
            return msgspec.json.decode(text, type=shape)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            what = f"JSON of another kind ({error})" if "json" in kind else kind or "no JSON"
            raise Refused(
                f"{url} answers with {what}", "is this a model's server, and the URL before /v1?"
            ) from error

    def _opener(self) -> urllib.request.OpenerDirector:
        # A proxy that the environment names cannot reach this machine's own servers.
        local = _LOOPBACK.fullmatch(urlsplit(self.root).hostname or "")
        proxies = [urllib.request.ProxyHandler({})] if local else []
        return urllib.request.build_opener(_NoRedirect(), *proxies)

    def _status(self, url: str, error: urllib.error.HTTPError) -> EdgeError:
        """The error for a status that is no success."""
        if error.code in (301, 302, 303, 307, 308):
            return InputError(
                f"{url} redirects to {error.headers.get('Location')}", "give that server's own URL"
            )
        if error.code in (401, 403):
            wrong = "does not take this key" if self.key else "wants a key"
            return InputError(
                f"{url} {wrong} (HTTP {error.code})", f"give it: --api-key KEY, or the variable {VERIFY_KEY}"
            )
        message = _message(error)
        if error.code in (429, 503):
            return EdgeError(
                f"{url} is not ready (HTTP {error.code}{message})", "wait until it is, then ask again"
            )
        return Refused(
            f"{url} answers with HTTP {error.code}{message}",
            "is this a model's server, and the URL before /v1?",
        )

    def _silence(self, url: str, error: Exception) -> EdgeError:
        """The error where no answer came."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLError):
            return EdgeError(
                f"{url}: no safe connection: {getattr(reason, 'verify_message', '') or reason}",
                "a certificate of your own: name its authority in SSL_CERT_FILE; a server without TLS: http://",
            )
        if isinstance(reason, TimeoutError):
            return EdgeError(
                f"{url} did not answer within {self.limit:g} s", "is the server busy, or the port another's?"
            )
        if isinstance(reason, http.client.HTTPException):
            return EdgeError(f"{url} does not speak HTTP: {reason!r:.100}", "check the port")
        return EdgeError(f"{url} does not answer: {reason}", "is the server running, and the address right?")


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words in the error bodies of OpenAI, FastAPI and Ollama; "" without any."""
    try:
        body = json.loads(error.read(100_000))
        words = body.get("error") or body.get("detail") or body.get("message")
        words = words.get("message") if isinstance(words, dict) else words
    except (OSError, ValueError, AttributeError, RecursionError, http.client.HTTPException):
        return ""
    return f": {words[:200]}" if isinstance(words, str) else ""


def open_api(url: str, key: str) -> Api:
    """The server at `url`: with or without `/v1`, `/api` or the whole route. Raises InputError for no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InputError(f"{url} is no URL: {error}", "give one as http://127.0.0.1:8000") from error
    if not parts.hostname:
        raise InputError(f"{url} names no host", "give one as http://127.0.0.1:8000")
    if parts.username is not None:
        raise InputError(
            "a key or a password does not belong into the URL", f"--api-key KEY, or the variable {VERIFY_KEY}"
        )
    path = re.sub(r"(/v1|/api)?(/chat/completions|/completions|/models|/chat)?/*$", "", parts.path)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Api(f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}", key)
