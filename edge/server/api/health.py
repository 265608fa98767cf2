"""What the server is and does: health, readiness, the loaded artefacts, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from edge.server.metrics import CONTENT_TYPE
from edge.server.model_registry import Known, Registry

router = APIRouter(tags=["state"])


def _registry(request: Request) -> Registry:
    registry: Registry = request.app.state.registry
    return registry


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Alive, and what it serves on which device."""
    registry = _registry(request)
    known = registry.known(None)
    engine = known.serving.engine if known.serving else None
    return {
        "status": _status(known),
        "model": known.name,
        "device": engine.ready.device if engine and engine.ready else None,
        "why": engine.ready.why if engine and engine.ready else None,
        "error": str(engine.failure) if engine and engine.failure else None,
        "models": {name: _status(registry.known(name)) for name in registry.names},
    }


def _status(known: Known) -> str:
    if known.serving is not None:
        return known.serving.engine.state
    return "loading" if known.loading is not None else "unloaded"


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 when the default model is loaded, 503 before."""
    known = _registry(request).known(None)
    known.ready()
    return {"status": "ready", "model": known.name}


@router.get("/info")
async def info(request: Request, model: str | None = None) -> dict[str, Any]:
    """The artefact, how it is loaded, and what it does now; of the default model, or of `model`."""
    known = _registry(request).known(model)
    loaded = known.ready()
    assert known.serving is not None
    serving, engine = known.serving, known.serving.engine
    stats = engine.stats
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
        "embedding": loaded.embedding,
        "stop_ids": sorted(loaded.stop_ids),
        "thinking": serving.thinking,
        "settings": loaded.settings,
        "load_s": round(engine.load_s, 3),
        "restarts": engine.restarts,
        "running": stats.running if stats else 0,
        "waiting": stats.waiting if stats else 0,
        "busy_slots": stats.busy_slots if stats else 0,
        "kv_tokens": stats.kv_tokens if stats else 0,
        "steps": stats.steps if stats else 0,
        "step_tokens": stats.step_tokens if stats else 0,
        "step_s": round(stats.step_s, 4) if stats else 0.0,
        "up_s": round(stats.up_s, 4) if stats else 0.0,
        "models": [{"id": one.name, "status": _status(one)} for one in _all(request)],
    }


def _all(request: Request) -> list[Known]:
    registry = _registry(request)
    return [registry.known(name) for name in registry.names]


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    registry = _registry(request)
    return Response(registry.metrics.text(registry), headers={"content-type": CONTENT_TYPE})
