"""The chat page at `/`, one file of plain HTML that is a client like any other, and the interface at `/docs`.

Neither loads anything from another host: a script on a page of this origin could drive the server.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

_FILE = Path(__file__).with_name("web_page.html")


def _policy(page: str) -> str:
    """A content security policy under which nothing runs but the page's own script and style."""
    sources = {"script": "'none'", "style": "'none'"}
    for tag in sources:
        for inner in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(inner.encode("utf-8")).digest()).decode("ascii")
            sources[tag] = f"'sha256-{digest}'"
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _served(page: str) -> HTMLResponse:
    headers = {
        "content-security-policy": _policy(page),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(page, headers=headers)


@router.get("/")
async def page() -> HTMLResponse:
    return _served(_FILE.read_text(encoding="utf-8"))


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """/openapi.json as a page: every route, and the fields of its body."""
    document = request.app.openapi()
    rows = [
        _row(document, method, path, about)
        for path, methods in document["paths"].items()
        for method, about in methods.items()
    ]
    return _served(_DOCS.format(title=html.escape(document["info"]["description"]), rows="".join(rows)))


_DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>edge: interface</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>body{{font:1rem/1.5 system-ui;max-width:60rem;margin:auto;padding:1rem}}pre{{overflow:auto}}</style>
</head><body><h1>edge</h1><p>{title} The same for programs: <a href="openapi.json">openapi.json</a>.</p>
{rows}</body></html>
"""


def _row(document: dict[str, Any], method: str, path: str, about: dict[str, Any]) -> str:
    texts = [about.get("summary", ""), about.get("description", "")]
    fields: dict[str, Any] = {field["name"]: field["schema"] for field in about.get("parameters", [])}
    body = about.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in body:
        schema = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[-1]]
        texts.append(schema.get("description", ""))
        fields |= schema["properties"]
    content = "".join(f"<p>{html.escape(text)}</p>" for text in texts if text)
    if fields:
        shown = html.escape(json.dumps(fields, ensure_ascii=False, indent=1))
        content += f"<details><summary>{html.escape(', '.join(fields))}</summary><pre>{shown}</pre></details>"
    return f"<h2>{method.upper()} {html.escape(path)}</h2>{content}\n"
