"""The chat page at `/`: one file of plain HTML, served as it is. It is a client like any other."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

_FILE = Path(__file__).with_name("page.html")


def _policy(html: str) -> str:
    """A content security policy under which nothing runs but the page's own script and style."""
    sources = {}
    for tag in ("script", "style"):
        [inner] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode("utf-8")).digest()).decode("ascii")
        sources[tag] = f"'sha256-{digest}'"
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@router.get("/")
@router.head("/")
async def page() -> HTMLResponse:
    html = _FILE.read_text(encoding="utf-8")
    headers = {
        "content-security-policy": _policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)
