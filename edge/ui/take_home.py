"""A run or an export as one file: a tar whose every byte follows from the files, so that it is never made.

A download takes no room on the disk, begins at once, and goes on from any byte (HTTP Range, RFC 9110).
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from edge.errors import EdgeError, InputError
from edge.ui.workspace import Workspace

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_CHUNK = 2**20


class Archive:
    """An uncompressed tar (POSIX.1-2001, pax) of files. size: in bytes. version: another one once any of the
    files has another name, size or time.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self.size = 0
        self._begins: list[int] = []
        self._parts: list[bytes | Path] = []
        known = hashlib.sha256()
        for name, path in sorted(files.items()):
            stat = path.stat()
            header = tarfile.TarInfo(name)
            header.size, header.mtime, header.mode = stat.st_size, int(stat.st_mtime), 0o644
            self._add(header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            self._add(path, stat.st_size)
            self._add(bytes(-stat.st_size % tarfile.BLOCKSIZE))
            known.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        self._add(bytes(2 * tarfile.BLOCKSIZE))
        self.version = known.hexdigest()[:16]

    def _add(self, part: bytes | Path, size: int | None = None) -> None:
        size = len(part) if isinstance(part, bytes) else size or 0
        if size:
            self._begins.append(self.size)
            self._parts.append(part)
            self.size += size

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`, in pieces. They end early where a file has become shorter."""
        number = bisect_right(self._begins, start) - 1
        ends = [*self._begins[1:], self.size]
        while start < stop:
            part, end = self._parts[number], min(stop, ends[number])
            skipped = start - self._begins[number]
            if isinstance(part, bytes):
                yield part[skipped : skipped + end - start]
            else:
                with part.open("rb") as file:
                    file.seek(skipped)
                    while start < end:
                        piece = file.read(min(_CHUNK, end - start))
                        if not piece:
                            return
                        start += len(piece)
                        yield piece
            start, number = end, number + 1


def archives(workspace: Workspace, run: str) -> dict[str, Archive]:
    """What can be taken home of a run, by the file's name without `.tar`: all of it, or one stage.

    Unpacked in `runs/`, it is that run there. Raises InputError where there is no such run, EdgeError while a
    job writes to it.
    """
    found = next((one for one in workspace.runs() if one.name == run), None)
    if found is None:
        raise InputError(f"no such run: {run}")
    if any(job.argv[1] != "serve" for job in workspace.working(found)):
        raise EdgeError(f"a job of {run} runs", "take it home once that has ended, or stop it first")
    files = {
        path.relative_to(found.folder.parent).as_posix(): path
        for path in found.folder.rglob("[!.]*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(found.folder).parts)
    }
    config = found.folder.with_name(f"{run}.yaml")
    chosen = {run: files | ({config.name: config} if config.is_file() else {})}
    for stage in found.stages:
        within = f"{run}/{stage}/"
        chosen[f"{run}-{stage}"] = {name: path for name, path in files.items() if name.startswith(within)}
    return {name: Archive(inside) for name, inside in chosen.items()}


def link(run: str, name: str, archive: Archive) -> str:
    """The path of an archive. It holds for the files as they are now: a download never mixes two states."""
    return f"/take/{run}/{archive.version}/{name}.tar"


def add_route(api: FastAPI, workspace: Workspace) -> None:
    """Serve the archives of the workspace's runs."""

    def take(run: str, version: str, name: str, request: Request) -> Response:
        try:
            archive = archives(workspace, run).get(name)
        except EdgeError as error:
            return PlainTextResponse(str(error), 404 if isinstance(error, InputError) else 409)
        if archive is None or archive.version != version:
            return PlainTextResponse(f"{name} has changed, or is gone: take it from the page anew", 410)
        return _answer(archive, name, request)

    api.api_route("/take/{run}/{version}/{name}.tar", methods=["GET", "HEAD"])(take)


def _answer(archive: Archive, name: str, request: Request) -> Response:
    size, tag = archive.size, f'"{archive.version}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": tag,
        "content-disposition": f"attachment; filename*=utf-8''{quote(name)}.tar",
    }
    start, stop, status = 0, size, 200
    wanted = _RANGE.fullmatch(request.headers.get("range", ""))
    # Anything else than one range of this state is answered with the whole, as RFC 9110 has it.
    if wanted and any(wanted.groups()) and request.headers.get("if-range", tag) == tag:
        first, last = wanted.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            return Response(status_code=416, headers=headers | {"content-range": f"bytes */{size}"})
        status = 206
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["content-length"] = str(stop - start)
    body = archive.read(start, stop) if request.method == "GET" else iter(())
    return StreamingResponse(body, status, headers, "application/x-tar")
