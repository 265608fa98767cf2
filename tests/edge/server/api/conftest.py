"""The server that tests of API families ask: a model that answers or calls a tool, and one that reasons."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_server import Server, fake_server
from tests.support.family_server import CALL, REPLY, THINKER


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    common = {"context": 512, "slots": 4, "batch": 128}
    models = {
        "fake": {**common, "reply": REPLY, "script": [["<tool>", "done"], ["please", "Sure. " + CALL]]},
        "thinker": {**common, "reply": "well</think>\n\nseven", "chat_template": THINKER},
    }
    with fake_server(models=models) as started:
        yield started
