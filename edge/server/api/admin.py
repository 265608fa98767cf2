"""What changes the server: only with an admin key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from edge.server.model_registry import Registry

router = APIRouter(prefix="/admin", tags=["admin"])


class Which(BaseModel):
    """model: an id; without one, the default model."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None


@router.post("/reload", summary="Load the artefact anew and swap it in")
async def reload(request: Request, body: Which) -> dict[str, Any]:
    """Running streams end on the engine that they began on; later requests get the new one."""
    registry: Registry = request.app.state.registry
    before, after = await registry.reload(body.model)
    name = registry.known(body.model).name
    return {
        "model": name,
        "digest_before": before or None,
        "digest": after or None,
        "changed": before != after,
    }


@router.post("/unload", summary="Let go of a model's memory")
async def unload(request: Request, body: Which) -> dict[str, Any]:
    """It is loaded again when it is asked for."""
    registry: Registry = request.app.state.registry
    await registry.unload(body.model)
    return {"model": registry.known(body.model).name, "status": "unloaded"}
