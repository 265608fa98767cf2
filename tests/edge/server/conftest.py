"""A server for all tests that ask for answers alone, and change nothing of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_server import Server, fake_server


@pytest.fixture(scope="session")
def spelling() -> Iterator[Server]:
    """Answers everything with one text, quickly, and pages of these origins."""
    origins = ["https://app.example", "app://obsidian.md", "http://localhost:*"]
    with fake_server(reply="你好, world! <end>", context=256, slots=4, origins=origins) as server:
        yield server
