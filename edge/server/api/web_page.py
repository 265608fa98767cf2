"""The chat page at `/`, a client like any other, with its files at `/web`, and the interface at `/docs`.

Neither loads anything from another host: a script on a page of this origin could drive the server.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).with_name("web")
# Not asked of the system, whose table may call a script plain text.
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Own files alone run, and no text is ever read as HTML.
_PAGE_POLICY = (
    _POLICY.format(script="'self'", style="'self'")
    + "; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    # The hosts of links are not looked up before they are followed.
    "x-dns-prefetch-control": "off",
}


@functools.cache
def _files() -> dict[str, tuple[bytes, dict[str, str]]]:
    """The chat page's files by their paths: content and headers."""
    files = {}
    for path in sorted(_FOLDER.rglob("*.*")):
        content, kind = path.read_bytes(), _TYPES.get(path.suffix, "text/plain")
        headers = {
            "content-type": f"{kind}; charset=utf-8",
            "etag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        policy = {"content-security-policy": _PAGE_POLICY}
        files[path.relative_to(_FOLDER).as_posix()] = (content, headers | policy | _HEADERS)
    return files


def _served(request: Request, name: str) -> Response:
    if name not in _files():
        raise HTTPException(404)
    content, headers = _files()[name]
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)


@router.get("/")
async def page(request: Request) -> Response:
    return _served(request, "page.html")


@router.get("/web/{name:path}")
async def file(request: Request, name: str) -> Response:
    """A file of the chat page; a browser that has it is told so by its hash."""
    return _served(request, name)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """/openapi.json as a page: every route, and the fields of its body."""
    document = request.app.openapi()
    rows = [
        _row(document, method, path, about)
        for path, methods in document["paths"].items()
        for method, about in methods.items()
    ]
    text = _DOCS.format(title=html.escape(document["info"]["description"]), rows="".join(rows))
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = _POLICY.format(script="'none'", style=f"'sha256-{digest}'")
    return HTMLResponse(text, headers={"content-security-policy": policy, **_HEADERS})


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
