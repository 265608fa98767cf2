"""How long texts take to be tokenized over HTTP, and how long a stream beside them stands still meanwhile."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support import tiny_gguf, tiny_llama
from tests.support.fake_server import CLIENT, launch

SIZES = tuple(2**power for power in range(12, 23, 2))
TEXTS = {"<|end|>": "<|end|>", "plain text": "a word of text "}


class Stream:
    """An answer that goes on and on."""

    def __init__(self, url: str) -> None:
        self._longest, self._last, self._ended, self.begun = 0.0, 0.0, False, threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()
        assert self.begun.wait(20.0)

    def _read(self, url: str) -> None:
        body = {"prompt": "x", "raw": True, "stream": True, "ignore_eos": True, "max_tokens": 30_000}
        with CLIENT.stream("POST", url + "/generate", json=body) as answer:
            for _ in answer.iter_raw():
                now = time.perf_counter()
                self._longest, self._last = max(self._longest, now - self._last), now
                self.begun.set()
                if self._ended:
                    return

    def gap(self) -> float:
        """The most seconds between two pieces, or since the last, since it was asked before."""
        longest, self._longest = max(self._longest, time.perf_counter() - self._last), 0.0
        return longest

    def close(self) -> None:
        self._ended = True
        self._thread.join()


def rows(folder: Path) -> Iterator[tuple[str, int, int, float, float]]:
    """(text, its bytes, status, milliseconds, the stream's longest gap in milliseconds), by a tiny model."""
    path = folder / "tiny.gguf"
    parts = tiny_gguf.Parts(tiny_llama.write(folder / "whole.gguf"))
    path.write_bytes(parts.changed(llama__context_length=32_768))
    command = [
        sys.executable,
        "-m",
        "edge.cli",
        "serve",
        "--port",
        "0",
        "--no-tune",
        "--ctx",
        "32768",
        str(path),
    ]
    with (
        (folder / "log").open("w", encoding="utf-8") as log,
        launch([*command, "--slots", "2", "--threads", "1"], log=log) as server,
    ):
        server.wait()
        for name, part in TEXTS.items():
            for size in SIZES:
                text = json.dumps({"text": (part * (size // len(part) + 1))[:size]})
                stream = Stream(server.url)
                stream.gap()
                began = time.perf_counter()
                answer = CLIENT.post(server.url + "/tokenize", content=text)
                taken = time.perf_counter() - began
                gap = stream.gap()
                stream.close()
                yield name, size, answer.status_code, 1000 * taken, 1000 * gap
