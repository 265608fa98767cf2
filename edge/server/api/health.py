"""What the server is and does: health, readiness, the loaded artefacts, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import edge
from edge.engine import protocol as msg
from edge.server.metrics import CONTENT_TYPE
from edge.server.model_registry import registry_of

router = APIRouter(tags=["state"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether the server is alive, and what it serves on which device."""
    registry = registry_of(request)
    entry = registry.first
    engine = entry.served.engine if entry.served else None
    return {
        "status": entry.status,
        "model": entry.name,
        "device": engine.ready.device if engine and engine.ready else None,
        "why": engine.ready.why if engine and engine.ready else None,
        "error": str(engine.failure) if engine and engine.failure else None,
        "models": {name: entry.status for name, entry in registry.entries.items()},
    }


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 when the default model is loaded and its engine answers, else 503 with what it waits for."""
    entry = registry_of(request).first
    entry.ready()
    if entry.served is not None:
        entry.served.engine.check_alive()
    return {"status": "ready", "model": entry.name}


@router.get("/info")
async def info(request: Request, model: str | None = None) -> dict[str, Any]:
    """The artefact, how it is loaded, and the engine's gauges; of the default model, or of `model`."""
    registry = registry_of(request)
    entry = registry.entry(model)
    loaded = entry.ready()
    assert entry.served is not None
    engine = entry.served.engine
    stats = engine.stats or msg.Stats()
    return {
        "version": edge.__version__,
        "model": entry.name,
        "digest": entry.digest or None,
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
        "thinking": entry.served.thinking,
        "settings": loaded.settings,
        "load_s": round(engine.load_s, 3),
        "restarts": engine.restarts,
        "running": stats.running,
        "waiting": stats.waiting,
        "busy_slots": stats.busy_slots,
        "kv_tokens": stats.kv_tokens,
        "cache_ram": {
            "limit": engine.load.cache_ram,
            "bytes": stats.ram_bytes,
            "hits": stats.ram_hits,
            "evictions": stats.ram_evictions,
        },
        "steps": stats.steps,
        "step_tokens": stats.step_tokens,
        "step_s": round(stats.step_s, 4),
        "up_s": round(stats.up_s, 4),
        "models": [{"id": name, "status": other.status} for name, other in registry.entries.items()],
    }


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    registry = registry_of(request)
    return Response(registry.metrics.text(registry.engines), headers={"content-type": CONTENT_TYPE})
