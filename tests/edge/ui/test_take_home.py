"""A run as one file: its bytes are a tar's, any range of them is served, and `edge` reads what comes out."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("nicegui")

from fastapi import FastAPI

from edge.artefact import json_file, manifest
from edge.errors import EdgeError, InputError
from edge.jobs import job as jobs
from edge.ui import take_home
from edge.ui.take_home import archives, link
from edge.ui.workspace import Workspace

# Longer than a header's field, not ASCII, empty, and around the size of a block.
FILES = {
    "adapter/权重.bin": b"w" * 1023,
    "gguf/" + "long-" * 40 + ".gguf": b"",
    "checkpoint-5/optimizer.bin": os.urandom(512),
    "trainer_log.jsonl": b'{"loss": 1}\n',
    ".partial-1/x": b"not finished",
}


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    run = tmp_path / "there" / "runs" / "conch"
    for name, content in FILES.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    for stage in ("adapter", "gguf"):
        manifest.write(run / stage, manifest.Manifest(stage, "conch"))
    run.with_name("conch.yaml").write_text("lora_rank: 4\n", encoding="utf-8")
    return Workspace(tmp_path / "there")


def test_what_is_taken_is_the_run_again(space: Workspace, tmp_path: Path) -> None:
    found = archives(space, "conch")
    assert list(found) == ["conch", "conch-adapter", "conch-gguf"]
    whole = b"".join(found["conch"].read(0, found["conch"].size))
    assert len(whole) == found["conch"].size
    home = tmp_path / "home" / "runs"
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        file.extractall(home, filter="data")
    [run] = Workspace(home.parent).runs()
    assert (run.stages, run.checkpoints, run.log) == (["adapter", "gguf"], ["checkpoint-5"], [{"loss": 1}])
    for name, content in FILES.items():
        assert name.startswith(".") or (run.folder / name).read_bytes() == content
    assert not (run.folder / ".partial-1").exists() and home.joinpath("conch.yaml").is_file()
    # The manifest's digests are those of the files.
    about = manifest.read(run.folder / "adapter")
    assert {one: manifest.file_digest(run.folder / "adapter" / one) for one in about.files} == {
        one: entry["sha256"] for one, entry in about.files.items()
    }
    part = b"".join(found["conch-gguf"].read(0, found["conch-gguf"].size))
    with tarfile.open(fileobj=io.BytesIO(part)) as file:
        assert all(name.startswith("conch/gguf/") for name in file.getnames()) and len(file.getnames()) == 2


def client(space: Workspace) -> httpx.Client:
    from starlette.testclient import TestClient

    api = FastAPI()
    take_home.add_route(api, space)
    return TestClient(api)


def test_any_range_is_served_and_a_broken_download_goes_on(space: Workspace) -> None:
    archive = archives(space, "conch")["conch"]
    whole = b"".join(archive.read(0, archive.size))
    with client(space) as http:
        url = link("conch", "conch", archive)
        answer = http.get(url)
        assert answer.content == whole and answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''conch.tar"
        assert (head := http.head(url)).headers["content-length"] == str(len(whole)) and not head.content
        got = http.get(url, headers={"range": "bytes=511-1500"})
        assert (got.status_code, got.content) == (206, whole[511:1501])
        assert got.headers["content-range"] == f"bytes 511-1500/{len(whole)}"
        for start in (0, 1, 511, 512, 513, 1500, len(whole) - 1):
            for stop in (start, start + 1, start + 700, len(whole)):
                assert b"".join(archive.read(start, min(stop, len(whole)))) == whole[start:stop]
        assert http.get(url, headers={"range": "bytes=600-"}).content == whole[600:]
        assert http.get(url, headers={"range": "bytes=-600"}).content == whole[-600:]
        beyond = http.get(url, headers={"range": f"bytes={len(whole)}-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(whole)}")
        for odd in ({"range": "bytes=0-1,4-5"}, {"range": "rows=1-"}, {"range": "bytes=-"},
                    {"range": "bytes=1-", "if-range": '"other"'}):  # fmt: skip
            assert http.get(url, headers=odd).content == whole
        same = {"range": "bytes=600-", "if-range": answer.headers["etag"]}
        assert http.get(url, headers=same).content == whole[600:]
        # Bytes of two states are never joined.
        (space.root / "runs" / "conch" / "trainer_log.jsonl").write_text('{"loss": 2}\n', encoding="utf-8")
        os.utime(space.root / "runs" / "conch" / "trainer_log.jsonl", (1, 1))
        assert http.get(url, headers={"range": "bytes=600-"}).status_code == 410


def test_what_is_not_there_or_is_being_written_is_not_taken(space: Workspace) -> None:
    with pytest.raises(InputError, match="no such run: shell"):
        archives(space, "shell")
    url = link("conch", "conch", archives(space, "conch")["conch"])
    folder = space.jobs_folder / "0001"
    folder.mkdir(parents=True)
    about = {"argv": ["edge", "train", "runs/conch.yaml"], "cwd": ".", "device": "", "created": time.time()}
    json_file.write(folder / "job.json", about)
    with client(space) as http:
        for name in ("..", "%2e%2e", "..%2f..", "shell"):
            assert http.get(f"/take/{name}/x/conch.tar").status_code == 404
        assert http.get(url).status_code == 409 and "a job of conch runs" in http.get(url).text
        with pytest.raises(EdgeError, match="a job of conch runs"):
            space.delete(space.runs()[0])
        json_file.write(folder / "job.json", {**about, "argv": ["edge", "serve", "runs/conch"]})
        assert http.get(url).status_code == 200
    assert jobs.Job(folder).state == "waiting"


def test_a_large_file_is_known_without_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "r" / "gguf" / "r.gguf"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(9 * 2**30)  # of holes; over what a plain header can say
    (path.parent / "edge.json").touch()
    archive = archives(Workspace(tmp_path), "r")["r-gguf"]
    assert archive.size > 9 * 2**30
    head = b"".join(archive.read(0, 4096))
    with tarfile.open(fileobj=io.BytesIO(head)) as tar:
        members = [tar.next(), tar.next()]
    assert [(one.name, one.size) for one in members if one] == [
        ("r/gguf/edge.json", 0),
        ("r/gguf/r.gguf", 9 * 2**30),
    ]
    assert list(archive.read(archive.size - 5, archive.size)) == [bytes(5)]
