"""The bound on a process's memory."""

import sys

import pytest

from edge.rendering.memory_limit import limit_memory


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="RLIMIT_AS")
def test_a_system_that_refuses_the_bound_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    asked: list[object] = []
    monkeypatch.setattr(resource, "setrlimit", lambda *given: asked.append(given))
    assert limit_memory(5)
    assert asked == [(resource.RLIMIT_AS, (5, 5))]

    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert not limit_memory(5)
