"""The built wheel in an environment of its own, from another folder: what a user without the sources has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from pathlib import Path

import pytest

from edge.cli import VERBS
from tests.support import onnx_alone

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# Runs in the other environment: what every verb's help ends with, and how edge sees itself.
CODE = """
import contextlib, io, json, sys
import edge
from edge import cli, setup
from edge.console import guarded
from edge.machine import doctor
ends = {}
for verb in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            ends[verb] = guarded(cli.main, [verb, "--help"])
        except SystemExit as stopped:
            ends[verb] = stopped.code
steps = setup.plan(setup.Machine("linux", "", "python", None), setup.Choice(("serve",), build=False))
print(json.dumps({
    "ends": ends, "file": edge.__file__, "tree": str(setup.source_tree()), "add": setup.install_command("ui"),
    "target": str(setup.environment(None)), "steps": [step.command[4:] for step in steps],
    "pins": doctor.pins(), "serve": setup.requirements("serve", own=True),
}))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel; other packages are those of this one."""
    folder = tmp_path_factory.mktemp("轮子 wheel")
    source = folder / "source"
    tree = shutil.ignore_patterns(
        ".*", "*.egg-info", "__pycache__", "build", "models", "runs", "tests", "docs"
    )
    shutil.copytree(ROOT, source, ignore=tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-index"]
    made = [*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    onnx_alone.run(made, folder)
    shutil.rmtree(source)
    venv.create(folder / "environment")
    home = folder / "environment" / ("Scripts" if sys.platform == "win32" else "bin")
    [wheel] = folder.glob("edge_tune-*.whl")
    onnx_alone.run([*pip, "--python", str(home / "python"), "install", *options, str(wheel)], folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = onnx_alone.run([str(home / "python"), "-c", code], folder).strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return home


def test_verbs_pins_and_commands_need_no_source_tree(programs: Path, tmp_path: Path) -> None:
    said = onnx_alone.run([str(programs / "python"), "-c", CODE, json.dumps(list(VERBS))], tmp_path)
    facts = json.loads(said.splitlines()[-1])
    assert facts["ends"] == dict.fromkeys(VERBS, 0)
    assert Path(facts["file"]).is_relative_to(programs.parent) and facts["tree"] == "None"
    assert Path(facts["target"]) == programs.parent
    assert facts["pins"]["torch"] and "fastapi" in facts["serve"]
    assert str(programs) in facts["add"] and facts["add"].endswith("-m edge.setup --extras ui")
    [install] = facts["steps"]
    pins = Path(install[install.index("-c") + 1])
    assert pins.is_file() and pins.is_relative_to(programs.parent)
    assert {"fastapi", "numpy"} <= set(install) and "-e" not in install


def test_a_missing_part_is_named_with_this_python(programs: Path, tmp_path: Path) -> None:
    """As where `ui` was never installed: no message leads to a folder that is not there."""
    blocked = (
        "import sys; sys.modules['nicegui'] = None; from edge import cli; cli.main(['ui', '--port', '0'])"
    )
    command = [str(programs / "python"), "-c", blocked]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=onnx_alone.clean(), check=False)
    text = done.stderr.decode("utf-8")
    assert "edge.setup --extras ui" in text and "constraints.txt" not in text


def test_it_serves(programs: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from tests.support import tiny_onnx

    tiny_onnx.write(tmp_path / "模型")
    with onnx_alone.served(programs, tmp_path / "模型") as url:
        assert onnx_alone.ask(f"{url}/info")["backend"] == "onnx"
        assert onnx_alone.ask(f"{url}/generate", {"prompt": "a", "max_tokens": 4})["usage"]
        # The chat page, with its libraries and what their licenses ask for.
        for library in onnx_alone.ask(f"{url}/web/libraries/libraries.json"):
            for name in library["files"]:
                with urllib.request.urlopen(f"{url}/web/libraries/{name}", timeout=30) as answer:
                    assert answer.read(), name


def test_setup_runs_from_it_without_a_network(programs: Path, tmp_path: Path) -> None:
    """All that `serve` needs is there already, so pip asks no index."""
    command = [str(programs / "python"), "-m", "edge.setup", "--extras", "serve", "--no-build"]
    env = {**onnx_alone.clean(), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    for expected in ("installed in", ""):
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, check=False)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout.decode("utf-8") and bool(expected) == bool(done.stdout)
