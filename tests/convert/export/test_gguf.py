"""GGUF export: what is refused before and after conversion, and real conversions of toy models."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("tokenizers")

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from convert.export import gguf, llamacpp_tools
from convert.verify import compare
from edge.artefact import manifest
from edge.artefact.gguf_header import read_header
from edge.errors import EdgeError, ExistsError, InputError, UnavailableError, UsageError
from tests.support.tiny_safetensors import safetensors

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}你好 🐚</s>\n{% endfor %}"
WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    *"abcdefghijklmnopqrstuvwxyz",
]


def tokenizer() -> Tokenizer:
    """Bytes, letters and spaces, in the way of Llama 2: the converter needs no known hash for it."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    found = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS[:3]])
    return found


def write_source(folder: Path, *, tied: bool = True, **config: Any) -> Path:
    """A merged folder whose weights are a stub."""
    folder.mkdir(parents=True)
    safetensors(folder / "model.safetensors", bytes(1000))
    settings = {
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "tie_word_embeddings": tied,
        "dtype": "float16",
    } | config
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer().to_str(), encoding="utf-8")
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode("utf-8"))
    digest = manifest.text_digest(TEMPLATE)
    made = manifest.Manifest("merged", "贝壳: 1", "toy", chat_template=digest, stop_ids=[2], thinking="off")
    manifest.write(folder, made)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_source(tmp_path / "run 壳'" / "merged")
    return tmp_path / "run 壳'"


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300, markup=False)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "merged")


def test_a_run_without_a_merged_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="edge merge"):
        gguf.run(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        gguf.run(tmp_path / "none")


def test_unknown_quant_is_refused(run_folder: Path) -> None:
    with pytest.raises(UsageError, match="Q4_K_M"):
        gguf.run(run_folder, quant="Q4_K_XXL")


def test_m2_a_missing_or_changed_template_is_refused(run_folder: Path) -> None:
    path = run_folder / "merged" / "chat_template.jinja"
    path.write_bytes(TEMPLATE.replace("你", "您").encode("utf-8"))
    with pytest.raises(InputError, match="not the template"):
        gguf.run(run_folder)
    path.unlink()
    with pytest.raises(InputError, match=r"has no chat_template\.jinja"):
        gguf.run(run_folder)
    assert leftovers(run_folder) == []


def test_missing_weights_are_refused(run_folder: Path) -> None:
    (run_folder / "merged" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        gguf.run(run_folder)


def fake_converter(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Put `code` where the sdist has its converter."""
    script = folder / "sdist" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(code, encoding="utf-8")
    monkeypatch.setattr(llamacpp_tools, "sdist", lambda: folder / "sdist")


@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        (
            "NotImplementedError: BPE pre-tokenizer was not recognized - update",
            InputError,
            "pre-tokenizer of",
        ),
        ("ERROR:hf-to-gguf:Model OddForCausalLM is not supported", InputError, "OddForCausalLM"),
        ("ModuleNotFoundError: No module named 'sentencepiece'", UnavailableError, "'sentencepiece'"),
        ("Traceback\nValueError: 坏了", EdgeError, "ValueError: 坏了"),
    ],
)
def test_m4_a_converter_that_refuses_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_folder: Path, log: str, error: type, message: str
) -> None:
    code = f"import sys\nsys.stderr.buffer.write({log.encode()!r})\nsys.exit(1)\n"
    fake_converter(monkeypatch, tmp_path, code)
    with pytest.raises(error, match=re.escape(message)):
        gguf.run(run_folder)
    assert leftovers(run_folder) == []


COPY = """
import pathlib, sys
target = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
assert target.is_absolute() and pathlib.Path(sys.argv[1]).is_absolute()
target.write_bytes(pathlib.Path(__file__).with_name("made.gguf").read_bytes())
"""


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A converter that writes what the entries say, and no comparison: stubs have no logits."""
    from tests.support.tiny_gguf import gguf as write_gguf

    made: dict[str, Any] = {
        "template": TEMPLATE,
        "vocab": WORDS,
        "tensors": [("token_embd.weight", (32,), 1, 0)],
    }
    made["eos"] = 2

    def prepare() -> None:
        fake_converter(monkeypatch, tmp_path, COPY)
        data = {"tokenizer.ggml.tokens": made["vocab"], "tokenizer.chat_template": made["template"]}
        data |= {"general.architecture": "llama", "tokenizer.ggml.eos_token_id": made["eos"]}
        path = tmp_path / "sdist" / "vendor" / "llama.cpp" / "made.gguf"
        path.write_bytes(write_gguf(data, made["tensors"], 4096))

    monkeypatch.setattr(gguf, "GgufReader", lambda path: None)
    monkeypatch.setattr(
        compare, "prove", lambda a, b, console, measured: compare.Report(a, a, facts={"texts": 0})
    )
    made["prepare"] = prepare
    return made


def test_a_good_file_is_published(
    converted: dict[str, Any], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted["prepare"]()
    monkeypatch.chdir(run_folder.parent)
    path = gguf.run(Path(run_folder.name), quant="f16", console=quiet())  # a relative folder
    assert path.name == "贝壳- 1-F16.gguf" and path.is_file()
    made, parent = manifest.read(run_folder / "gguf"), manifest.read(run_folder / "merged")
    assert (made.stage, made.name, made.thinking, made.stop_ids) == ("gguf", "贝壳: 1", "off", [2])
    assert made.parents == [parent.parent((run_folder / "merged").resolve())]
    assert made.chat_template == parent.chat_template
    assert made.settings["quant"] == "F16" and made.settings["file"] == path.name
    assert list(made.files) == [path.name]
    assert leftovers(run_folder) == ["gguf"]
    with pytest.raises(ExistsError, match="--overwrite"):
        gguf.run(run_folder, quant="F16", console=quiet())
    gguf.run(run_folder, quant="BF16", overwrite=True, console=quiet())
    assert sorted(p.name for p in (run_folder / "gguf").iterdir()) == ["edge.json", "贝壳- 1-BF16.gguf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": TEMPLATE + " "}, "chat template differs"),
        ({"vocab": WORDS[:-1]}, f"{len(WORDS) - 1} tokens"),
        (
            {"tensors": [("token_embd.weight", (32,), 1, 0), ("output.weight", (32,), 1, 64)]},
            "has output.weight",
        ),
        ({"eos": 1}, "ends with token 1"),
    ],
)
def test_m4_a_file_that_differs_is_not_published(
    converted: dict[str, Any], run_folder: Path, change: dict[str, Any], message: str
) -> None:
    converted.update(change)
    converted["prepare"]()
    with pytest.raises(InputError, match=re.escape(message)):
        gguf.run(run_folder, quant="F16", console=quiet())
    assert leftovers(run_folder) == []


def test_m3_an_untied_model_must_have_its_output(converted: dict[str, Any], tmp_path: Path) -> None:
    write_source(tmp_path / "untied" / "merged", tied=False)
    converted["prepare"]()
    with pytest.raises(InputError, match=r"lacks output\.weight"):
        gguf.run(tmp_path / "untied", quant="F16", console=quiet())


def test_what_was_converted_before_an_export_broke_off_is_taken(
    converted: dict[str, Any], run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    converted["prepare"]()
    calls: list[str] = []

    def quantize(source: Path, target: Path, quant: str, matrix: Path | None = None) -> list[str]:
        calls.append(quant)
        if len(calls) == 1:
            raise KeyboardInterrupt
        target.write_bytes(source.read_bytes())
        return []

    monkeypatch.setattr(gguf, "quantize", quantize)
    with pytest.raises(KeyboardInterrupt):
        gguf.run(run_folder, quant="Q8_0", console=quiet())
    assert leftovers(run_folder) == [".gguf-first"]
    # No converter is asked again for the same weights; other ones are converted anew.
    fake_converter(monkeypatch, tmp_path, "import sys; sys.exit('converted twice')")
    console = quiet()
    gguf.run(run_folder, quant="Q8_0", console=console)
    assert "going on from what an earlier export had converted" in console.file.getvalue()  # type: ignore[attr-defined]
    assert leftovers(run_folder) == ["gguf"]
    calls.clear()
    converted["prepare"]()
    with pytest.raises(KeyboardInterrupt):
        gguf.run(run_folder, quant="Q8_0", overwrite=True, console=quiet())
    os.utime(next((run_folder / "merged").glob("*.safetensors")), ns=(1, 1))
    fake_converter(monkeypatch, tmp_path, "import sys; sys.exit('converted twice')")
    with pytest.raises(EdgeError, match="converted twice"):
        gguf.run(run_folder, quant="Q8_0", overwrite=True, console=quiet())


def write_model(folder: Path, *, tied: bool) -> Path:
    """A merged folder with real, random weights: two layers of width 64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer().to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}
    settings |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode("utf-8"))
    digest = manifest.text_digest(TEMPLATE)
    manifest.write(folder, manifest.Manifest("merged", "toy", "toy", chat_template=digest, stop_ids=[2]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "quant"), [(True, "Q4_K_M"), (False, "Q8_0")])
def test_m3_m9_real_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, quant: str
) -> None:
    pytest.importorskip("llama_cpp")
    run_folder = tmp_path / "模型 'x\" 目录"
    merged = write_model(run_folder / "merged", tied=tied)
    if tied:  # as an editor of Windows leaves it
        (merged / "chat_template.jinja").write_bytes(TEMPLATE.replace("\n", "\r\n").encode("utf-8"))
    monkeypatch.chdir(tmp_path)
    if quant == "Q4_K_M":  # what larger models are quantised to where nothing is said
        monkeypatch.setattr(gguf, "SMALL", 0)
    console = quiet()
    header = read_header(gguf.run(Path(run_folder.name), console=console))
    assert header.file_type == quant
    assert ("output.weight" in header.tensors) is not tied
    assert header.chat_template == TEMPLATE and header.vocab_size == len(WORDS)
    made = manifest.read(run_folder / "gguf")
    assert made.verify["token_ids"] == "equal" and made.verify["tied"] is tied
    assert made.verify["vocab_size"] == len(WORDS) and made.verify["chat_template"] == "equal"
    assert made.chat_template == manifest.text_digest(TEMPLATE)
    assert made.verify["unequal"] == [] and made.verify["logits"]["top1"] > (
        0.6 if quant == "Q4_K_M" else 0.9
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    if quant == "Q4_K_M":  # rows of 64 cannot be blocks of 256
        assert made.settings["fallbacks"] == 14 and "14 of 20 tensors" in text
        assert not any(tensor.type.endswith("_K") for tensor in header.tensors.values())
    else:
        assert made.settings["fallbacks"] == 0 and header.tensors["output.weight"].type == "Q8_0"


@pytest.mark.slow
def test_m4_a_changed_tokenizer_is_refused(tmp_path: Path, converted_before: Path) -> None:
    run = shutil.copytree(converted_before, tmp_path / "run")
    changed = Tokenizer.from_file(str(run / "merged" / "tokenizer.json"))
    changed.normalizer = normalizers.Lowercase()
    (run / "merged" / "tokenizer.json").write_text(changed.to_str(), encoding="utf-8")
    with pytest.raises(InputError, match=r"token ids: \d+ of \d+ texts, the first '"):
        gguf.run(run, quant="F16", console=quiet())
    assert not (run / "gguf").exists()
