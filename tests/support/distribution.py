"""A release in dist/: wheel, sdist and SHA256SUMS: `python -m tests.support.distribution`.

From the files of the last commit alone, with the setuptools that pyproject.toml pins. The wheel is built from
the unpacked sdist. Two runs of one commit give the same bytes. Then each of the two is installed into an
empty environment with the pinned packages, which takes a network, and serves a toy there.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
from pathlib import Path

import edge
from edge.artefact import manifest
from edge.console import guarded
from edge.errors import EdgeError, InputError
from tests.support import onnx_alone
from tests.support.onnx_alone import ROOT

SUMS = "SHA256SUMS"
# Of the build backend: `kind`, and where the file goes; the name of the file is the last line.
_CODE = """
import sys
from setuptools import build_meta
print("\\n" + getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def tracked() -> list[str]:
    """The files that git has of this tree, deleted ones left out. Raises InputError outside of a clone."""
    if not (ROOT / ".git").exists():
        raise InputError(f"{ROOT} is no clone", "a release is made from a commit")
    names = _git("ls-files", "-z").split("\0")
    return [name for name in names if (ROOT / name).is_file()]


def build(python: Path, out: Path) -> tuple[Path, Path]:
    """The sdist and the wheel of the tracked files, in `out`. python: one that has setuptools.

    Times are those of the last commit, modes and owners the same everywhere.
    """
    epoch = _git("log", "-1", "--format=%ct").strip()
    with tempfile.TemporaryDirectory(prefix="edge-dist-") as scratch:
        tree = Path(scratch) / "tree"
        for name in tracked():
            copy = tree / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
            copy.chmod(_mode((ROOT / name).stat().st_mode))
        made = _call(python, "sdist", tree, Path(scratch), epoch)
        sdist = out / made.name
        _repack(made, sdist, int(epoch))
        with tarfile.open(sdist) as archive:
            archive.extractall(Path(scratch) / "unpacked", filter="data")
        return sdist, _call(python, "wheel", *(Path(scratch) / "unpacked").iterdir(), out, epoch)


def _call(python: Path, kind: str, tree: Path, out: Path, epoch: str) -> Path:
    command = [str(python), "-c", _CODE, kind, str(out)]
    before = os.umask(0o022)
    try:
        said = onnx_alone.run(command, tree, SOURCE_DATE_EPOCH=epoch)
    finally:
        os.umask(before)
    return out / said.splitlines()[-1]


def _repack(source: Path, target: Path, epoch: int) -> None:
    """Copy a .tar.gz without what depends on when, where and by whom it was made."""
    with (
        tarfile.open(source) as given,
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for member in sorted(given.getmembers(), key=lambda member: member.name):
            member.mtime, member.mode, member.pax_headers = epoch, _mode(member.mode, member.isdir()), {}
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            archive.addfile(member, given.extractfile(member) if member.isfile() else None)


def _mode(mode: int, folder: bool = False) -> int:
    return 0o755 if folder or mode & 0o100 else 0o644


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False)
    if done.returncode != 0:
        raise EdgeError(f"git {words[0]}: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout.decode("utf-8")


def check(file: Path) -> None:
    """Raise EdgeError unless the sdist or wheel, installed by itself, serves a toy by its command."""
    from tests.support import tiny_onnx

    with tempfile.TemporaryDirectory(prefix="edge-dist-") as scratch:
        folder = Path(scratch)
        programs = onnx_alone.environment(folder / "environment", file)
        tiny_onnx.write(folder / "模型")
        version = onnx_alone.run([str(programs / "edge"), "--version"], folder).strip()
        with onnx_alone.served(programs, folder / "模型") as url:
            info = onnx_alone.ask(f"{url}/info")
            messages = [{"role": "user", "content": "你是谁？"}]
            body = {"messages": messages, "max_tokens": 8}
            usage = onnx_alone.ask(f"{url}/v1/chat/completions", body)["usage"]
    if version != f"edge {info['version']}" or info["backend"] != "onnx" or not usage["completion_tokens"]:
        raise EdgeError(f"{file.name}: {version}, {info['version']}, {info['backend']}, {usage}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.distribution", description=__doc__)
    parser.parse_args(argv)
    if changed := _git("status", "--porcelain").strip():
        raise InputError(f"files that are not committed: {', '.join(changed.split()[1::2])}", "commit first")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    out = ROOT / "dist"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with tempfile.TemporaryDirectory(prefix="edge-dist-") as scratch:
        venv.create(scratch, with_pip=True)
        programs = onnx_alone.programs_of(Path(scratch))
        onnx_alone.install(programs, *project["build-system"]["requires"])
        files = build(programs / "python", out)
    for file in files:
        check(file)
    rows = "".join(f"{manifest.file_digest(file)}  {file.name}\n" for file in files)
    (out / SUMS).write_text(rows, encoding="utf-8", newline="")
    sys.stdout.write(f"edge {edge.__version__}, installed and served from each:\n{rows}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
