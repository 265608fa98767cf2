"""Models and data sets from ModelScope, which a local server plays, by modelscope-hub."""

import functools
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from convert import pull
from convert.data import dataset
from convert.data.dataset_info import read_info
from convert.model import hub, modelscope
from edge.artefact import manifest
from edge.errors import InputError, UnavailableError, UsageError
from tests.support.fake_modelscope import FakeModelScope
from tests.support.tiny_safetensors import safetensors
from tests.support.toy import make_model

# Without the package only its absence can be tested.
needs_it = pytest.mark.skipif(
    importlib.util.find_spec("modelscope_hub") is None, reason="modelscope-hub is not installed"
)


@pytest.fixture
def folder(tmp_path):
    made = make_model(tmp_path / "小 model")
    (made / "pytorch_model.bin").write_bytes(b"pickle")
    (made / "onnx").mkdir()
    (made / "onnx" / "config.json").write_text("{}", encoding="utf-8")
    return made


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Starts a server over repositories, and lets the library ask it alone."""
    servers = []

    def start(repos):
        server = FakeModelScope(repos).__enter__()
        servers.append(server)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        return server

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def hasty(monkeypatch):
    """One try for each file and each question, without a pause."""
    from modelscope_hub import _download, _legacy_api, api

    monkeypatch.setattr(api, "LegacyClient", functools.partial(api.LegacyClient, max_retries=0))
    monkeypatch.setattr(_legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(_download, "DOWNLOAD_RETRY_TIMES", 0)
    monkeypatch.setattr(_download, "DOWNLOAD_HASH_RETRY_TIMES", 1)


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(
        UnavailableError, match=r"(?s)needs the package 'modelscope-hub'.*--extras modelscope"
    ):
        modelscope.snapshot("org/tiny")


@needs_it
@pytest.mark.slow
def test_a_model_comes_from_modelscope_and_then_from_the_cache(served, hasty, folder, tmp_path, monkeypatch):
    server = served({"models/org/tiny": folder})
    out = tmp_path / "m"
    assert pull.main(["org/tiny", "--hub", "modelscope", "--revision", "v1", "--out", str(out)]) == 0
    found = manifest.read(out)
    assert found.settings == {"source": "org/tiny", "hub": "modelscope", "revision": "v1"}
    assert {revision for path, revision, _ in server.asked if path.startswith("models/")} == {"v1"}
    fetched = {file for *_, file in server.asked if file}
    assert "model.safetensors" in fetched and not fetched & {"pytorch_model.bin", "onnx/config.json"}
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    # Again: files that are whole are not fetched; without a network the cache is enough.
    server.asked.clear()
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert manifest.read(pull.pull("org/tiny", "v1", out, overwrite=True)).digest == found.digest
    assert not any(file for *_, file in server.asked)
    server.__exit__()
    assert hub.resolve("org/tiny", "v1") == modelscope.snapshot("org/tiny", "v1")


@needs_it
@pytest.mark.slow
def test_an_interrupted_download_goes_on_where_it_stopped(served, hasty, folder, tmp_path):
    weights = safetensors(folder / "model.safetensors", os.urandom(3 * 2**20))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "num_hidden_layers": 1})
    (folder / "config.json").write_text(text, encoding="utf-8")
    server = served({"models/org/tiny": folder})
    server.cut, server.connections = 2**20, 1
    with pytest.raises(UnavailableError, match=r"(?s)could not be downloaded from .*goes on where it st"):
        pull.pull("org/tiny", out=tmp_path / "m", hub_name="modelscope")
    assert not (tmp_path / "m").exists()
    server.cut, server.connections, server.sent = 0, None, 0
    target = pull.pull("org/tiny", out=tmp_path / "m", hub_name="modelscope")
    assert server.sent == weights.stat().st_size - 2**20
    assert (target / "model.safetensors").read_bytes() == weights.read_bytes()


@needs_it
@pytest.mark.slow
def test_a_damaged_file_is_found_out(served, hasty, folder, tmp_path):
    safetensors(folder / "model.safetensors", bytes(2 * 2**20))
    server = served({"models/org/tiny": folder})
    server.spoil = True
    with pytest.raises(UnavailableError, match="arrived damaged"):
        pull.pull("org/tiny", out=tmp_path / "m", hub_name="modelscope")
    assert not (tmp_path / "m").exists() and not list((tmp_path / "cache").rglob("model.safetensors"))


@needs_it
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/none", None, "has no org/none, or it is private"),
        ("org/tiny", "v9", "has no org/tiny at v9"),
        ("org/private", None, "does not let you read org/private"),
        ("org/pickles", None, "has no safetensors on ModelScope"),
    ],
)
def test_what_modelscope_refuses_is_said_in_words(served, hasty, folder, tmp_path, name, revision, words):
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text("{}", encoding="utf-8")
    served({"models/org/tiny": folder, "models/org/pickles": pickles})
    with pytest.raises((InputError, UnavailableError), match=words):
        pull.pull(name, revision, tmp_path / "m", hub_name="modelscope")
    assert not (tmp_path / "m").exists()


@pytest.mark.matrix
@needs_it
@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(served, hasty, tmp_path, monkeypatch):
    served({})
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"could not be downloaded from http://127\.0\.0\.1:9"):
        modelscope.snapshot("org/tiny")


@needs_it
@pytest.mark.slow
def test_a_full_disk_is_said_before_anything_is_fetched(served, folder, tmp_path, monkeypatch):
    server = served({"models/org/tiny": folder})

    def full(path: Path, need: int) -> None:
        raise InputError(f"{path} has no room for {need} bytes")

    monkeypatch.setattr(manifest, "check_free", full)
    with pytest.raises(InputError, match=r"cache has no room for \d+ bytes"):
        modelscope.snapshot("org/tiny")
    assert not any(file for *_, file in server.asked)


def test_where_a_data_set_comes_from(tmp_path, monkeypatch):
    both = {"ms_hub_url": "org/ms", "hf_hub_url": "org/hf"}
    entries = {"both": both, "ms": {"ms_hub_url": "org/ms"}, "hf": {"hf_hub_url": "org/hf"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")

    def hubs():
        found = read_info(str(tmp_path), tuple(entries))
        return {name: (entry.hub, entry.modelscope) for name, entry in found.items()}

    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    alone = {"ms": ("org/ms", True), "hf": ("org/hf", False)}
    assert hubs() == {"both": ("org/hf", False), **alone}
    assert not read_info("ONLINE", ("org/x",))["org/x"].modelscope
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert hubs() == {"both": ("org/ms", True), **alone}
    assert read_info("ONLINE", ("org/x",))["org/x"].modelscope


def test_a_hub_is_for_names_on_a_hub(tmp_path):
    with pytest.raises(UsageError, match=r"--hub modelscope: .* is not on the hub"):
        pull.pull(str(tmp_path), out=tmp_path / "m", hub_name="modelscope")


@needs_it
@pytest.mark.slow
def test_rows_of_a_data_set_on_modelscope(served, tmp_path):
    data = tmp_path / "data"
    (data / "zh").mkdir(parents=True)
    for name, text in (("train.jsonl", "a"), ("test.jsonl", "b"), ("zh/train.jsonl", "海螺")):
        row = {"instruction": text, "output": text}
        (data / name).write_text(json.dumps(row), encoding="utf-8")
    (data / "dataset_infos.json").write_text("{}", encoding="utf-8")
    (data / "script.py").write_text("raise SystemExit", encoding="utf-8")
    server = served({"datasets/org/rows": data})

    def questions(**more):
        info = {"d": {"ms_hub_url": "org/rows", **more}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        rows, _ = dataset.load(("d",), tmp_path)
        return [row.messages[0]["content"] for row in rows]

    assert questions(split="test") == ["b"]
    assert questions(subset="zh") == ["海螺"]
    assert not {file for *_, file in server.asked} & {"script.py", "dataset_infos.json"}
    with pytest.raises(InputError, match="has no org/none"):
        questions(ms_hub_url="org/none")
