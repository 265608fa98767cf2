"""ONNX export: what is refused, what is published and said; and real exports of toy models."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("tokenizers")

from convert.export import check_with_optimum, onnx_graph
from convert.export import onnx as export
from convert.verify import compare, onnx_reader
from convert.verify.reader import Reader
from edge.artefact import find, manifest
from edge.artefact.onnx_header import read_onnx
from edge.backends.onnx import Model, Onnx, Settings
from edge.errors import EdgeError, ExistsError, InputError, UnavailableError, UsageError
from tests.support import tiny_onnx
from tests.support.desk import Desk
from tests.support.fake_server import launch
from tests.support.tiny_safetensors import safetensors

GOOD = {"positions": 100, "kl_mean": 1e-6, "kl_p99": 1e-5, "kl_max": 1e-4, "top1": 1.0}
POOR = GOOD | {"kl_mean": 0.4, "kl_p99": 9.0, "top1": 0.7}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose merged stage has the tiny model's tokenizer; its weights are a stub."""
    merged = tmp_path / "run 壳'" / "merged"
    tiny_onnx.write(merged)
    for name in ("tiny.onnx", "tiny.onnx.data"):
        (merged / name).unlink()
    safetensors(merged / "model.safetensors", bytes(1000), empty=tiny_onnx.LAYERS)
    config = {
        "model_type": "llama",
        "num_hidden_layers": tiny_onnx.LAYERS,
        "vocab_size": tiny_onnx.VOCAB,
        "max_position_embeddings": tiny_onnx.CONTEXT,
        "dtype": "float16",
    }
    (merged / "config.json").write_text(json.dumps(config), encoding="utf-8")
    made = manifest.Manifest("merged", "贝壳: 1", "toy", stop_ids=[tiny_onnx.END], thinking="off")
    made.chat_template = manifest.text_digest(tiny_onnx.TEMPLATE)
    manifest.write(merged, made)
    return merged.parent


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The builder and the merged model's logits replaced: what was asked of them, and what is found.

    The rest of the comparison (template, token ids, stops) is the real one.
    """
    told: dict[str, Any] = {"logits": GOOD}

    def build(source: Path, final: Path, recipe: export.Recipe, block: int) -> None:
        told["asked"] = (recipe.precision, recipe.scheme, recipe.ep, block)
        tiny_onnx.write(final.parent, name=final.name)
        decoder = {"head_size": 16, "hidden_size": tiny_onnx.WIDTH}
        (final.parent / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
        (final.parent / "leftover.json").write_text("{}")
        (final.parent / "folder").mkdir()

    class Logits:
        """As convert.verify.logits.Reference, but for what it takes long."""

        notes = ()

        def __init__(self, a: Reader, speaker: Reader) -> None:
            assert speaker.greedy(list(b"hello"), 3)

        def against(self, b: Reader) -> dict[str, Any]:
            return dict(told["logits"])

        def close(self) -> None:
            pass

    monkeypatch.setattr(export, "_build", build)
    monkeypatch.setattr(onnx_graph, "complete", lambda *_, **more: told.update(more))
    monkeypatch.setattr(compare, "Reference", Logits)
    return told


def said(run_folder: Path, **given: Any) -> str:
    out = io.StringIO()
    export.run(run_folder, console=Console(file=out, width=300, markup=False), **given)
    return out.getvalue()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "merged")


def test_what_is_published_says_what_it_is(run_folder: Path, built: dict[str, Any]) -> None:
    text = said(run_folder)
    assert "int8" in text
    assert "compared with the merged: template" in text and "KL 1.0e-06 (p99 1.0e-05), top-1 1.000" in text
    assert "warning" not in text
    # A small model, so that 4 bits are not the default.
    assert built["asked"] == ("int8", "mixed", "cpu", 32)
    assert (built["width"], built["candidates"]) == (tiny_onnx.WIDTH, 0)
    folder = run_folder / "onnx"
    stem = "贝壳- 1" if sys.getfilesystemencoding() == "utf-8" else "model"
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "edge.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        f"{stem}-int8.onnx",
        f"{stem}-int8.onnx.data",
    }
    made = manifest.read(folder)
    assert (made.stage, made.name, made.stop_ids, made.thinking) == (
        "onnx",
        "贝壳: 1",
        [tiny_onnx.END],
        "off",
    )
    assert made.parents == [manifest.read(run_folder / "merged").parent((run_folder / "merged").resolve())]
    assert made.settings["precision"] == "int8"
    assert made.settings["activations"].startswith("as they are, in blocks of 32: measuring needs rows")
    assert "activations as they are, in blocks of 32" in text
    # The shape that merge and GGUF export keep.
    assert made.verify["logits"] == GOOD and made.verify["kind"] == "fp32"
    assert made.verify["against"]["stage"] == "merged" and made.verify["vocab_size"] == tiny_onnx.VOCAB
    assert made.verify["against"]["digest"] == manifest.read(run_folder / "merged").digest
    checked = ("chat_template", "token_ids", "round_trip", "stops")
    assert {made.verify[name] for name in checked} == {"equal"}
    assert made.verify["unequal"] == made.verify["warnings"] == []
    assert find.resolve(run_folder).digest == made.digest


def test_an_earlier_export_stays_unless_it_is_to_be_replaced(run_folder: Path, built: dict[str, Any]) -> None:
    said(run_folder, precision="int4", scheme="block")
    before = manifest.read(run_folder / "onnx").digest
    with pytest.raises(ExistsError, match="--overwrite"):
        said(run_folder)
    built["logits"] = GOOD | {"not_numbers": 3}
    with pytest.raises(InputError, match="3 positions are not finite numbers"):
        said(run_folder, overwrite=True)
    assert manifest.read(run_folder / "onnx").digest == before
    assert leftovers(run_folder) == ["onnx"]
    built["logits"] = GOOD
    said(run_folder, overwrite=True)
    assert manifest.read(run_folder / "onnx").settings["precision"] == "int8"


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("int4", "--precision int8, or --precision int4 --scheme mixed,"),
        ("int4 mixed", "--precision int8"),
        ("int8", "--precision fp32 (fp16 with --ep cuda)"),
        ("fp16", "--precision fp32 --ep cpu"),
    ],
)
def test_too_far_names_what_to_take(kind: str, advice: str) -> None:
    assert compare.too_far(kind, GOOD) == ""
    warning = compare.too_far(kind, POOR)
    assert warning.startswith(f"{kind} differs more than weights of this type should: mean KL 0.4 (at most ")
    assert warning.endswith(f": {advice} would be closer")
    # Either figure is enough.
    assert compare.too_far(kind, GOOD | {"top1": 0.7}) and compare.too_far(kind, GOOD | {"kl_mean": 0.4})


def test_poor_answers_are_said_and_kept(run_folder: Path, built: dict[str, Any]) -> None:
    built["logits"] = POOR
    text = said(run_folder)
    assert "warning: fp32 differs more than weights of this type should: mean KL 0.4" in text
    [warning] = manifest.read(run_folder / "onnx").verify["warnings"]
    assert warning in text


def test_another_tokenizer_than_the_merged_models_is_refused(
    run_folder: Path, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the copy beside the graph lost a special token."""
    copy = shutil.copyfile

    def planted(source: Path, target: Path) -> None:
        copy(source, target)
        if target.name == "tokenizer.json":
            text = target.read_text(encoding="utf-8")
            target.write_text(text.replace("<think>", "<thunk>"), encoding="utf-8")

    monkeypatch.setattr(export.shutil, "copyfile", planted)
    with pytest.raises(InputError, match=r"token ids: .*<think>"):
        said(run_folder)
    assert leftovers(run_folder) == []


def test_a_file_for_a_card_is_published_where_there_is_none(
    run_folder: Path, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("onnxruntime cannot load it")

    monkeypatch.setattr(onnx_reader, "Onnx", refuse)
    text = said(run_folder, precision="fp16", ep="cuda")
    assert "note: logits are not compared: onnxruntime cannot load it" in text
    verify = manifest.read(run_folder / "onnx").verify
    assert verify["logits"] == {} and verify["token_ids"] == "equal"
    assert verify["notes"] == ["logits are not compared: onnxruntime cannot load it"]
    assert built["candidates"] == 64
    with pytest.raises(InputError, match="cannot load it"):
        said(run_folder, overwrite=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "int3"}, "int4, int8"),
        ({"scheme": "gptq"}, "block, k-quant, mixed"),
        ({"ep": "tpu"}, "cpu, cuda"),
        ({"precision": "fp16"}, "--ep cuda"),
        ({"precision": "fp32", "ep": "cuda"}, "--precision fp16"),
    ],
)
def test_what_is_not_known_is_refused(run_folder: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export.run(run_folder, **given)  # type: ignore[arg-type]
    assert leftovers(run_folder) == []


def test_a_run_without_a_merged_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="edge merge"):
        export.run(tmp_path)


def test_m2_a_changed_template_is_refused(run_folder: Path) -> None:
    (run_folder / "merged" / "chat_template.jinja").write_text("another", encoding="utf-8")
    with pytest.raises(InputError, match="not the template"):
        export.run(run_folder)


def test_a_graph_of_another_shape_is_not_published(run_folder: Path, built: dict[str, Any]) -> None:
    path = run_folder / "merged" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 256}))
    with pytest.raises(InputError, match=r"512 positions, config\.json says 256"):
        said(run_folder)
    assert leftovers(run_folder) == []


@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        ("ModuleNotFoundError: No module named 'onnx_ir'", UnavailableError, "export-onnx"),
        (
            "NotImplementedError: The OddForCausalLM model is not currently supported.",
            InputError,
            "OddForCausalLM",
        ),
        ("Traceback\nValueError: 坏了", EdgeError, "ValueError: 坏了"),
    ],
)
def test_a_builder_that_refuses_is_one_message(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: str, error: type, message: str
) -> None:
    script = tmp_path / "python.py"
    script.write_text(f"import sys\nsys.stderr.buffer.write({log.encode()!r})\nsys.exit(1)\n")
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **given: real([sys.executable, str(script)], **given)
    )
    with pytest.raises(error) as caught:
        export.run(run_folder)
    assert message in str(caught.value)
    assert leftovers(run_folder) == []


# -- real exports ----------------------------------------------------------------------------------------


TOYS = {"llama-tied": ("llama", True), "qwen2-untied": ("qwen2", False)}


def toys(*more: str) -> pytest.MarkDecorator:
    """Over toys of both families; of those called `more` in the whole matrix alone."""
    params = [
        pytest.param(toy, id=name, marks=[pytest.mark.matrix] if name in more else [])
        for name, toy in TOYS.items()
    ]
    return pytest.mark.parametrize("real", params, indirect=True)


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with a merged toy model and its export in float32."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime_genai")
    from tests.support import toy

    run = tmp_path_factory.mktemp("运行 run")
    arch, tied = request.param
    merged = toy.make_model(run / "merged", arch=arch, tied=tied, template=toy.CHATML)
    # As transformers reads it.
    template = (merged / "chat_template.jinja").read_text(encoding="utf-8")
    ends = json.loads((merged / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    made = manifest.Manifest(
        "merged", "toy", "toy", stop_ids=ends, chat_template=manifest.text_digest(template)
    )
    manifest.write(merged, made)
    export.run(run, precision="fp32", console=Console(quiet=True))
    yield run


@pytest.mark.slow
@toys("qwen2-untied")
def test_a_real_export_is_the_merged_model(real: Path) -> None:
    verify = manifest.read(real / "onnx").verify
    assert verify["kind"] == "fp32" and verify["unequal"] == verify["warnings"] == []
    logits = verify["logits"]
    assert logits["positions"] > 50
    assert logits["top1"] == 1.0
    assert logits["kl_max"] < 1e-6
    header = read_onnx(find.resolve(real, "onnx").path)
    assert (header.context_length, header.vocab_size, header.selects) == (512, 384, True)


@pytest.mark.slow
@toys("qwen2-untied")
def test_verify_compares_a_real_export_with_the_merged_model(real: Path) -> None:
    report = compare.run(real / "merged", real / "onnx", console=Console(file=io.StringIO(), width=200))
    assert (report.unequal, report.warnings) == ([], [])
    assert (report.b.stage, report.b.kind) == ("onnx", "fp32")
    assert report.logits["kl_mean"] < 1e-6
    assert report.logits["greedy_equal"] == report.logits["greedy_tokens"] > 20
    # What the export itself kept is the same comparison.
    assert manifest.read(real / "onnx").verify["logits"] == report.logits


@pytest.mark.slow
@toys("qwen2-untied")
def test_a_large_model_is_compared_with_one_layer_in_memory(
    real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from convert.model import layerwise, reference

    monkeypatch.setattr(reference, "WHOLE", 0)
    # It would be in memory as a whole.
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    most, order = [0], []
    real_present = layerwise.LayeredModel.present

    @contextlib.contextmanager
    def counted(self: layerwise.LayeredModel, layer: Any) -> Iterator[None]:
        with real_present(self, layer):
            order.append(self.name(layer))
            loaded = [any(not p.is_meta for p in one.parameters()) for one in self.layers]
            most[0] = max(most[0], sum(loaded))
            yield

    monkeypatch.setattr(layerwise.LayeredModel, "present", counted)
    found = compare.run(real / "merged", real / "onnx", console=Console(quiet=True)).logits
    assert found["kl_mean"] < 1e-6 and found["greedy_tokens"] > 20
    # Each layer once for all rows, and never two of them.
    assert order == ["model.layers.0", "model.layers.1"] and most == [1]


@pytest.mark.matrix
@pytest.mark.slow
@toys("qwen2-untied")
def test_the_check_against_optimum(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """optimum's process replaced by answers that are torch's, and by one that is not."""
    from convert.model.reference import TorchModel

    jobs: list[dict[str, Any]] = []
    wrong: list[int] = []

    def optimum(command: list[str], text: str = "") -> str:
        job = json.loads(text)
        jobs.append(job | {"config": json.loads((Path(job["source"]) / "config.json").read_text())})
        model = TorchModel(real / "merged")
        answers = [model.greedy(ids, job["tokens"], frozenset(job["ends"])) for ids in job["prompts"]]
        answers[0] += wrong
        return "a line of a library\n" + json.dumps({"answers": answers, "versions": "optimum 0"})

    monkeypatch.setattr(check_with_optimum, "optimum_python", lambda: "python")
    monkeypatch.setattr(check_with_optimum, "_run", optimum)
    out = io.StringIO()
    result = check_with_optimum.run(real, console=Console(file=out, width=120))
    assert (result.ours, result.optimum) == (5, 5) and 0 < result.difference < 1e-3
    assert "optimum (optimum 0)" in out.getvalue() and "5 of 5" in out.getvalue()
    assert len(jobs[0]["prompts"]) == 5 and jobs[0]["config"]["rope_theta"] == 10000.0
    wrong.append(7)
    with pytest.raises(EdgeError, match="do not give what torch gives"):
        check_with_optimum.run(real, console=Console(quiet=True))


@pytest.mark.slow
@toys("qwen2-untied")
def test_a_real_export_is_served(real: Path) -> None:
    command = [sys.executable, "-m", "edge.cli", "serve", str(real), "--port", "0", "--no-tune"]
    with launch(command) as server:
        server.wait(seconds=60)
        info = server.get("/info").json()
        assert (info["backend"], info["device"], info["settings"]["chosen"]) == (
            "onnx",
            "cpu",
            "onnx: the only artefact there is",
        )
        body = {"prompt": "你好 " * 20, "max_tokens": 12}
        first, again = (server.post("/generate", body).json() for _ in range(2))
        assert first["generate_text"] == again["generate_text"]
        cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == first["usage"]["prompt_tokens"] - 1


@pytest.mark.matrix
@pytest.mark.slow
@toys("qwen2-untied")
def test_a_file_for_a_card_is_served_by_a_processor_too(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real / "merged", tmp_path / "merged")
    text = said(tmp_path, precision="fp16", ep="cuda")
    assert "warning" not in text
    found = find.resolve(tmp_path, "onnx")
    header = read_onnx(found.path)
    assert (header.cache_type, header.candidates, set(header.matrices)) == ("float16", 64, {16})
    assert header.hidden == read_onnx(find.resolve(real, "onnx").path).hidden > 0
    backend = Onnx(Model(found.path), Settings(slots=4, context=128, batch=64, device="auto"))
    asked = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    alone, together = Desk(backend), Desk(backend)
    for key in range(4):
        alone.submit(key, f"number {key} " * (1 + key), reuse=False, **asked)
        alone.idle()
    alone.run()
    for key in range(4):
        together.submit(key, f"number {key} " * (1 + key), reuse=False, **asked)
    together.run()
    assert [together.text(key) for key in range(4)] == [alone.text(key) for key in range(4)]
    assert np.linalg.norm(backend.embed([5, 6, 7])) == pytest.approx(1.0, abs=1e-4)
    backend.close()


@pytest.mark.matrix
@pytest.mark.slow
@toys("qwen2-untied")
def test_four_bits_are_smaller_and_said_to_be_poor(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real / "merged", tmp_path / "merged")
    text = said(tmp_path, precision="int4", scheme="block")
    header = read_onnx(find.resolve(tmp_path, "onnx").path)
    assert 4 in header.matrices
    assert "warning: int4 differs more" in text and "--precision int4 --scheme mixed, would be closer" in text
    assert header.weights_bytes < read_onnx(find.resolve(real, "onnx").path).weights_bytes
