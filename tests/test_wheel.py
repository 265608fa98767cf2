"""The sdist, and the wheel in an environment of its own: what a user without the sources has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

import edge
from edge.cli import VERBS
from tests.support import distribution, onnx_alone
from tests.support.onnx_alone import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a distribution is made from a clone"),
]

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
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel."""
    return distribution.build(Path(sys.executable), tmp_path_factory.mktemp("轮子 wheel"))


@pytest.fixture(scope="module")
def programs(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel; other packages are those of this one."""
    folder = tmp_path_factory.mktemp("环境 environment")
    venv.create(folder)
    home = onnx_alone.programs_of(folder)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "python")]
    onnx_alone.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(built[1])], folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = onnx_alone.run([str(home / "python"), "-c", code], folder).strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return home


def test_an_sdist_is_what_git_has(built: tuple[Path, Path]) -> None:
    """A file that is missing is named in MANIFEST.in; what belongs to git and its hosts stays out."""
    with tarfile.open(built[0]) as archive:
        names = [Path(*Path(member.name).parts[1:]).as_posix() for member in archive if member.isfile()]
    generated = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("edge_tune.egg-info/")}
    of_git = {name for name in distribution.tracked() if not name.startswith((".ci/", ".git"))}
    assert set(names) - generated == of_git and len(names) == len({*names})
    assert {"edge/csrc/graph.cpp", "edge/constraints.txt", "tests/test_wheel.py"} <= set(names)


def test_a_wheel_has_what_runs_and_no_tests(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    packages = ("edge/", "convert/", "bench/")
    wanted = {name for name in distribution.tracked() if name.startswith(packages)}
    assert {name for name in names if ".dist-info/" not in name} == wanted


def test_the_same_commit_gives_the_same_bytes(built: tuple[Path, Path], tmp_path: Path) -> None:
    again = distribution.build(Path(sys.executable), tmp_path)
    assert [file.name for file in again] == [file.name for file in built]
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in built]


def test_one_version_everywhere(programs: Path, tmp_path: Path) -> None:
    """`edge --version`, the package's metadata, edge.json, the changelog; /info is in `test_it_serves`."""
    assert onnx_alone.run([str(programs / "edge"), "--version"], tmp_path) == f"edge {edge.__version__}\n"
    code = """if True:
        import sys
        from importlib import metadata
        from pathlib import Path
        from edge.artefact import manifest
        record = manifest.write(Path(sys.argv[1]), manifest.Manifest("gguf", "x"))
        print(metadata.version("edge-tune"), record.versions["edge"])
    """
    said = onnx_alone.run([str(programs / "python"), "-c", code, str(tmp_path)], tmp_path)
    assert said.split() == [edge.__version__] * 2
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(.+)\](?: - \d{4}-\d\d-\d\d)?$", changes, re.MULTILINE)
    assert released[:2] == ["Unreleased", edge.__version__]


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
        info = onnx_alone.ask(f"{url}/info")
        assert (info["backend"], info["version"]) == ("onnx", edge.__version__)
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
