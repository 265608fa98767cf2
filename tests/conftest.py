"""What every test runs under: no model hub, and threads that leave the machine to others. Backends to try."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.backends import Maker

# Before numpy and torch are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell lets what it runs in the background ignore Ctrl-C, and that is handed on to what is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Of tests side by side each worker keeps to one core: threads that spin would wait for another's.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

# An example that waits for a core has not failed; what measures time says so by its marker.
settings.register_profile("edge", deadline=None)
settings.load_profile("edge")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules none of whose tests are asked for are not even imported: torch takes seconds."""
    asked = config.option.markexpr
    if collection_path.suffix != ".py" or not asked.startswith(("timing", "not slow")):
        return None
    text = collection_path.read_text("utf-8")
    if asked.startswith("timing"):
        return (collection_path.name.startswith("test_") and "mark.timing" not in text) or None
    return "\npytestmark = pytest.mark.slow\n" in text or None


_frozen = 0


def pytest_runtest_setup() -> None:
    """What is imported stays: each training collects garbage, and would look through all of torch for it."""
    global _frozen
    if len(sys.modules) > _frozen + 100:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


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
