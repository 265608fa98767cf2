"""What answers at a URL: another model, template, stop set or type is found, or said to be unseen."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from convert.verify import cli, served
from convert.verify.compare import Report, show
from convert.verify.served import _coarse_kl, compare_served
from convert.verify.url_reader import open_url
from edge.errors import EdgeError, InputError, UsageError
from tests.support.engines import Engine, TableModel, serving
from tests.support.fake_server import launch
from tests.support.toy import CHATML

KINDS = ("llama-server", "vllm", "ollama", "openai")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("模型")


@pytest.fixture(scope="module")
def model(folder: Path) -> TableModel:
    return TableModel(folder)


def asked(a: TableModel, kind: str, served: TableModel | None = None, **given: Any) -> Report:
    """The report on a server of `kind` that answers for `served` (None: `a` itself)."""
    with serving(Engine(kind, served or a, **given)) as url:
        return compare_served(a, open_url(url, a))


def text(report: Report) -> str:
    out = io.StringIO()
    show(report, Console(file=out, width=200))
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_model(model: TableModel, kind: str) -> None:
    report = asked(model, kind)
    assert (report.unequal, report.warnings) == ([], [])
    assert report.facts["prompt_lengths"] == "equal" and report.facts["prompts"] == 10
    assert report.facts["stops"] == "equal" and report.facts["stop_ids"] == [0, 2]
    seen = {"llama-server": "equal"}.get(kind, "unseen")
    assert report.facts["chat_template"] == seen
    assert report.facts["token_ids"] == ("equal" if kind in ("llama-server", "vllm") else "unseen")
    # The same table on both sides; what is not named is rounded.
    assert report.logits["kl_mean"] < 1e-6 and report.logits["top1"] == 1.0
    assert report.logits["greedy_equal"] == report.logits["greedy_tokens"] == report.logits["positions"] > 100
    assert f"│ {report.logits['kl_mean']:.2e}" in text(report)
    unseen = {"llama-server": 0, "vllm": 2, "ollama": 2, "openai": 3}[kind]
    assert len(report.unseen) == unseen and text(report).count("unseen: ") == unseen


@pytest.mark.parametrize("kind", KINDS)
def test_another_model(model: TableModel, folder: Path, kind: str) -> None:
    report = asked(model, kind, TableModel(folder, seed=1))
    assert len(report.unequal) == 1 and report.unequal[0].startswith("weights: ")
    assert report.facts["prompt_lengths"] == "equal"
    # No type is named, or advised, that the server does not show.
    seen = kind in ("llama-server", "ollama")
    assert ("float16 would be closer" in report.unequal[0], "merged (float16)" in text(report)) == (
        False,
        True,
    )
    assert report.unequal[0].startswith(f"weights: {'F16' if seen else 'it'} differs more than weights of ")
    assert "()" not in text(report)


@pytest.mark.slow
def test_weights_of_fewer_bits(model: TableModel, folder: Path) -> None:
    """Those of a type that the server names are held to its bounds; of one that it does not, to 16 bits'."""
    near, far = TableModel(folder, noise=0.05), TableModel(folder, noise=0.5)
    assert asked(model, "llama-server", near, ftype="Q8_0").warnings == []
    [warning] = asked(model, "llama-server", near).warnings
    assert warning.startswith("F16 differs more than weights of this type should: mean KL 0.00")
    report = asked(model, "vllm", near)
    [warning] = report.warnings
    assert warning.endswith("within the bounds of Q8_0") and report.unequal == []
    assert any("the type of the weights" in line for line in report.unseen)
    [warning] = asked(model, "llama-server", far, ftype="Q8_0").warnings
    assert "F16 would be closer" in warning
    # Its long names.
    assert "Q4_K_M differs" in asked(model, "llama-server", far, ftype="Q4_K - Medium").warnings[0]
    # Three bits and less may differ as they like: that is what they are.
    other = asked(model, "llama-server", TableModel(folder, seed=1), ftype="Q2_K - Medium")
    assert other.unequal == [] and other.warnings[0].startswith("Q2_K_M differs")


@pytest.mark.parametrize("kind", KINDS)
def test_another_template(model: TableModel, folder: Path, kind: str) -> None:
    report = asked(model, kind, TableModel(folder, template=CHATML.replace("'\\n'", "'\\n\\n'")))
    first = report.unequal[0]
    if kind == "llama-server":
        assert first.startswith("chat template: from character")
    elif kind == "vllm":
        assert first.startswith("token ids: 10 of ")
    else:
        assert first.startswith("prompts: 10 of 10 have another length")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_that_is_left_out(model: TableModel, kind: str) -> None:
    assert asked(model, kind, stops=[2]).unequal == ["stop tokens: A ends at [0, 2], B at [2]"]


@pytest.mark.parametrize("kind", ["llama-server", "vllm"])
def test_a_server_that_never_ends(model: TableModel, kind: str) -> None:
    """Its stop set is right where an end is forced: llama-server with --ignore-eos."""
    report = asked(model, kind, ends=False)
    assert report.facts["stops"] == "unequal" and report.facts["stop_ids"] == [0, 2]
    assert re.match(r"stop tokens: of (\d) answers that end in A, \d go on at the server", report.unequal[0])


def test_a_token_more_that_ends_is_a_note(model: TableModel) -> None:
    report = asked(model, "vllm", stops=[0, 1, 2])
    assert report.unequal == [] and "vLLM would also stop at 1, the model's own files do not" in report.notes


def test_a_token_that_the_server_puts_before_a_conversation(model: TableModel) -> None:
    """Where its tokenizer is right and its conversations are not."""
    report = asked(model, "vllm", before=[1])
    assert report.facts["token_ids"] == "equal"
    [ids] = model.prompt_ids([[{"role": "user", "content": "请问你是谁？"}]])
    assert f"the first {len(ids)} tokens in A, {len(ids) + 1} on the server" in report.unequal[0]


def test_servers_that_show_less(model: TableModel, folder: Path) -> None:
    report = asked(model, "openai", bias=False, top=5)
    assert report.facts["stops"] == "unseen" and report.unequal == []
    assert any("over the 5 tokens that" in line for line in report.notes)
    report = asked(model, "openai", top=0)
    assert report.unequal == [] and report.logits["top1"] == 1.0 and "kl_mean" not in report.logits
    assert any(line.startswith("log-probabilities") for line in report.unseen)
    assert "KL divergence" not in text(report)
    # Whole answers are enough for another model.
    report = asked(model, "openai", TableModel(folder, seed=1), top=0)
    assert report.unequal and "mean KL" not in report.unequal[0]


def test_an_answer_is_compared_up_to_a_part_of_a_character(
    model: TableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    [ids] = model.encode(["a ᠠ b"])
    engine = Engine("openai", model)
    monkeypatch.setattr(engine, "_speak", lambda *_: (ids, None))
    with serving(engine) as url:
        report = compare_served(model, open_url(url, model))
    whole = len(model.encode(["a "])[0])
    assert report.logits["positions"] == 10 * whole < 10 * len(ids)
    assert any("the rest of 10 answers" in line for line in report.unseen)


def test_the_divergence_of_some_tokens_and_the_rest() -> None:
    p, q = np.array([0.5, 0.25, 0.125, 0.125]), [0.25, 0.25]
    named = [((0,), math.log(q[0])), ((1,), math.log(q[1]))]
    right = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert _coarse_kl(np.log(p), named) == pytest.approx(right)
    # Two ids with the same text are one.
    both = 0.625 * math.log(0.625 / 0.5) + 0.375 * math.log(0.375 / 0.5)
    assert _coarse_kl(np.log(p), [((0, 2), math.log(0.25)), ((0, 2), math.log(0.25))]) == pytest.approx(both)


def test_the_command(model: TableModel, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(served, "open_reader", lambda _: model)
    monkeypatch.setenv("EDGE_VERIFY_API_KEY", "geheim")
    with serving(Engine("vllm", model, key="geheim", models=["a", "b"])) as url:
        assert cli.main(["A", f"{url}/v1", "--model", "b"]) == 0
        assert "merged and vLLM" in capsys.readouterr().out
        with pytest.raises(EdgeError, match="does not take this key"):
            cli.main(["A", url, "--api-key", "other"])
    with (
        serving(Engine("llama-server", model, stops=[2])) as url,
        pytest.raises(InputError, match="is not the model that") as caught,
    ):
        cli.main(["A", url])
    assert "edge serve RUN" in caught.value.hint and caught.value.exit_code == 1
    for argv in (["A", "http://x", "--lora", "a.gguf"], ["A", "B", "--model", "m"]):
        with pytest.raises(UsageError):
            cli.main(argv)


@pytest.mark.slow
def test_our_own_server(converted_toy: Path) -> None:
    """The run's own file, and another model behind the same template and tokenizer."""
    [gguf] = converted_toy.glob(".gguf-first/*.gguf")
    command = [sys.executable, "-m", "edge.cli", "serve", str(gguf), "--no-tune", "--port", "0"]
    with launch(command) as server:
        server.wait(seconds=60)
        report = served.run(converted_toy / "merged", server.url)
        assert [report.facts[key] for key in EXACT] == ["equal"] * len(EXACT)
        # The random toy has near ties, of which one may turn.
        assert report.unequal == [] and report.logits["kl_mean"] < 1e-5 and report.logits["top1"] > 0.98
        with pytest.raises(InputError, match="weights: "):
            served.run(converted_toy.parent / "base", server.url)


EXACT = ("chat_template", "token_ids", "prompt_lengths", "round_trip", "stops")
