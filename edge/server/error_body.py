"""Error bodies: OpenAI's form, or the one of the API family whose path was asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Scope

from edge.errors import RequestError

# An error as the clients of one API family read it.
ErrorBody = Callable[[RequestError], dict[str, Any]]


def openai(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object, which every family has that does not define one of its own."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def respond(scope: Scope, error: RequestError) -> Response:
    """The HTTP answer to a request that failed, in the form of its path's API family."""
    bodies: dict[str, ErrorBody] = scope["app"].state.error_bodies
    body = next((form for prefix, form in bodies.items() if scope["path"].startswith(prefix)), openai)
    text = json.dumps(body(error), ensure_ascii=False, separators=(",", ":"))
    headers = {} if error.retry_after is None else {"retry-after": str(max(1, round(error.retry_after)))}
    # The message may quote half of a surrogate pair, which UTF-8 has no bytes for.
    return Response(text.encode("utf-8", "replace"), error.status, headers, "application/json")


def reason(entry: Mapping[str, Any]) -> str:
    """What is wrong with a field, of an entry of pydantic's errors; names a value that is none of a few."""
    given = f", not {str(entry['input'])[:60]!r}" if entry["type"] == "literal_error" else ""
    return f"{entry['msg']}{given}"
