"""The FastAPI application: the API families, error bodies, and the answers that /openapi.json lists.

To add an API family, write a module in edge/server/api/ that has a `router`, and list it in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import edge
from edge.errors import RequestError
from edge.server import auth, error_body
from edge.server.access import Access
from edge.server.access_log import AccessLog
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
from edge.server.model_registry import Registry

# The routes of each family, and the error body that its clients read.
FAMILIES: tuple[tuple[APIRouter, error_body.ErrorBody], ...] = (
    (generate.router, error_body.openai),
    (openai_chat.router, error_body.openai),
    (openai_completions.router, error_body.openai),
    (openai_embeddings.router, error_body.openai),
    (openai_responses.router, error_body.openai),
    (anthropic.router, anthropic.error_body),
    (ollama.router, ollama.error_body),
    (ollama_models.router, ollama.error_body),
    (tokenize.router, error_body.openai),
    (health.router, error_body.openai),
    (admin.router, error_body.openai),
    (web_page.router, error_body.openai),
)
# By the prefix of a path; any other has OpenAI's.
ERROR_BODIES = {router.prefix: body for router, body in FAMILIES if body is not error_body.openai}
_ERRORS = {
    "400": "The request cannot be honoured; the message names the field and its bound.",
    "401": "A key is needed, or this one is not valid.",
    "403": "The host name, the page or the route is not open to this client.",
    "404": "No such model.",
    "408": "The request ran out of its own time limit.",
    "413": "The body is too large.",
    "429": "The queue is full; see Retry-After.",
    "500": "A fault of the server.",
    "503": "No model is loaded, or its engine has died.",
}


def create_app(registry: Registry, access: Access | None = None) -> FastAPI:
    """An application over the models of `registry`."""
    app = FastAPI(
        title="edge",
        version=edge.__version__,
        description=f"Serves {', '.join(registry.entries)}.",
        # FastAPI's own page runs scripts of another host; edge.server.api.web_page has one that runs none.
        docs_url=None,
        redoc_url=None,
    )
    app.state.registry = registry
    app.state.error_bodies = ERROR_BODIES
    app.add_middleware(auth.Guard, access=access or Access())
    # Added last, so it is the outermost.
    app.add_middleware(AccessLog, metrics=registry.metrics)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(UnicodeEncodeError, _surrogate)
    app.add_exception_handler(Exception, _fault)
    for router, _ in FAMILIES:
        app.include_router(router)
        if router.prefix == "/v1":
            _include_without_prefix(app, router)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _include_without_prefix(app: FastAPI, router: APIRouter) -> None:
    """OpenAI's routes without /v1 too: many clients are given a base URL that lacks it."""
    for route in router.routes:
        assert isinstance(route, APIRoute)
        path = route.path.removeprefix(router.prefix)
        app.add_api_route(path, route.endpoint, methods=sorted(route.methods or ()), include_in_schema=False)


def _described(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the errors that are really answered."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for about in (about for methods in document["paths"].values() for about in methods.values()):
            about["responses"].pop("422", None)
            for status, text in _ERRORS.items():
                content = {"application/json": {"schema": {"type": "object"}}}
                about["responses"].setdefault(status, {"description": text, "content": content})
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_body.respond(request.scope, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    """A body that has the wrong form: FastAPI found it, or a route when it put parts of the body together."""
    assert isinstance(error, (RequestValidationError, ValidationError))
    errors = error.errors()
    # Where a field may have several types, a crossed bound says more than a type that does not match.
    alike = [entry for entry in errors if entry["loc"][:2] == errors[0]["loc"][:2]]
    first = max(alike, key=lambda entry: (not entry["type"].endswith("_type"), len(entry["loc"])))
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return error_body.respond(request.scope, RequestError(message, code="json_invalid", param="body"))
    where = _field(first["loc"], error.body) if isinstance(error, RequestValidationError) else "messages"
    message = f"{where}: {error_body.reason(first)}"
    return error_body.respond(request.scope, RequestError(message, code=str(first["type"]), param=where))


def _field(place: Sequence[int | str], body: Any) -> str:
    """The field that a validation error is about, without pydantic's names for the types that it tried."""
    if place[0] != "body":
        return ".".join(map(str, place[1:]))
    path = []
    for part in place[1:]:
        container: Any = body if isinstance(body, (dict, list)) else {}
        try:
            body = container[part]
        except (KeyError, IndexError, TypeError):
            if part is not place[-1] or not isinstance(body, dict) or not str(part).isidentifier():
                continue
        path.append(str(part))
    return ".".join(path)[:200] or "body"


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    failure = auth.too_large()
    if error.status_code != 413:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        hint = "routes for OpenAI's and Anthropic's clients begin with /v1; /docs lists all"
        failure = RequestError(
            message, status=error.status_code, code=code, hint=hint if code == "not_found" else ""
        )
    response = error_body.respond(request.scope, failure)
    response.headers.update(error.headers or {})
    return response


async def _surrogate(request: Request, error: Exception) -> Response:
    message = "a text holds half of a surrogate pair, which is no character"
    return error_body.respond(request.scope, RequestError(message, code="invalid_text"))


async def _fault(request: Request, error: Exception) -> Response:
    request_id = request.scope.get("edge.id", "")
    message = f"a fault of the server; its log has it under the request id {request_id}"
    response = error_body.respond(request.scope, RequestError(message, status=500, code="server_error"))
    response.headers["x-request-id"] = request_id
    return response
