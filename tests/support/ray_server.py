"""Ray Serve replicas over the fake backend, as a program: `python -m tests.support.ray_server SETTINGS_JSON`.

Settings are keywords of FakeBackend, and "replicas": [fewest, most]; "keys"; "drain"; "max_queue".
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import IO, Any

import psutil

from tests.support.fake_server import TEMPLATE, Server, launch


@contextlib.contextmanager
def ray_server(*, log: IO[str] | None = None, **settings: Any) -> Iterator[Server]:
    """Ready replicas over FakeBackend(**settings). log: takes what they write to stderr."""
    command = [sys.executable, "-m", "tests.support.ray_server", json.dumps(settings)]
    with launch(command, log=log) as server:
        server.wait(seconds=120)
        yield server


def replicas(server: Server) -> list[psutil.Process]:
    """The processes of the replicas, of which each has an engine."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in processes if "ServeReplica" in " ".join(process.cmdline())]


def main() -> int:
    from edge.console import guarded
    from edge.engine.worker import Load
    from edge.machine.hardware import free_port
    from edge.server import ray_app
    from edge.server.access import Access
    from edge.server.model_registry import Planned

    settings = json.loads(sys.argv[1])
    access = Access(tuple(settings.pop("keys", [])))
    most = settings.pop("replicas", [2, 2])
    drain, max_queue = settings.pop("drain", 2.0), settings.pop("max_queue", 64)
    given = {"chat_template": TEMPLATE, "slots": 4, **settings}
    planned = Planned(Load(kind="fake", settings=given, max_queue=max_queue))
    app = ray_app.deployment("fake", planned, access, replicas=tuple(most), drain=drain)
    return guarded(lambda _: ray_app.run(app, "127.0.0.1", free_port(), most[1], "replicas of a fake"), [])


if __name__ == "__main__":
    sys.exit(main())
