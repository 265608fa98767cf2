"""The FastAPI application: routes, error bodies, what is said of each in /openapi.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import edge
from edge.errors import RequestError
from edge.server import auth, error_body
from edge.server.access_log import Trace
from edge.server.api import (
    admin,
    anthropic,
    generate,
    health,
    ollama,
    ollama_models,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    tokenize,
    web_page,
)
from edge.server.auth import Access, Guard
from edge.server.model_registry import Registry

_ROUTERS = (
    generate,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    anthropic,
    ollama,
    ollama_models,
    tokenize,
    health,
    admin,
    web_page,
)
_ERRORS = {
    "400": "The request cannot be honoured; the message names the field and its bound.",
    "401": "A key is needed, or this one is not valid.",
    "403": "The host name, the page or the route is not open to this client.",
    "404": "No such model.",
    "408": "The request ran out of the time that it gave itself.",
    "413": "The body is too large.",
    "429": "The queue is full; see Retry-After.",
    "500": "A fault of the server.",
    "503": "No model is loaded, or its engine has died.",
}
_STREAMS: dict[str, Any] = {"text/event-stream": {}, "application/x-ndjson": {}}


def create_app(registry: Registry, access: Access | None = None) -> FastAPI:
    """An application over the models of `registry`."""
    app = FastAPI(
        title="edge",
        version=edge.__version__,
        description=f"Serves {', '.join(registry.names)}.",
        # FastAPI's own page runs scripts of another host; edge.server.api.web_page has one that runs none.
        docs_url=None,
        redoc_url=None,
    )
    app.state.registry = registry
    app.add_middleware(Guard, access=access or Access())
    # Added last, so it is the outermost.
    app.add_middleware(Trace, metrics=registry.metrics)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(UnicodeEncodeError, _no_text)
    app.add_exception_handler(Exception, _fault)
    for module in _ROUTERS:
        app.include_router(module.router)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the answers that are really given."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path, methods in document["paths"].items():
            for about in methods.values():
                about["responses"].pop("422", None)
                for status, text in _ERRORS.items():
                    content = {"application/json": {"schema": {"type": "object"}}}
                    about["responses"].setdefault(status, {"description": text, "content": content})
                if path in _STREAMING:
                    about["responses"]["200"].setdefault("content", {}).update(_STREAMS)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


_STREAMING = frozenset(
    {
        "/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
        "/api/generate", "/api/chat",
    }
)  # fmt: skip


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_body.respond(request.url.path, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    # Where a field may be of several kinds, a bound that was crossed says more than a kind that it is not.
    same = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    first = max(same, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    if first["type"] == "json_invalid":
        said = RequestError(
            f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}",
            code="json_invalid",
            param="body",
        )
        return error_body.respond(request.url.path, said)
    where = _field(first["loc"], error.body)
    said = RequestError(f"{where}: {first['msg']}", code=str(first["type"]), param=where)
    return error_body.respond(request.url.path, said)


def _field(place: Sequence[int | str], body: Any) -> str:
    """The field that a validation error is about, without pydantic's names for the kinds that it tried."""
    if place[0] != "body":
        return ".".join(map(str, place[1:]))
    path = []
    for part in place[1:]:
        held: Any = body if isinstance(body, (dict, list)) else {}
        try:
            body = held[part]
        except (KeyError, IndexError, TypeError):
            if part is not place[-1] or not isinstance(body, dict) or not str(part).isidentifier():
                continue
        path.append(str(part))
    return ".".join(path)[:200] or "body"


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 413:
        said = auth.too_large()
    else:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        said = RequestError(
            f"{request.method} {request.url.path}: {error.detail}", status=error.status_code, code=code
        )
    response = error_body.respond(request.url.path, said)
    response.headers.update(error.headers or {})
    return response


async def _no_text(request: Request, error: Exception) -> Response:
    said = RequestError("a text holds half of a surrogate pair, which is no character", code="invalid_text")
    return error_body.respond(request.url.path, said)


async def _fault(request: Request, error: Exception) -> Response:
    name = request.scope.get("edge.id", "")
    said = RequestError(
        f"a fault of the server; its log has it under the request id {name}", status=500, code="server_error"
    )
    response = error_body.respond(request.url.path, said)
    response.headers["x-request-id"] = name
    return response
