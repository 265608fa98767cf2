"""Freed memory goes back to the system, not more often than it must."""

import types

from convert.train import malloc_trim


def test_checkpointing_on_a_cpu_gives_back_what_was_freed(monkeypatch):
    """As soon as, and only when, the slack may have gathered since memory was least."""
    resident, given = [0], []

    class Process:
        def memory_info(self):
            return types.SimpleNamespace(rss=resident[0])

    monkeypatch.setattr(malloc_trim.psutil, "Process", Process)
    monkeypatch.setattr(malloc_trim, "malloc_trim", lambda: lambda pad: given.append(resident[0]) or 1)
    forward, again = malloc_trim.checkpointing("cpu")["context_fn"]()
    assert malloc_trim.checkpointing("cuda") == {}
    for resident[0] in (2**30, 2**29, 2**29 + malloc_trim.SLACK, 2**29 + malloc_trim.SLACK + 1):
        for layer in (forward, again):
            with layer:
                pass
    assert given == [2**29 + malloc_trim.SLACK + 1]
    monkeypatch.setattr(malloc_trim, "malloc_trim", lambda: None)
    assert malloc_trim.checkpointing("cpu") == {}
