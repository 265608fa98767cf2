"""Vectors of texts."""

from __future__ import annotations

import base64

import numpy as np

from tests.support.fake_server import Server


def test_vectors(spelling: Server) -> None:
    url = "/v1/embeddings"
    whole = spelling.post(url, {"input": ["one", "two", [97, 98]][:2], "model": "fake"}).json()
    vectors = [row["embedding"] for row in whole["data"]]
    assert [row["index"] for row in whole["data"]] == [0, 1]
    assert whole["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert np.allclose([np.linalg.norm(v) for v in vectors], 1)
    packed = spelling.post(url, {"input": "one", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), vectors[0])
    ids = spelling.post(url, {"input": [111, 110, 101]}).json()["data"][0]["embedding"]
    assert np.allclose(ids, vectors[0])
    for bad in ({"input": ""}, {"input": []}, {"input": "x", "dimensions": 4}, {"input": "y" * 300}):
        assert spelling.post(url, bad).status_code == 400, bad
