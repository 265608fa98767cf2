"""Prefixes kept on disk: a restarted server need not compute a long system prompt again.

One file for each prefix: a line of JSON, the token ids (int32), the backend's KV cells. A file is used only
for the model, build and cache settings that wrote it (`key`), and only if its checksum is right. Other files
are left alone; damaged ones are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.backends.base import Cells

log = logging.getLogger("edge")

# Computing fewer tokens than this is as quick as reading them from a file.
SHORTEST = 64
_SUFFIX = ".kv"


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored prefix. offset: of its KV cells in the file. checksum: SHA-256 of tokens and cells."""

    path: Path
    tokens: NDArray[np.int32]
    offset: int
    checksum: str


class PrefixStore:
    """The prefixes of one model in `folder`, at most `limit` bytes of them, the oldest removed first.

    A folder that cannot be written is said once; what lies in it is read all the same.
    """

    def __init__(self, folder: Path, key: str, limit: int) -> None:
        self._folder = folder
        self._key = key
        self._limit = limit
        self._entries: list[Entry] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        except OSError as error:
            self._keep_no_more(error)
            return
        self._entries = [entry for path in paths if (entry := self._open(path))]

    def __len__(self) -> int:
        return len(self._entries)

    def best(self, prompt: NDArray[np.int32]) -> tuple[int, Entry] | None:
        """The entry that shares the longest beginning with `prompt`, and its length; None under SHORTEST."""
        matches = [(common(entry.tokens, prompt), entry) for entry in self._entries]
        best = max(matches, key=lambda match: match[0], default=None)
        return best if best is not None and best[0] >= SHORTEST else None

    def read(self, entry: Entry) -> bytes | None:
        """The cells of an entry; None, and the file removed, where they are not what was written."""
        try:
            cells = entry.path.read_bytes()[entry.offset :]
        except OSError:
            cells = b""
        if _checksum(entry.tokens, cells) == entry.checksum:
            return cells
        log.warning("%s is damaged; removed", entry.path)
        self._remove(entry)
        return None

    def save(self, tokens: NDArray[np.int32], cells: Cells) -> bool:
        """Keep a prefix, unless it is short, too large, or the beginning of one that is kept."""
        covered = any(common(entry.tokens, tokens) == len(tokens) for entry in self._entries)
        if covered or len(tokens) < SHORTEST or len(cells) > self._limit:
            return False
        for entry in [e for e in self._entries if common(e.tokens, tokens) == len(e.tokens)]:
            self._remove(entry)
        checksum = _checksum(tokens, cells)
        head = {"key": self._key, "tokens": len(tokens), "checksum": checksum}
        line = json.dumps(head).encode("ascii") + b"\n"
        path = self._folder / f"{checksum[:24]}{_SUFFIX}"
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            with partial.open("wb") as handle:
                handle.writelines((line, tokens.tobytes(), cells))
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._keep_no_more(error)
            return False
        self._entries.append(Entry(path, tokens.copy(), len(line) + tokens.nbytes, checksum))
        self._trim()
        return True

    def _keep_no_more(self, error: OSError) -> None:
        log.warning("no prompt prefixes are kept until the next start: %s: %s", self._folder, error.strerror)
        self._limit = 0

    def _open(self, path: Path) -> Entry | None:
        try:
            with path.open("rb") as handle:
                line = handle.readline(4096)
                head = json.loads(line)
                if head["key"] != self._key:
                    return None
                tokens = np.frombuffer(handle.read(4 * int(head["tokens"])), np.int32)
            if len(tokens) != head["tokens"]:
                raise ValueError("it is too short")
            return Entry(path, tokens, len(line) + tokens.nbytes, str(head["checksum"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is no stored prefix (%s); left alone", path, error)
            return None

    def _remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        with contextlib.suppress(OSError):
            entry.path.unlink()

    def _trim(self) -> None:
        sizes = [entry.path.stat().st_size for entry in self._entries]
        while sum(sizes) > self._limit:
            del sizes[0]
            self._remove(self._entries[0])


def _checksum(tokens: NDArray[np.int32], cells: Cells) -> str:
    digest = hashlib.sha256(tokens.tobytes())
    digest.update(cells)
    return digest.hexdigest()


def common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Length of the common beginning of two token lists."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
