"""What may import what: the levels of docs/architecture.md, no circles, and no torch behind a server."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "optimum", "trl")
ROOT = Path(__file__).parent.parent
TOPS = ("edge", "convert", "bench")


def sources() -> dict[str, str]:
    """Text by module name of all that is installed."""
    files = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8") for path in files}


def levels() -> list[list[str]]:
    """The rooms of each level, lowest first, as dotted names."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    block = text.split("```layers\n")[1].split("```")[0]
    return [line.replace("/", ".").split() for line in block.strip().splitlines()]


@functools.cache
def statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    """Each import of a source."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(module: str, texts: dict[str, str]) -> Iterator[tuple[int, str]]:
    """(line, imported module) of each import of ours, those inside functions and for types included."""
    for node in statements(texts[module]):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        for name in names:
            shorter = (name, name.rpartition(".")[0])
            found = next(
                (full for one in shorter for full in (one, f"{one}.__init__") if full in texts), None
            )
            if found and found != module:
                yield node.lineno, found


def broken(texts: dict[str, str], order: list[list[str]]) -> list[str]:
    """Each import that goes upwards, and each circle, in words."""
    places = {room: (number, room) for number, rooms in enumerate(order) for room in rooms}

    def place(module: str) -> tuple[int, str]:
        parts = module.split(".")
        rooms = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((places[room] for room in rooms if room in places), (-1, ""))

    graph = {module: list(imports(module, texts)) for module in texts if texts[module].strip()}
    lines = [f"{module} has no place in docs/architecture.md" for module in graph if not place(module)[1]]
    for module, found in graph.items():
        for line, other in found:
            if not texts[other].strip():
                continue
            (level, room), (below, other_room) = place(module), place(other)
            if room != other_room and level <= below:
                lines.append(f"{module}:{line} imports {other}, which is above it or beside it")
    return lines + [f"a circle: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, list[tuple[int, str]]]) -> list[list[str]]:
    """One circle through each module that is part of one."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for _, other in graph.get(module, []):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_nothing_imports_upwards_or_in_a_circle() -> None:
    assert broken(sources(), levels()) == []


def test_a_planted_import_is_named() -> None:
    texts = sources()
    texts["edge.engine.scheduler"] += "\nfrom edge.server.app import create_app\n"
    texts["edge.errors"] += "\ndef late() -> None:\n    from edge.backends import base\n"
    texts["convert.data.encode"] += "\nfrom convert.data import prepare\n"
    found = "\n".join(broken(texts, levels()))
    assert "edge.engine.scheduler:" in found and "imports edge.server.app" in found
    assert "imports edge.backends.base" in found
    assert "convert.data.encode -> convert.data.prepare" in found or "convert.data.prepare -> " in found


def test_every_room_of_the_order_is_there() -> None:
    modules = sources()
    for rooms in levels():
        for room in rooms:
            assert any(f"{module}.".startswith(f"{room}.") for module in modules), room


def test_functions_are_short_and_take_few_positional_arguments() -> None:
    long = []
    for module, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args]
                count = len([one for one in arguments if one.arg not in ("self", "cls")])
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= 60 or count > 6:
                    long.append(f"{module}.{node.name}")
    assert not long


def test_no_module_of_edge_names_a_training_library() -> None:
    for module, text in sources().items():
        if module.startswith("edge."):
            for node in statements(text):
                names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert not {name.split(".")[0] for name in names} & set(HEAVY), module


@pytest.mark.slow
def test_the_server_is_imported_without_them() -> None:
    modules = [
        "edge.server.cli",
        "edge.server.app",
        "edge.engine.worker",
        "edge.backends.llamacpp",
        "edge.cli",
    ]
    code = f"import sys, {', '.join(modules)}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
