"""llama.cpp's own server, built from the sources of our own build (minutes, once), over the toy."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.servers import reference_servers
from bench.servers.target import stop
from convert.export import llamacpp_tools
from convert.verify import served
from edge.errors import EdgeError, InputError
from edge.machine.hardware import free_port
from tests.support.toy import CHATML

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def binary() -> Path:
    try:
        return reference_servers.llama_server_binary()
    except EdgeError as error:
        pytest.skip(f"llama-server cannot be built here: {error.message}")


@pytest.fixture(scope="module")
def gguf(converted_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    [first] = converted_toy.glob(".gguf-first/*.gguf")
    return Path(shutil.copyfile(first, tmp_path_factory.mktemp("gguf") / "F16.gguf"))


@contextlib.contextmanager
def running(binary: Path, gguf: Path, *options: str) -> Iterator[str]:
    """The URL of llama-server over `gguf` as soon as it is ready."""
    port = free_port()
    command = [
        *(str(binary), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--parallel", "1"),
        *("--ctx-size", "512", "--threads", "1", "--no-webui", "--log-disable", *options),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        yield url
    finally:
        stop(process)


def test_the_right_model_and_the_one_before_it(binary: Path, gguf: Path, converted_toy: Path) -> None:
    with running(binary, gguf) as url:
        report = served.run(converted_toy / "merged", url)
        for fact in ("chat_template", "token_ids", "prompt_lengths", "round_trip", "stops"):
            assert report.facts[fact] == "equal"
        # The random toy has near ties, of which one may turn.
        assert report.unequal == report.unseen == []
        assert report.b.kind == "F16" and report.logits["kl_mean"] < 1e-4 and report.logits["top1"] > 0.98
        with pytest.raises(InputError, match="weights: F16 differs more"):
            served.run(converted_toy.parent / "base", url)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
def test_a_quantised_one_is_named_by_its_type(
    binary: Path, gguf: Path, converted_toy: Path, quant: str
) -> None:
    file = gguf.with_name(f"{quant}.gguf")
    llamacpp_tools.quantize(gguf, file, quant)
    with running(binary, file) as url:
        report = served.run(converted_toy / "merged", url)
    assert (report.b.kind, report.unequal) == (quant, [])
    assert report.logits["kl_mean"] < 5 * served.BOUNDS[quant].kl


def test_another_template(binary: Path, gguf: Path, converted_toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.jinja"
    file.write_text(CHATML.replace("assistant", "bot"), encoding="utf-8")
    with (
        running(binary, gguf, "--jinja", "--chat-template-file", str(file)) as url,
        pytest.raises(InputError, match="chat template: from character"),
    ):
        served.run(converted_toy / "merged", url)


def test_a_key(binary: Path, gguf: Path, converted_toy: Path) -> None:
    with running(binary, gguf, "--api-key", "geheim") as url:
        with pytest.raises(EdgeError, match="wants a key"):
            served.run(converted_toy / "merged", url)
        assert served.run(converted_toy / "merged", url, key="geheim").unequal == []
