"""Files for other engines say what our own server would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

import edge
from convert.export import cli
from edge.artefact import manifest
from edge.chat_template import ChatTemplate
from edge.errors import ExistsError, InputError, UsageError
from edge.prompt import AddedTokens
from edge.server import options
from tests.support.tiny_llama import publish
from tests.support.tool_templates import ANSWERS
from tests.support.toy import CHATML, THINKING, make_stub


def make_run(folder: Path, *, template: str = CHATML, thinking: str | None = None, **config: Any) -> Path:
    """A run whose merged model has the files that are read here, and no weights that could be loaded."""
    merged = make_stub(folder / "run" / "merged", template=template)
    path = merged / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **config}), "utf-8")
    record = manifest.Manifest("merged", "海螺", stop_ids=[0, 2], thinking=thinking)
    record.chat_template = manifest.text_digest(template)
    manifest.write(merged, record)
    return folder / "run"


def test_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, max_position_embeddings=512, dtype="bfloat16")
    assert cli.main(["deploy", str(run), "--to", "vllm"]) == 0
    folder = run / "deploy" / "vllm"
    options = yaml.safe_load((folder / "config.yaml").read_text("ascii"))
    assert options == {
        "model": "merged",
        "served-model-name": "海螺",
        "host": "127.0.0.1",
        "port": 8000,
        "dtype": "bfloat16",
        "max-model-len": 512,
        "chat-template": "deploy/vllm/chat_template.jinja",
        "generation-config": "deploy/vllm",
    }
    # The paths hold where the printed command runs.
    assert (run / options["chat-template"]).read_text("utf-8") == CHATML
    generation = json.loads(
        (run / options["generation-config"] / "generation_config.json").read_text("utf-8")
    )
    assert generation["eos_token_id"] == [0, 2]
    assert "vllm serve --config deploy/vllm/config.yaml" in capsys.readouterr().out
    record = manifest.read(folder)
    assert (record.stage, record.parents[0]["digest"]) == ("deploy", manifest.read(run / "merged").digest)


def options_of(run: Path, *more: str) -> dict[str, Any]:
    cli.main(["deploy", str(run), "--to", "vllm", "--overwrite", *more])
    options: dict[str, Any] = yaml.safe_load((run / "deploy/vllm/config.yaml").read_text("ascii"))
    return options


def test_reasoning_tools_and_types(tmp_path: Path) -> None:
    switch = "{% if enable_thinking %}{% endif %}"
    run = make_run(tmp_path / "a", template=switch + THINKING, thinking="off", dtype="float32")
    options = options_of(run, "--ctx", "64")
    assert options["default-chat-template-kwargs"] == '{"enable_thinking": false}'
    assert (options["dtype"], options["max-model-len"]) == ("auto", 64)
    assert not {"reasoning-parser", "tool-call-parser"} & options.keys()
    tools = CHATML + "{% if tools %}<tool_call></tool_call>{% endif %}"
    options = options_of(make_run(tmp_path / "b", template=tools))
    assert (options["tool-call-parser"], options["enable-auto-tool-choice"]) == ("hermes", True)
    options = options_of(make_run(tmp_path / "c", template=switch + THINKING, thinking="mixed"))
    assert options["reasoning-parser"] == "qwen3" and "default-chat-template-kwargs" not in options


def grown(run: Path, *tokens: str) -> Path:
    """`run` whose tokenizer has `tokens` too."""
    path = run / "merged" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([*tokens])
    path.write_text(tokenizer.to_str(), "utf-8")
    return run


def test_parsers_that_need_tokens_are_named_where_the_model_has_them(tmp_path: Path) -> None:
    """vLLM's for Llama, Mistral and DeepSeek raise at every request without theirs."""
    run = make_run(tmp_path / "r", template=THINKING, thinking="on")
    assert options_of(run)["reasoning-parser"] == "qwen3"
    assert options_of(grown(run, "<think>"))["reasoning-parser"] == "qwen3"
    assert options_of(grown(run, "</think>"))["reasoning-parser"] == "deepseek_r1"
    for dialect, parser, *marks in (
        ("deepseek", "deepseek_v3", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ("llama3", "llama3_json", "<|python_tag|>"),
        ("mistral", "mistral", "[TOOL_CALLS]"),
    ):
        run = make_run(tmp_path / dialect, template=ANSWERS[dialect][1])
        assert not {"enable-auto-tool-choice", "tool-call-parser"} & options_of(run).keys()
        options = options_of(grown(run, *marks))
        assert (options["tool-call-parser"], options["enable-auto-tool-choice"]) == (parser, True)


def test_reasoning_that_a_template_always_opens_is_closed(tmp_path: Path) -> None:
    run = make_run(tmp_path, template=THINKING, thinking="off")
    options_of(run)
    written = (run / "deploy/vllm/chat_template.jinja").read_text("utf-8")
    asked = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>b"},
        {"role": "user", "content": "c"},
    ]
    ours, theirs = (ChatTemplate(text, tokens=AddedTokens()) for text in (THINKING, written))
    assert theirs.render(asked).text == ours.render(asked, thinking="off").text


def test_what_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_position_embeddings=512)
    with pytest.raises(UsageError, match="512 positions"):
        options_of(run, "--ctx", "513")
    assert not (run / "deploy" / "vllm").exists()
    options_of(run)
    with pytest.raises(ExistsError, match="--overwrite"):
        cli.main(["deploy", str(run), "--to", "vllm"])
    with pytest.raises(InputError, match="no such folder"):
        cli.main(["deploy", str(tmp_path / "none"), "--to", "vllm"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="has no merged model"):
        cli.main(["deploy", str(tmp_path / "bare"), "--to", "vllm"])


def test_ray_serves_what_edge_serves(tmp_path: Path) -> None:
    run = publish(tmp_path / "run")
    assert cli.main(["deploy", str(run), "--to", "ray", "--ctx", "64"]) == 0
    config = yaml.safe_load((run / "deploy/ray/serve.yaml").read_text("ascii"))
    [app] = config["applications"]
    digest = manifest.read(run / "gguf").digest
    assert (app["args"]["edge"], app["args"]["digest"]) == (edge.__version__, digest)
    args = options.parser().parse_args(app["args"]["command"])
    assert (args.paths, args.ctx, options.replicas_of(args)) == ([run.absolute()], 64, (1, 2))
    assert manifest.read(run / "deploy/ray").parents[0]["digest"] == digest
    with pytest.raises(UsageError, match="512 positions"):
        cli.main(["deploy", str(run), "--to", "ray", "--overwrite", "--ctx", "513"])
