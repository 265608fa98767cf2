"""The FastAPI application: routes, error bodies, health."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import edge
from edge.errors import RequestError
from edge.server import generate, openai
from edge.server.guard import Guard
from edge.server.serving import Serving


def create_app(serving: Serving, *, keys: list[str] | None = None) -> FastAPI:
    """An application over a started engine. keys: API keys; none needed where the list is empty."""
    app = FastAPI(title="edge", version=edge.__version__, description=f"Serves {serving.name}.")
    app.state.serving = serving
    app.add_middleware(Guard, keys=keys or [])
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.include_router(generate.router)
    app.include_router(openai.router)
    app.add_api_route("/health", health, methods=["GET"], tags=["state"])
    app.add_api_route("/ready", ready, methods=["GET"], tags=["state"])
    app.add_api_route("/info", info, methods=["GET"], tags=["state"])
    return app


async def health(request: Request) -> dict[str, Any]:
    """Alive, and what it serves on which device."""
    serving: Serving = request.app.state.serving
    engine = serving.engine
    return {
        "status": engine.state,
        "model": serving.name,
        "device": engine.ready.device if engine.ready else None,
        "why": engine.ready.why if engine.ready else None,
        "error": str(engine.failure) if engine.failure else None,
    }


async def ready(request: Request) -> dict[str, str]:
    """200 when the model is loaded, 503 before."""
    serving: Serving = request.app.state.serving
    return {"status": "ready", "model": serving.ready.name}


async def info(request: Request) -> dict[str, Any]:
    """The artefact, how it is loaded, and what it does now."""
    serving: Serving = request.app.state.serving
    loaded, stats = serving.ready, serving.engine.stats
    return {
        "model": serving.name,
        "digest": serving.digest or None,
        "file": loaded.name,
        "backend": loaded.kind,
        "device": loaded.device,
        "why": loaded.why,
        "context": loaded.context,
        "slots": loaded.slots,
        "kv_cells": loaded.capacity,
        "vocab": loaded.vocab,
        "stop_ids": loaded.stop_ids,
        "thinking": serving.thinking,
        "settings": loaded.settings,
        "load_s": round(loaded.load_s, 3),
        "restarts": serving.engine.restarts,
        "running": stats.running if stats else 0,
        "waiting": stats.waiting if stats else 0,
        "busy_slots": stats.busy_slots if stats else 0,
        "kv_tokens": stats.kv_tokens if stats else 0,
        "steps": stats.steps if stats else 0,
        "step_tokens": stats.step_tokens if stats else 0,
        "step_s": round(stats.step_s, 4) if stats else 0.0,
        "up_s": round(stats.up_s, 4) if stats else 0.0,
    }


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query")]
    where = ".".join(path) or "body"
    refused = RequestError(f"{where}: {first['msg']}", code=str(first["type"]), param=where)
    return JSONResponse(refused.body(), status_code=400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    said = RequestError(
        f"{request.method} {request.url.path}: {error.detail}", status=error.status_code, code=code
    )
    return JSONResponse(said.body(), status_code=error.status_code, headers=error.headers)
