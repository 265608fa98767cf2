"""Prefixes on disk: found again after a restart, never taken from another model, never from a broken file."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from edge.backends.base import Backend
from edge.backends.fake import FakeBackend
from edge.backends.llamacpp import LlamaCpp, Model, Settings
from edge.engine import protocol as msg
from edge.engine.core import Engine
from edge.engine.prefix_store import PrefixStore
from edge.engine.sampling import Params
from tests.support import tiny_llama

SYSTEM = "You are a helpful assistant. " * 4
LIMIT = 2**30


def ask(backend: Backend, store: PrefixStore | None, prompt: str) -> tuple[str, int]:
    """One life of a server with one request: its answer, and how many tokens were cached."""
    events: list[msg.Event] = []
    engine = Engine(backend, events.extend, store=store)
    engine.submit(msg.Submit(1, prompt, Params(temperature=0.0, max_tokens=12)))
    engine.drain(1e9)
    engine.run()
    [done] = [e for e in events if isinstance(e, msg.Done)]
    text = "".join(e.text for e in events if isinstance(e, (msg.Delta, msg.Done)))
    return text, done.cached_tokens


def fake() -> FakeBackend:
    return FakeBackend(slots=2, context=256, capacity=256)


def test_a_prefix_outlives_the_server_and_changes_nothing(tmp_path: Path) -> None:
    cold, cached = ask(fake(), PrefixStore(tmp_path, "m", LIMIT), SYSTEM + "one")
    assert cached == 0
    warm, cached = ask(fake(), PrefixStore(tmp_path, "m", LIMIT), SYSTEM + "one")
    assert (warm, cached) == (cold, len(SYSTEM + "one") - 1)
    other, cached = ask(fake(), PrefixStore(tmp_path, "m", LIMIT), SYSTEM + "two")
    assert (other, cached) == (ask(fake(), None, SYSTEM + "two")[0], len(SYSTEM))


def test_the_real_backend(tmp_path: Path) -> None:
    model = Model(tiny_llama.write(tmp_path / "m.gguf"))
    for unified in (True, False):
        settings = Settings(slots=2, context=256, capacity=512, batch=64, unified=unified)
        folder = tmp_path / str(unified)
        answers = []
        for _ in range(2):
            backend = LlamaCpp(model, settings)
            answers.append(ask(backend, PrefixStore(folder, "m", LIMIT), SYSTEM))
            backend.close()
        assert answers[0][0] == answers[1][0]
        assert answers[1][1] == len(SYSTEM)
    model.close()


def test_another_key_is_not_taken(tmp_path: Path) -> None:
    ask(fake(), PrefixStore(tmp_path, "m", LIMIT), SYSTEM)
    assert ask(fake(), PrefixStore(tmp_path, "other", LIMIT), SYSTEM)[1] == 0


@pytest.mark.parametrize("at", [0, 3, 150, 700, -1])
def test_a_damaged_file_is_never_used(tmp_path: Path, at: int) -> None:
    cold, _ = ask(fake(), PrefixStore(tmp_path, "m", LIMIT), SYSTEM)
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    warm, cached = ask(fake(), PrefixStore(tmp_path, "m", LIMIT), SYSTEM)
    assert (warm, cached) == (cold, 0)


def test_a_truncated_file_is_never_used(tmp_path: Path) -> None:
    ask(fake(), PrefixStore(tmp_path, "m", LIMIT), SYSTEM)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert ask(fake(), PrefixStore(tmp_path, "m", LIMIT), SYSTEM)[1] == 0


def test_short_prefixes_and_beginnings_of_others_are_not_kept(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, "m", LIMIT)
    long = np.arange(100, dtype=np.int32)
    assert not store.save(long[:10], b"x")
    assert store.save(long[:80], b"x")
    assert store.save(long, b"y")
    assert not store.save(long[:80], b"x")
    assert len(store) == len(list(tmp_path.iterdir())) == 1


def test_the_oldest_make_room(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, "m", 2500)
    for k in range(5):
        assert store.save(np.full(64, k, np.int32), b"z" * 600)
    assert len(store) == len(list(tmp_path.iterdir())) == 2
    assert not store.save(np.full(64, 9, np.int32), b"z" * 4000)
    found = PrefixStore(tmp_path, "m", 2500).best(np.full(99, 4, np.int32))
    assert found is not None
    assert found[0] == 64


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = PrefixStore(tmp_path / "file" / "kv", "m", LIMIT)
    for start in range(3):
        assert not store.save(np.arange(start, start + 99, dtype=np.int32), b"x")
    assert len(caplog.records) == 1 and "file/kv" in caplog.text and len(store) == 0


def test_a_full_disk_is_said_once_and_what_lies_there_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = np.arange(99, dtype=np.int32)
    store = PrefixStore(tmp_path, "m", LIMIT)
    assert store.save(first, b"x")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    for start in (100, 200):
        assert not store.save(np.arange(start, start + 99, dtype=np.int32), b"x")
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1
    found = store.best(first)
    assert found is not None and store.read(found[1]) == b"x"
