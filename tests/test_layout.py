"""Serving never imports what only training needs."""

import ast
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "optimum", "trl")
EDGE = Path(__file__).parent.parent / "edge"


def test_no_module_of_edge_names_a_training_library() -> None:
    for path in EDGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & set(HEAVY), path


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
