"""Ollama's routes about models: which there are, which are loaded, and what each is."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

import edge
from edge.artefact.find import SUFFIXES, Artefact
from edge.artefact.gguf_header import GGUFHeader
from edge.server.api.ollama import taken, thinks
from edge.server.model_registry import Known, Registry
from edge.server.tool_dialects import dialect_of

router = APIRouter(prefix="/api", tags=["ollama"])


class Named(BaseModel):
    """model, or as older clients say it: name."""

    model: Annotated[str, Field(min_length=1)] | None = None
    name: Annotated[str, Field(min_length=1)] | None = None


@router.get("/version")
async def version() -> dict[str, str]:
    """This server's own version: programs compare it, and Ollama's would be a lie."""
    return {"version": edge.__version__}


@router.get("/tags", summary="The models that can be asked")
async def tags(request: Request) -> dict[str, Any]:
    return {"models": [_about(known) for known in _all(request)]}


@router.get("/ps", summary="The models that are loaded")
async def ps(request: Request) -> dict[str, Any]:
    rows = []
    for known in _all(request):
        if known.serving is None:
            continue
        until = datetime.max.replace(tzinfo=UTC)
        if known.expires is not None:
            until = datetime.fromtimestamp(time.time() + known.expires - time.monotonic(), UTC)
        ready = known.serving.engine.ready
        on_card = known.bytes if ready and ready.device.startswith("cuda") else 0
        rows.append(
            {
                **_about(known),
                "size_vram": on_card,
                "expires_at": until.isoformat(),
                "context_length": ready.context if ready else 0,
            }
        )
    return {"models": rows}


@router.post("/show", summary="What a model is")
async def show(request: Request, body: Named) -> dict[str, Any]:
    registry: Registry = request.app.state.registry
    serving = await taken(request, registry.known(body.model or body.name).name, None)
    ready, artefact = serving.ready, serving.artefact
    template = ready.chat_template or ""
    capabilities = ["completion"]
    if dialect_of(template) is not None:
        capabilities.append("tools")
    if thinks(serving):
        capabilities.append("thinking")
    if ready.embedding:
        capabilities.append("embedding")
    header = _gguf(artefact)
    facts = {}
    for key, value in (header.metadata if header else {}).items():
        if isinstance(value, (str, int, float)) and key != "tokenizer.chat_template":
            facts[key] = value
    known = registry.known(serving.name)
    return {
        "modelfile": f"# served by edge\nFROM {ready.name}\n",
        "parameters": "",
        "template": template,
        "details": _details(known),
        "model_info": facts,
        "capabilities": capabilities,
        "modified_at": datetime.fromtimestamp(known.created, UTC).isoformat(),
    }


def _all(request: Request) -> list[Known]:
    registry: Registry = request.app.state.registry
    return [registry.known(name) for name in registry.names]


def _about(known: Known) -> dict[str, Any]:
    artefact = known.serving.artefact if known.serving else None
    header = _gguf(artefact)
    return {
        "name": known.name,
        "model": known.name,
        "modified_at": datetime.fromtimestamp(known.created, UTC).isoformat(),
        "size": header.file_size if header else known.bytes,
        "digest": known.digest.removeprefix("sha256:"),
        "details": _details(known),
    }


def _details(known: Known) -> dict[str, Any]:
    artefact = known.serving.artefact if known.serving else None
    header = _gguf(artefact)
    family = header.architecture if header else ""
    return {
        "parent_model": "",
        "format": SUFFIXES[artefact.kind] if artefact else "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _billions(header) if header else "",
        "quantization_level": (header.file_type or "") if header else "",
    }


def _gguf(artefact: Artefact | None) -> GGUFHeader | None:
    """The header, of a GGUF; other formats say less about themselves."""
    return artefact.header if artefact and isinstance(artefact.header, GGUFHeader) else None


def _billions(header: GGUFHeader) -> str:
    count = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
