"""Ollama's routes about models: which there are, which are loaded, and what each is."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

import edge
from edge.artefact.find import SUFFIXES
from edge.artefact.gguf_header import GGUFHeader
from edge.server.model_registry import ModelEntry, registry_of, served_model
from edge.server.tool_dialects import dialect_of

router = APIRouter(prefix="/api", tags=["ollama"])


class Named(BaseModel):
    """model; older clients call it name."""

    model: Annotated[str, Field(min_length=1)] | None = None
    name: Annotated[str, Field(min_length=1)] | None = None


@router.get("/version")
async def version() -> dict[str, str]:
    """This server's own version. Clients compare it, and it is not Ollama's."""
    return {"version": edge.__version__}


@router.get("/tags", summary="The models that can be asked")
async def tags(request: Request) -> dict[str, Any]:
    return {"models": [_about(entry) for entry in registry_of(request).entries.values()]}


@router.get("/ps", summary="The models that are loaded")
async def ps(request: Request) -> dict[str, Any]:
    rows = []
    for entry in registry_of(request).entries.values():
        if entry.served is None:
            continue
        until = datetime.max.replace(tzinfo=UTC)
        if entry.expires is not None:
            until = datetime.fromtimestamp(time.time() + entry.expires - time.monotonic(), UTC)
        ready = entry.served.engine.ready
        rows.append(
            {
                **_about(entry),
                "size_vram": entry.bytes if ready and ready.device.startswith("cuda") else 0,
                "expires_at": until.isoformat(),
                "context_length": ready.context if ready else 0,
            }
        )
    return {"models": rows}


@router.post("/show", summary="What a model is")
async def show(request: Request, body: Named) -> dict[str, Any]:
    entry = registry_of(request).entry(body.model or body.name)
    model = await served_model(request, entry.name)
    ready = model.ready
    template = ready.chat_template or ""
    capabilities = {
        "completion": True,
        "tools": dialect_of(template) is not None,
        "thinking": model.reasons,
        "embedding": bool(ready.embedding),
    }
    header = _gguf(entry)
    metadata = header.metadata if header else {}
    return {
        "modelfile": f"# served by edge\nFROM {ready.name}\n",
        "parameters": "",
        "template": template,
        "details": _details(entry),
        "model_info": {
            key: value
            for key, value in metadata.items()
            if isinstance(value, (str, int, float)) and key != "tokenizer.chat_template"
        },
        "capabilities": [name for name, there in capabilities.items() if there],
        "modified_at": datetime.fromtimestamp(entry.created, UTC).isoformat(),
    }


def _about(entry: ModelEntry) -> dict[str, Any]:
    header = _gguf(entry)
    return {
        "name": entry.name,
        "model": entry.name,
        "modified_at": datetime.fromtimestamp(entry.created, UTC).isoformat(),
        "size": header.file_size if header else entry.bytes,
        "digest": entry.digest.removeprefix("sha256:"),
        "details": _details(entry),
    }


def _details(entry: ModelEntry) -> dict[str, Any]:
    artefact = entry.served.artefact if entry.served else None
    header = _gguf(entry)
    family = header.architecture if header else ""
    return {
        "parent_model": "",
        "format": SUFFIXES[artefact.kind] if artefact else "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _parameters(header) if header else "",
        "quantization_level": (header.file_type or "") if header else "",
    }


def _gguf(entry: ModelEntry) -> GGUFHeader | None:
    """The header of a loaded GGUF; other formats say less about themselves."""
    header = entry.served.artefact.header if entry.served and entry.served.artefact else None
    return header if isinstance(header, GGUFHeader) else None


def _parameters(header: GGUFHeader) -> str:
    count = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
