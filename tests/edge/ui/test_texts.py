"""Every text of the page stands in the table, in both languages, and nothing else does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from edge.ui.texts import CHINESE, HELP, NAMES, PROGRESS, Texts

UI = Path(__file__).parents[3] / "edge" / "ui"
PLACES = re.compile(r"\{\w+\}")


def literals() -> Iterator[str]:
    for path in UI.glob("*.py"):
        if path.name != "texts.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def translated() -> Iterator[tuple[str, int, str]]:
    """(file, line, text) of each literal that is handed to a `t`."""
    for path in UI.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("t", "_t"):
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield path.name, node.lineno, part.value


def test_what_is_translated_has_chinese() -> None:
    texts = list(translated())
    assert len(texts) > 30
    assert [one for one in texts if one[2] not in CHINESE and re.search("[A-Za-z]", one[2])] == []


def test_nothing_stands_there_unused() -> None:
    assert set(CHINESE) - set(literals()) == set()


def test_both_languages_have_the_same_places() -> None:
    for english, chinese in CHINESE.items():
        assert sorted(PLACES.findall(english)) == sorted(PLACES.findall(chinese)), english
        assert re.search(r"[\u4e00-\u9fff]", chinese), english
    assert all(len(re.findall(r"[.;]", english)) >= 2 for english, _ in HELP.values())


def test_what_commands_say_of_their_progress_is_theirs() -> None:
    root = UI.parents[1]
    paths = [path for top in ("convert", "edge") for path in (root / top).rglob("*.py")]
    sources = "\n".join(path.read_text("utf-8") for path in paths if path.name != "texts.py")
    assert [text for text in PROGRESS if not re.search(rf'"{re.escape(text)}[ "]', sources)] == []
    english, chinese = Texts("en"), Texts("zh")
    assert english.progress("merging into a/b") == "merging into a/b"
    assert chinese.progress("merging into a/b") == "合并到 a/b"
    assert (chinese.progress("training"), chinese.progress("trainings")) == ("训练", "trainings")


def test_keys_that_are_explained_have_a_name() -> None:
    assert set(HELP) - set(NAMES) == {"compute"}
    assert Texts("zh").key("lora_rank") == "LoRA 秩 lora_rank"
    assert Texts("en").key("lora_rank") == Texts("zh").key("lora_rank")[-9:]


def test_either_language() -> None:
    about = {"description": "d", "x-description-zh": "说", "x-group": "g", "x-group-zh": "组"}
    english, chinese = Texts("en"), Texts("zh")
    assert (english("Train"), chinese("Train")) == ("Train", "训练")
    assert (english.of(about, "x-group"), chinese.of(about, "x-group")) == ("g", "组")
    assert (english.of(about, "description"), chinese.of(about, "description")) == ("d", "说")
    assert english.help("lora_rank") != chinese.help("lora_rank")
