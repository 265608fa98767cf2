"""A toy that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.toy import make_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with a ChatML template; no test may change it."""
    return make_model(tmp_path_factory.mktemp("base") / "小 model")
