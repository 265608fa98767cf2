"""HTTP in a thread over local folders, for the fakes of model hubs."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


class FolderServer:
    """repos: name -> folder. `answer` writes the answer to a GET or HEAD.

    sent: bytes of large files. cut: bytes after which a large answer drops, 0 never. connections: answers
    with large files that are still given, None without end. spoil: send other bytes.
    """

    def __init__(self, repos: dict[str, Path]) -> None:
        self.repos = repos
        self.sent = self.cut = 0
        self.connections: int | None = None
        self.spoil = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError
