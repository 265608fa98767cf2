"""Answers to a file of questions: in its order, each with its prompt, and behind those of an earlier try."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge import batch_answers
from edge.artefact import json_file
from edge.engine.client import EngineProcess
from edge.engine.sampling import Params
from edge.engine.worker import Load
from edge.questions import Question
from edge.server.served_model import ServedModel
from tests.support.fake_server import TEMPLATE, user


def model(**settings: object) -> ServedModel:
    load = Load(kind="fake", settings={"chat_template": TEMPLATE, **settings})
    return ServedModel(None, EngineProcess(load), "fake")


def test_each_question_has_its_line_and_a_later_try_goes_on(tmp_path: Path) -> None:
    questions = [Question(f"row {n}", user(f"hi {n}"), f"label {n}") for n in range(7)]
    questions[4] = Question("row 4", user("long " * 2000), "")
    partial = tmp_path / "partial"

    def answer() -> tuple[list[str], list[dict[str, str]]]:
        params = Params(temperature=0.0, max_tokens=8)
        missing = batch_answers.answer(model(slots=2), questions, params, partial)
        return missing, json_file.lines(partial.read_text("utf-8"))

    [missing], lines = answer()
    assert missing.startswith("row 4: ") and "context" in missing
    assert [line["label"] for line in lines] == [question.label for question in questions]
    assert lines[2]["prompt"] == "<user>hi 2<assistant>" and lines[2]["predict"]
    assert lines[4]["predict"] == "" and lines[4]["error"] in missing

    # It was killed in the middle of a line.
    text = "".join(json.dumps({**line, "kept": 1}) + "\n" for line in lines[:3])
    partial.write_text(text + '{"prompt": "<us', encoding="utf-8")
    assert answer()[1] == [*({**line, "kept": 1} for line in lines[:3]), *lines[3:]]


@pytest.mark.slow
def test_the_command_on_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp")
    from convert.pull import embedded_gguf
    from edge import predict_cli

    file = tmp_path / "q.txt"
    file.write_text("Who are you?\nSay <b>hello</b>.\n", encoding="utf-8")
    argv = [str(embedded_gguf()), str(file), "--out", str(tmp_path / "答"), "--max-tokens", "6"]
    assert predict_cli.main(argv) == 0
    target = tmp_path / "答" / "generated_predictions.jsonl"
    assert f"2 of 2 questions are answered: {target}" in capsys.readouterr().out
    lines = json_file.lines(target.read_text("utf-8"))
    assert ["Who are you?" in lines[0]["prompt"], "<b>hello</b>" in lines[1]["prompt"]] == [True, True]
    assert all(line["predict"] and line["label"] == "" for line in lines)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
