"""A model hub in a thread: the few addresses that huggingface_hub asks, over local folders."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.folder_server import FolderServer

LARGE = 2**20  # bytes from which a file is kept as LFS, named by its sha256


class FakeHub(FolderServer):
    """repos: name -> folder; `org/gated`, `org/forbidden` and `org/broken` answer as they are called.

    asked: paths.
    """

    commit = "c0" * 20

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(repos)
        self.asked: list[str] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(path)
        parts = path.strip("/").removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == "org/broken":
            return self._json(request, 500, {"error": "broken"})
        if name == "org/forbidden":
            return self._json(request, 403, {"error": "no"})
        if name not in self.repos:
            return self._json(request, 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        if "v9" in rest:
            return self._json(request, 404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        folder = self.repos[name]
        if rest[:1] == ["tree"]:
            return self._json(request, 200, [self._entry(file) for file in sorted(folder.iterdir())])
        if rest[:1] != ["resolve"]:
            return self._json(request, 200, {"id": name, "sha": self.commit, "siblings": []})
        if name == "org/gated":
            return self._json(request, 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        return self._file(request, folder / rest[2])

    def _entry(self, file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        entry = {"type": "file", "path": file.name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if len(data) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _json(
        self, request: BaseHTTPRequestHandler, status: int, value: Any, headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(value).encode()
        request.send_response(status)
        for key, text in (headers or {}).items():
            request.send_header(key, text)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)

    def _file(self, request: BaseHTTPRequestHandler, file: Path) -> None:
        data = file.read_bytes()
        entry = self._entry(file)
        large = "lfs" in entry
        start = int(request.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        get = request.command == "GET"
        if get and large and self.connections is not None:
            if self.connections == 0:
                request.close_connection = True
                return
            self.connections -= 1
        request.send_response(206 if "Range" in request.headers else 200)
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("ETag", f'"{entry["lfs"]["oid"] if large else entry["oid"]}"')
        request.send_header("Content-Length", str(len(data) - start))
        if "Range" in request.headers:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if not get:
            return
        body = data[start:]
        if large and self.cut:
            body = body[: self.cut]
            request.close_connection = True
        if large:
            self.sent += len(body)
        request.wfile.write(b"\1" * len(body) if self.spoil else body)
