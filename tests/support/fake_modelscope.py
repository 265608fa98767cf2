"""ModelScope in a thread: the few addresses that modelscope-hub asks, over local folders."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.folder_server import FolderServer


class FakeModelScope(FolderServer):
    """repos: "models/ORG/NAME" or "datasets/ORG/NAME" -> folder; others are not there.

    asked: (path, revision, file). large: bytes from which a file is a large one.
    """

    large = 2**20

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(repos)
        self.asked: list[tuple[str, str, str]] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        path = parts.path.removeprefix("/api/v1/")
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        name, rest = "/".join(path.split("/")[:3]), path.split("/")[3:]
        file = query.get("FilePath", "")
        self.asked.append((path, query.get("Revision", ""), file))
        if path == "repos/internalAccelerationInfo":
            return self._json(request, 200, {})
        if name.endswith("org/private"):
            return self._json(request, 403, {})
        if name not in self.repos or query.get("Revision") == "v9":
            return self._json(request, 404, {})
        folder = self.repos[name]
        if rest in (["repo", "files"], ["repo", "tree"]):
            entries = [self._entry(folder, one) for one in sorted(folder.rglob("*")) if one.is_file()]
            return self._json(request, 200, {"Files": entries})
        if rest == ["repo"]:
            return self._file(request, folder / file)
        return self._json(request, 200, {})

    def _entry(self, folder: Path, file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        path = file.relative_to(folder).as_posix()
        return {"Path": path, "Name": file.name, "Type": "blob", "Size": len(data), "Sha256": sha256}

    def _json(self, request: BaseHTTPRequestHandler, status: int, value: Any) -> None:
        body = {"Code": status, "Success": status == 200, "Message": "no", "Data": value}
        data = json.dumps(body).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)

    def _file(self, request: BaseHTTPRequestHandler, file: Path) -> None:
        data = file.read_bytes()
        large = len(data) >= self.large
        start = int(request.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if large and self.connections is not None:
            if self.connections == 0:
                request.close_connection = True
                return
            self.connections -= 1
        request.send_response(206 if "Range" in request.headers else 200)
        request.send_header("Content-Length", str(len(data) - start))
        if "Range" in request.headers:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        body = data[start:]
        if large and self.cut:
            body = body[: self.cut]
            request.close_connection = True
        self.sent += len(body) if large else 0
        request.wfile.write(b"\1" * len(body) if self.spoil and large else body)
