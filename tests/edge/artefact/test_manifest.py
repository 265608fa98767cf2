"""Folders are published whole or not at all, and say what they are."""

import json
import os
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge import __version__
from edge.artefact import manifest
from edge.artefact.manifest import Manifest
from edge.errors import ExistsError, InputError


def make(target: Path, files: dict[str, str], *, overwrite: bool = False, name: str = "n") -> None:
    with manifest.publish(target, overwrite=overwrite) as folder:
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        manifest.write(folder, Manifest(stage="gguf", name=name))


def test_written_and_read_back(tmp_path: Path) -> None:
    target = tmp_path / "模型 目录" / "gguf"
    make(target, {"a.bin": "1", "б.txt": "2"}, name="名")
    found = manifest.read(target)
    assert (found.stage, found.name, sorted(found.files)) == ("gguf", "名", ["a.bin", "б.txt"])
    assert found.files["a.bin"]["size"] == 1
    assert found.digest.startswith("sha256:")


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    for name, files in {"a": {"x": "1"}, "b": {"x": "1"}, "c": {"x": "2"}, "d": {"y": "1"}}.items():
        make(tmp_path / name, files)
    digests = [manifest.read(tmp_path / name).digest for name in "abcd"]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="rights of POSIX")
@pytest.mark.parametrize("rights", [0o755, 0o700, 0o775])
def test_whoever_may_read_the_folder_may_read_its_files(tmp_path: Path, rights: int) -> None:
    """safetensors writes files that only their owner may read: a server of another user could not."""
    elsewhere = tmp_path / "linked"
    elsewhere.write_text("", encoding="utf-8")
    elsewhere.chmod(0o600)
    with manifest.publish(tmp_path / "out") as folder:
        folder.chmod(rights)
        (folder / "sub").mkdir()
        save_file({"x": np.zeros(1)}, folder / "sub" / "model.safetensors")
        os.link(elsewhere, folder / "linked")
        manifest.write(folder, Manifest(stage="merged", name="n"))
    found = stat.S_IMODE((tmp_path / "out" / "sub" / "model.safetensors").stat().st_mode)
    assert found == 0o600 | rights & 0o666
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o600


def test_m5_no_old_shard_survives(tmp_path: Path) -> None:
    target = tmp_path / "out"
    make(target, {"1": "", "2": "", "3": ""})
    make(target, {"1": ""}, overwrite=True)
    assert sorted(p.name for p in target.iterdir()) == ["1", "edge.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_m5_a_failure_midway_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    make(target, {"old": "1"})
    with pytest.raises(KeyboardInterrupt), manifest.publish(target, overwrite=True) as folder:
        (folder / "new").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert sorted(p.name for p in target.iterdir()) == ["edge.json", "old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_result_is_replaced_only_on_request(tmp_path: Path) -> None:
    make(tmp_path / "out", {"x": "1"}, name="first")
    with pytest.raises(ExistsError, match="first") as caught:
        make(tmp_path / "out", {"x": "2"})
    assert "--overwrite" in str(caught.value)


def test_m5_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(ExistsError, match="did not write"):
        make(tmp_path, {"x": "1"}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", {"x": "1"})
    assert manifest.read(tmp_path / "out").name == "n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to die midway")
def test_m5_a_killed_export_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with manifest.publish(tmp_path / "out") as folder:
            (folder / "half").write_text("x", encoding="utf-8")
            os._exit(9)
    os.waitpid(pid, 0)
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out", {"whole": "1"})
    assert manifest.read(tmp_path / "out").files.keys() == {"whole"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "Expected `object`"),
        ('{"name": "x"}', "`stage`"),
        ('{"stage": 1}', r"\$\.stage"),
        ('{"stage": "gguf", "name": "x", "schema": 99}', "schema 99"),
        *(
            (json.dumps({"stage": "gguf", "name": "x", key: value}), rf"\$\.{key}")
            for key, value in {
                "name": {"a": 1},
                "stop_ids": None,
                "parents": [{"digest": 1}],
                "settings": [],
                "chat_template": 3,
                "thinking": True,
                "verify": "x",
                "versions": {"edge": 1},
                "files": {"a": {"size": "7"}},
                "digest": None,
                "schema": "1",
            }.items()
        ),
        ('{"stage": "gguf", "name": "x", "parents": [{"path": "a"}]}', r"\$\.parents"),
        ('{"stage": "gguf", "name": "x", "stop_ids": [-1]}', r"\$\.stop_ids\[0\]"),
    ],
)
def test_a_broken_manifest_is_named_with_its_key(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "edge.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"edge\.json.*{named}"):
        manifest.read(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        manifest.read(tmp_path / "nowhere")


def test_free_space_is_checked(tmp_path: Path) -> None:
    manifest.check_free(tmp_path / "not" / "yet", 1000)
    with pytest.raises(InputError, match=r"needs about 1,073,741,824\.0 GiB, the disk has .* free"):
        manifest.check_free(tmp_path, 2**60)


def test_little_space_is_not_said_to_be_0_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = manifest.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda _: usage._replace(free=4_096))
    with pytest.raises(InputError, match=r"needs about 97\.7 KiB, the disk has 4\.0 KiB free"):
        manifest.check_free(tmp_path, 100_000)
    sizes = [0, 1023, 1024, 3 * 2**20 + 2**18, 5 * 2**30]
    assert [*map(manifest.in_units, sizes)] == ["0 bytes", "1023 bytes", "1.0 KiB", "3.2 MiB", "5.0 GiB"]


def _die(target: Path, *, renaming: bool) -> None:
    """Be killed while `target` is written, or between the two renames: nothing stands under its name then."""
    real, calls = Path.rename, iter([True])
    with manifest.publish(target, overwrite=True) as folder:
        (folder / "half").write_text("x", encoding="utf-8")
        if not renaming:
            os._exit(9)
        manifest.write(folder, Manifest(stage="gguf", name="n"))
        setattr(Path, "rename", lambda a, b: real(a, b) if next(calls, False) else os._exit(9))  # noqa: B010


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to die midway")
@pytest.mark.parametrize("renaming", [False, True])
def test_what_a_killed_export_left_is_swept_by_the_next(tmp_path: Path, renaming: bool) -> None:
    target = tmp_path / "out"
    make(target, {"first": "1"})
    pid = os.fork()
    if pid == 0:
        _die(target, renaming=renaming)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.iterdir())) == 2 and target.exists() is not renaming
    manifest.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert manifest.read(target).files.keys() == {"first"}


def test_only_what_dead_processes_of_this_host_left_is_swept(tmp_path: Path) -> None:
    stay = [".out.partial-elsewhere.1", ".other.partial-x", "out.partial-1", ".a"]
    with manifest.publish(tmp_path / "out") as mine:
        for name in stay:
            (tmp_path / name).mkdir()
        manifest.sweep(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stay, mine.name])
        manifest.write(mine, Manifest(stage="gguf", name="n"))


def test_a_later_process_of_the_same_number_protects_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later:
        def __init__(self, pid: int) -> None:
            assert pid == 77

        def create_time(self) -> float:
            return time.time() + 60

    monkeypatch.setattr("psutil.Process", Later)
    (tmp_path / ".out.partial-77").mkdir()
    manifest.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_versions_are_of_what_is_installed_and_of_the_edge_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's distribution is called edge too."""
    monkeypatch.setattr(manifest.metadata, "version", {"edge": "9", "numpy": "2"}.__getitem__)
    assert manifest.versions("edge", "numpy") == {"edge": __version__, "numpy": "2"}


def test_every_manifest_says_which_edge_wrote_it(tmp_path: Path) -> None:
    given = manifest.Manifest("merged", "x", versions={"torch": "1"})
    assert manifest.write(tmp_path, given).versions == {"edge": __version__, "torch": "1"}
    assert manifest.read(tmp_path).versions["edge"] == __version__
