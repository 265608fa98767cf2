"""The READMEs and docs: links lead somewhere, commands exist, and the two READMEs say the same."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from edge import cli
from edge.cli import VERBS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
# Verbs whose second word chooses the command that takes the options.
NESTED = {
    "export": ("deploy", "gguf", "lora", "ollama", "onnx"),
    "bench": ("train", "compare"),
    "bench.scaling": ("check", "measure", "table"),
}


def prose(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", prose(path), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of one."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path.name}: {link}")
    return broken


def snippets(text: str) -> list[str]:
    """Each line of a code block and each code span, comments and prompts left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    # What follows two blanks is a comment, or the text beside a command in a picture.
    lines = [re.split(r"\s+#|\s{2,}", line.strip())[0] for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [one.strip() for one in (*lines, *spans)]


@cache
def help_of(*command: str) -> str:
    if command[0] == "edge.cli":
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                code: object = cli.main([*command[1:], "--help"])
            except SystemExit as ended:
                code = ended.code
        assert code == 0
        return said.getvalue()
    done = subprocess.run(
        [sys.executable, "-m", *command, "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command_of(words: list[str]) -> tuple[str, ...] | None:
    """The command whose help knows the options of a snippet; None where the snippet is none of ours."""
    ours = ("edge", "convert", "bench")
    if words[:2] == ["python", "-m"] and len(words) > 2 and words[2].split(".")[0] in ours:
        return (words[2], *_nested(words[2], words[3:]))
    if words[:1] != ["edge"] or len(words) < 2 or not re.fullmatch(r"[a-z]+", words[1]):
        return None
    assert words[1] in VERBS, f"edge {words[1]} is no verb"
    return ("edge.cli", words[1], *_nested(words[1], words[2:]))


def _nested(name: str, rest: list[str]) -> list[str]:
    """The first word of `rest` where it chooses one of several commands of `name`."""
    return rest[:1] if rest and rest[0] in NESTED.get(name, ()) else []


def unknown_options(snippet: str) -> list[str]:
    """The options of a snippet that its command's help does not name."""
    words = snippet.split()
    command = command_of(words)
    if command is None:
        return []
    given = [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]
    return [f"{snippet}: {one}" for one in given if not re.search(rf"{one}(?![\w-])", help_of(*command))]


def all_helps(modules: set[str]) -> str:
    """The help of every verb, of the modules, and of the commands within them."""
    names = [*(("edge.cli", verb) for verb in VERBS), *((module,) for module in sorted(modules))]
    nested = [(*name, second) for name in names for second in NESTED.get(name[-1], ())]
    return "\n".join(help_of(*command) for command in [*names, *nested])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    assert broken_links(path) == []


def test_every_make_target_exists() -> None:
    makefile = prose(ROOT / "Makefile")
    for path in PAGES:
        for snippet in snippets(prose(path)):
            if match := re.match(r"make ([a-z][a-z-]*)", snippet):
                assert re.search(rf"^{match[1]}:", makefile, re.MULTILINE), f"{path.name}: make {match[1]}"


def test_every_module_that_is_run_exists() -> None:
    for path in PAGES:
        for module in re.findall(r"-m ((?:edge|convert|bench|tests)\.[\w.]*\w)", prose(path)):
            place = ROOT / module.replace(".", "/")
            files = (place.with_suffix(".py"), place / "__main__.py")
            assert any(file.is_file() for file in files), f"{path.name}: {module}"


def test_every_file_of_ours_that_is_named_exists() -> None:
    for path in PAGES:
        if path.name == "CHANGELOG.md":
            continue
        for name in re.findall(r"`((?:edge|convert|bench|tests|examples|docs)/[\w./-]+)`", prose(path)):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


@pytest.mark.slow
def test_every_verb_and_option_exists() -> None:
    wrong = [one for path in PAGES for snippet in snippets(prose(path)) for one in unknown_options(snippet)]
    assert wrong == []


@pytest.mark.slow
def test_options_without_their_command_exist_too() -> None:
    run = {one for path in PAGES for one in re.findall(r"-m ((?:edge|bench)\.[\w.]*\w)", prose(path))}
    known = all_helps(run - {"edge.cli"})
    for path in PAGES:
        for snippet in snippets(prose(path)):
            for option in re.findall(r"^--[a-z][a-z-]*", snippet):
                assert option in known, f"{path.name}: {option}"


def test_a_wrong_link_verb_or_option_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#other) [c](gone.md)\n", encoding="utf-8")
    assert broken_links(page) == ["page.md: #other", "page.md: gone.md"]
    with pytest.raises(AssertionError, match="edge sing"):
        unknown_options("edge sing RUN")
    assert unknown_options("edge doctor --loud") == ["edge doctor --loud: --loud"]
    assert unknown_options("edge doctor --json") == []


def messages() -> list[str]:
    """Every string of the sources, three dots for a value within it, and every line of the Makefile."""
    texts = prose(ROOT / "Makefile").splitlines()
    for top in ("edge", "convert", "bench"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(prose(path))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (one.value if isinstance(one, ast.Constant) else "..." for one in node.values)
                    texts.append("".join(map(str, parts)))
    return texts


@pytest.mark.slow
def test_the_messages_in_troubleshooting_are_those_of_the_program() -> None:
    texts = [text.replace("`", "") for text in messages()]
    rows = re.findall(r"^\| ([^|]+) \|", prose(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    spans = [one for row in rows for one in re.findall(r"`([^`]+)`", row)]
    quoted = [one for one in spans if " " in one and not one.startswith("edge ")]
    assert len(quoted) > 40
    missing = []
    for one in quoted:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in one.split("...")), re.DOTALL)
        if not any(pattern.search(text) for text in texts):
            missing.append(one)
    assert missing == []


def test_both_readmes_have_the_same_headings_commands_and_links() -> None:
    english, chinese = (prose(path) for path in READMES)
    levels = [re.findall(r"^(#+) ", text, re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]
    commands = [
        sorted({one for one in snippets(text) if re.match(r"(edge|make) ", one)})
        for text in (english, chinese)
    ]
    assert commands[0] == commands[1]
    links = [set(re.findall(r"\]\(([^)\s]+)\)", text)) for text in (english, chinese)]
    assert links[0] - {"README.zh.md"} == links[1] - {"README.md"}


def test_the_readmes_figures_are_those_of_the_generated_table() -> None:
    whole = prose(ROOT / "docs" / "benchmarks.md")
    table = whole.split("<!-- bench:begin -->")[1].split("<!-- bench:end -->")[0]
    figures = []
    for path in READMES:
        rows = re.findall(r"^\|[^|]+\|([^|]+)\|([^|]+)\|([^|]*)\|$", prose(path), re.MULTILINE)
        numbers = [cell.strip() for row in rows for cell in row if re.match(r"\s*[\d.]+", cell)]
        assert len(numbers) >= 15
        figures.append(numbers)
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", table), f"{path.name}: {number}"
    assert figures[0] == figures[1]
