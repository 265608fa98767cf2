"""What every test runs under: no model hub, and threads that leave the machine to others. Backends to try."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.backends import Maker

# Before numpy and torch are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of tests side by side each worker has a core of its own: threads that spin would wait for the other's.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules of slow tests alone are not even imported where those are left out: torch takes seconds."""
    if "not slow" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text("utf-8") or None


@pytest.fixture(scope="session", autouse="EDGE_WINDOWS_RULES" in os.environ)
def windows_rules() -> Iterator[None]:
    """`make test-windows-rules`: the rules of Windows for files, in force for the whole run."""
    from tests.support import windows

    with pytest.MonkeyPatch.context() as patch:
        windows.install(patch)
        yield


@pytest.fixture(scope="module", params=["fake", "fake-gpu", "llamacpp", "onnx", "onnx-device"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    """Makes backends; a test that takes it runs over every kind."""
    # Late: the conformance suites run in environments that have nothing of edge.
    from tests.support.backends import Maker

    maker = Maker(request.param, tmp_path_factory.mktemp("模型 目录"))
    yield maker
    maker.close()
