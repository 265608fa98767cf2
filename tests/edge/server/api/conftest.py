"""The server that tests of API families ask: models that answer or call a tool, say anything, and reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_server import Server, fake_server
from tests.support.family_server import CALL, REPLY, THINKER


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    common = {"context": 1024, "slots": 4, "batch": 128}
    models = {
        "fake": {**common, "reply": REPLY, "script": [["<tool>", "done"], ["please", "Sure. " + CALL]]},
        "chance": common,
        "thinker": {**common, "reply": "well</think>\n\nseven", "chat_template": THINKER},
    }
    with fake_server(models=models) as started:
        yield started
