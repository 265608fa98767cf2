"""Train, merge, export and serve, with the template that a run was tuned with, or without any."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from convert import merge
from convert.config import TrainConfig
from convert.data import prepare
from convert.export import gguf, gguf_lora, onnx
from convert.train import finetune
from edge.artefact import find, manifest
from edge.errors import InputError
from tests.convert.conftest import converting
from tests.support.fake_server import Server, launch
from tests.support.matrix import few
from tests.support.runs import ROWS, configure
from tests.support.toy import CHATML, make_model

pytestmark = pytest.mark.slow
QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def _needs() -> None:
    pytest.importorskip("onnxruntime_genai")


@contextmanager
def serving(run: Path, backend: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "edge.cli", "serve", str(run), "--backend", backend, "--no-tune"]
    with launch([*command, "--port", "0"]) as server:
        server.wait(seconds=60)
        yield server


def trained(config: TrainConfig, base: Path) -> list[tuple[list[int], int]]:
    """(prompt ids, the token that ends the answer) of each row, as training has them."""
    samples = prepare.prepare(config, prepare.chat_of(config, base)).train
    parts = [one for sample in samples for one in sample.parts]
    return [(one.ids[: one.spans[0][0]].tolist(), one.ids[-1]) for one in parts]


def check_prompts(run: Path, backend: str, config: TrainConfig, base: Path) -> None:
    """A served conversation has the ids that training had, and ends where training ended it."""
    with serving(run, backend) as server:
        assert server.get("/info").json()["backend"] == backend
        for row, (ids, end) in zip(ROWS[:4], trained(config, base)[:4], strict=True):
            messages = [{"role": "user", "content": row["instruction"]}]
            assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == ids
            assert end in manifest.read(find.resolve(run, backend).path.parent).stop_ids
        answer = server.post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": 4, "model": run.name}
        )
        assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == len(ids)


def merged(config: TrainConfig) -> Path:
    finetune.run(config, console=QUIET)
    run = Path(config.output_dir)
    merge.run(run, console=QUIET)
    return run


def made(folder: Path, config: TrainConfig) -> Path:
    run = merged(config)
    with converting(folder):
        gguf.run(run, quant="F16", console=QUIET)
    return run


@pytest.mark.parametrize("backend", few(["llamacpp", "onnx"], ["llamacpp"]))
def test_a_base_model_tuned_under_a_named_template_is_served_with_it(tmp_path: Path, backend: str) -> None:
    base = make_model(tmp_path / "base", template=None)
    config = configure(tmp_path, base, max_steps=2, save_strategy="no")(template="qwen")
    if backend == "llamacpp":
        run = made(tmp_path, config)
    else:
        onnx.run(run := merged(config), precision="fp32", console=QUIET)
    check_prompts(run, backend, config, base)


@pytest.mark.matrix
def test_a_template_that_is_not_the_models_own_stays_with_the_adapter(tmp_path: Path) -> None:
    """Merged, it is served with its own; on top of the model as it was it is refused."""
    base = make_model(tmp_path / "base", template=CHATML)
    config = configure(tmp_path, base, max_steps=2, save_strategy="no")(template="alpaca")
    run = made(tmp_path, config)
    check_prompts(run, "llamacpp", config, base)
    with converting(tmp_path / "more"):
        alone = find.resolve(gguf.run(base, quant="F16", console=QUIET), "llamacpp")
        adapter = gguf_lora.run(run)
    with pytest.raises(InputError, match="was trained with another chat template"):
        find.with_lora(alone, adapter)


@pytest.mark.matrix
def test_a_model_of_plain_text_is_served_without_a_template(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", template=None)
    config = configure(tmp_path, base, max_steps=2, save_strategy="no")
    texts = [f"第{n} line of text, {'more ' * (n % 4)}end." for n in range(40)]
    (tmp_path / "d.json").write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    info = {"d": {"file_name": "d.json", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    run = made(tmp_path, config(stage="pt", cutoff_len=64))
    said = io.StringIO()
    onnx.run(run, precision="int8", console=Console(file=said, width=300))
    assert "the model has no chat template: it goes on with texts" in said.getvalue()
    assert "smoothed in 2 layers on" in said.getvalue()
    for backend in ("llamacpp", "onnx"):
        assert manifest.read(find.resolve(run, backend).path.parent).chat_template is None
        with serving(run, backend) as server:
            asked = {"model": run.name, "prompt": texts[0][:10], "max_tokens": 4, "temperature": 0}
            answer = server.post("/v1/completions", asked)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0
            messages = [{"role": "user", "content": "hi"}]
            refused = server.post("/v1/chat/completions", {"model": run.name, "messages": messages})
            assert refused.status_code == 400 and "has no chat template" in refused.json()["error"]["message"]
