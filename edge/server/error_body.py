"""Errors in the words of the API that was asked: OpenAI's, Ollama's or Anthropic's body."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from edge.errors import RequestError

_ANTHROPIC = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    408: "timeout_error",
}  # fmt: skip


def body(path: str, error: RequestError) -> dict[str, Any]:
    """The error body that clients of `path` read. What it quotes of theirs may be no valid text."""
    said = str(error).encode("utf-8", "backslashreplace").decode("utf-8")
    if path.startswith("/api/"):
        return {"error": said}
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": said}}
    whole: dict[str, Any] = error.body()
    whole["error"]["message"] = said
    if error.param is not None:
        whole["error"]["param"] = error.param.encode("utf-8", "backslashreplace").decode("utf-8")
    return whole


def respond(path: str, error: RequestError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    return JSONResponse(body(path, error), status_code=error.status, headers=headers)
