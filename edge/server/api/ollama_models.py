"""Ollama's routes about models: which there are, which are loaded, and what each is."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

import edge
from edge.artefact.find import SUFFIXES
from edge.artefact.gguf_header import GGUFHeader
from edge.server.model_registry import ModelEntry, registry_of, served_model
from edge.server.request_fields import Body
from edge.server.tool_dialects import dialect_of

# The first version that gives logprobs; editors want at least 0.6.4.
OLLAMA_VERSION = "0.12.11"

router = APIRouter(prefix="/api", tags=["ollama"])


class Named(Body):
    """model; older clients call it name."""

    model: Annotated[str, Field(min_length=1)] | None = None
    name: Annotated[str, Field(min_length=1)] | None = None


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of Ollama whose interface this is: clients refuse an older one. edge: this server's own."""
    return {"version": OLLAMA_VERSION, "edge": edge.__version__}


@router.get("/tags", summary="The models that can be asked")
async def tags(request: Request) -> dict[str, Any]:
    return {"models": [_about(entry) for entry in registry_of(request).exported()]}


@router.get("/ps", summary="The models that are loaded")
async def ps(request: Request) -> dict[str, Any]:
    rows = []
    for entry in registry_of(request).exported():
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
    return {
        "modelfile": f"# served by edge\nFROM {ready.name}\n",
        "parameters": "",
        "template": template,
        "details": _details(entry),
        "model_info": _model_info(entry, header, ready.context),
        "capabilities": [name for name, there in capabilities.items() if there],
        "modified_at": datetime.fromtimestamp(entry.created, UTC).isoformat(),
    }


def _model_info(entry: ModelEntry, header: GGUFHeader | None, context: int) -> dict[str, Any]:
    """A GGUF's metadata; the keys that clients read are there for every format."""
    family = header.architecture if header else "edge"
    always = {
        "general.architecture": family,
        "general.basename": entry.name,
        "general.parameter_count": _count(header) if header else 0,
        f"{family}.context_length": context,
    }
    given = header.metadata if header else {}
    hidden = "tokenizer.chat_template"
    return always | {k: v for k, v in given.items() if isinstance(v, (str, int, float)) and k != hidden}


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


def _count(header: GGUFHeader) -> int:
    return sum(math.prod(tensor.shape) for tensor in header.tensors.values())


def _parameters(header: GGUFHeader) -> str:
    count = _count(header)
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
