"""The workflow of .github: what it names exists, and it may only read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from edge.setup import EXTRAS

ROOT = Path(__file__).parent.parent
FILE = ROOT / ".github" / "workflows" / "check.yml"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="an sdist has no workflow")


def test_what_the_workflow_names_exists() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert text.startswith("# Untried")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    commands = "\n".join(step["run"] for step in steps if "run" in step)
    for module in re.findall(r"-m ((?:edge|tests)\.[\w.]+)", commands):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    for extras in re.findall(r"--extras (\S+)", commands):
        assert {*extras.split(",")} <= {*EXTRAS, "all"}
    file, stage = re.findall(r"--file (\S+) --target (\S+)", commands)[0]
    assert re.search(rf"^FROM .* AS {stage}$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    # As in the Makefile and in this project.
    quick = re.search(r'-m "(not slow.*)"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert quick and f'-m "{quick[1]}"' in commands
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = {step["with"]["python-version"] for step in steps if "python" in step.get("uses", "")}
    assert versions == {project["requires-python"].removeprefix(">=")}
