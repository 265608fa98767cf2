"""Vectors of texts."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.fake_server import Server, fake_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with fake_server(reply="x", context=256, slots=4) as started:
        yield started


def test_vectors(server: Server) -> None:
    url = "/v1/embeddings"
    whole = server.post(url, {"input": ["one", "two", [97, 98]][:2], "model": "fake"}).json()
    vectors = [row["embedding"] for row in whole["data"]]
    assert [row["index"] for row in whole["data"]] == [0, 1]
    assert whole["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert np.allclose([np.linalg.norm(v) for v in vectors], 1)
    packed = server.post(url, {"input": "one", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), vectors[0])
    ids = server.post(url, {"input": [111, 110, 101]}).json()["data"][0]["embedding"]
    assert np.allclose(ids, vectors[0])
    for bad in ({"input": ""}, {"input": []}, {"input": "x", "dimensions": 4}, {"input": "y" * 300}):
        assert server.post(url, bad).status_code == 400, bad
