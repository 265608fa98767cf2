"""Comparing stages: the numbers are right, what must be equal is refused where it is not."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from convert.verify import cli, compare, probes
from convert.verify.compare import open_reader
from convert.verify.divergence import Divergence, log_softmax
from convert.verify.gguf_reader import GgufReader
from convert.verify.torch_reader import TorchReader
from edge.artefact import manifest
from edge.errors import InputError
from tests.support import tiny_llama
from tests.support.families import make_adapter, make_family
from tests.support.toy import CHATML, make_model

# Seconds of training or of other processes: left out of the quick part.
pytestmark = pytest.mark.slow


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


# Numbers


def test_divergence_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]), np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    found = Divergence()
    # Any constant added to a row's logits is no difference.
    found.add((np.log(p) + 7).astype(np.float32), np.log(q).astype(np.float32), [1, 0], greedy=False)
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    second = 0.9 * math.log(0.9 / 0.8) + 2 * 0.05 * math.log(0.5)
    numbers = found.numbers()
    assert numbers["positions"] == 2 and numbers["top1"] == 0.5
    assert numbers["kl_mean"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert numbers["kl_max"] == pytest.approx(max(first, second), rel=1e-5)
    assert numbers["perplexity"] == [
        pytest.approx(math.sqrt(1 / (0.25 * 0.9)), rel=1e-5),
        pytest.approx(math.sqrt(1 / (0.5 * 0.8)), rel=1e-5),
    ]


@pytest.mark.parametrize(
    ("kind", "positions", "turned", "kl", "warns"),
    [
        ("float16", 675, 1, 7.5e-7, False),  # the demo's merge
        ("float16", 675, 2, 7.5e-7, True),
        ("float16", 3000, 3, 7.5e-7, False),
        ("float16", 675, 0, 2e-4, True),
        ("Q8_0", 100, 3, None, False),
        ("Q8_0", 100, 4, None, True),
    ],
)
def test_what_a_type_may_turn(kind: str, positions: int, turned: int, kl: float | None, warns: bool) -> None:
    numbers: dict[str, Any] = {"positions": positions, "top1": 1 - turned / positions, "kl_mean": kl}
    assert bool(compare.too_far(kind, numbers)) == warns


def test_greedy_texts_are_equal_up_to_the_first_other_token() -> None:
    def tops(*ids: int) -> Any:
        return np.eye(4, dtype=np.float32)[list(ids)] * 9

    found = Divergence()
    found.add(tops(1, 2, 3, 0), tops(1, 2, 0, 0), [1, 2, 3, 0], greedy=True)
    found.add(tops(1, 2), tops(1, 2), [1, 2], greedy=True)
    assert (found.numbers()["greedy_equal"], found.numbers()["greedy_tokens"]) == (4, 6)
    # A column more (added tokens) is left out of the comparison.
    found.add(tops(1), np.hstack([tops(1), [[99.0]]]).astype(np.float32), [1], greedy=True)
    assert found.numbers()["greedy_equal"] == 5


def test_what_is_no_number_is_counted() -> None:
    found = Divergence()
    found.add(np.zeros((2, 3), np.float32), np.full((2, 3), np.nan, np.float32), [0, 1], greedy=False)
    assert found.numbers() == {"positions": 0, "not_numbers": 2}


def test_log_softmax_keeps_small_differences() -> None:
    logits = np.array([[1000.0, 0.0], [0.0, 0.0]], np.float32)
    assert np.allclose(log_softmax(logits), [[0, -1000], [-math.log(2)] * 2])


# Stages that differ


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "基 a'b")


def copied(base: Path, target: Path) -> Path:
    shutil.copytree(base, target)
    return target


def compared(a: Path, b: Path) -> compare.Report:
    return compare.compare(TorchReader(a), TorchReader(b))


def test_a_copy_is_equal(base: Path, tmp_path: Path) -> None:
    report = compared(base, copied(base, tmp_path / "b"))
    assert report.unequal == [] and report.warnings == []
    assert report.facts["round_trip_exact"] == "10 of 10"
    assert report.logits["kl_mean"] == 0 and report.logits["top1"] == 1.0
    assert report.logits["greedy_equal"] == report.logits["greedy_tokens"] > 100
    assert report.notes == [
        "only the fixed prompts are compared: no adapter with a data set is known behind it"
    ]


def test_texts_that_are_written_side_by_side_are_those_written_alone(base: Path) -> None:
    with contextlib.closing(TorchReader(base)) as reader:
        rows = [[5, 6, 7], [9], list(range(10, 40))]
        alone = [reader.greedy(ids, 12) for ids in rows]
        assert reader.greedy_of_all(rows, 12) == alone
        end = alone[1][3]
        reader.stop_ids = frozenset([end])
        assert reader.greedy_of_all(rows, 12)[1] == alone[1][: alone[1].index(end) + 1]


def test_what_was_measured_before_is_not_measured_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = copied(base, tmp_path / "b")
    whole = compared(base, b)
    monkeypatch.setattr(compare, "Reference", None)
    known = compare.Measured(whole.logits, whole.notes)
    again = compare.compare(TorchReader(base), TorchReader(b), measured=known)
    assert (again.logits, again.notes, again.facts) == (whole.logits, whole.notes, whole.facts)


def test_m2_another_template_is_named_by_its_place(base: Path, tmp_path: Path) -> None:
    b = copied(base, tmp_path / "b")
    (b / "chat_template.jinja").write_text(CHATML.replace("assistant", "bot"), encoding="utf-8")
    report = compared(base, b)
    at = CHATML.index("assistant")
    assert report.unequal[0].startswith(f'chat template: from character {at} on A has "assistant')
    assert report.logits == {}
    with pytest.raises(InputError, match="is not the model that"):
        report.refuse()


def test_m4_changed_merges_are_found(base: Path, tmp_path: Path) -> None:
    b = copied(base, tmp_path / "b")
    data = json.loads((b / "tokenizer.json").read_text(encoding="utf-8"))
    merges = data["model"]["merges"]
    merges.reverse()
    (b / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    report = compared(base, b)
    assert report.facts["token_ids"] == "unequal" and "token ids: " in report.unequal[0]


def test_a_lost_stop_token_is_refused(base: Path, tmp_path: Path) -> None:
    b = copied(base, tmp_path / "b")
    (b / "generation_config.json").write_text('{"eos_token_id": 2}', encoding="utf-8")
    assert compared(base, b).unequal == ["stop tokens: A ends at [0, 2], B at [2]"]


def test_other_weights_are_a_warning(base: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    report = compared(base, other)
    assert report.unequal == [] and "differs more than weights of this type should" in report.warnings[0]


def test_m7_the_thinking_mode_is_part_of_the_prompt(base: Path, tmp_path: Path) -> None:
    from tests.support.toy import THINKING

    paths = []
    for mode in ("on", "off"):
        path = copied(base, tmp_path / mode)
        (path / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
        digest = manifest.text_digest(THINKING)
        known = manifest.Manifest("merged", mode, chat_template=digest, stop_ids=[0, 2], thinking=mode)
        manifest.write(path, known)
        paths.append(path)
    report = compared(*paths)
    assert report.facts["chat_template"] == "equal" and report.facts["token_ids"] == "unequal"


# Large models: a layer at a time


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3"])
def test_layers_in_turn_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool
) -> None:
    from convert.model import dequantized_base, layerwise, reference

    folder = make_family(tmp_path / family, family, tied=tied)
    rows, last = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [3] * 40], [7, 1, 5]
    whole = [found.clone() for found in layerwise.load(folder).logits(rows, last)]
    assert [one.shape for one in whole] == [(7, 384), (1, 384), (5, 384)]
    # Rows in several batches, logits in several parts, the head some rows at a time.
    for module, name, value in (
        (reference, "WHOLE", 0),
        (layerwise, "TOKENS", 14),
        (layerwise, "POSITIONS", 8),
        (dequantized_base, "CHUNK", 7000),
    ):
        monkeypatch.setattr(module, name, value)
    model = layerwise.load(folder)
    assert all(parameter.is_meta for parameter in model.layers[0].parameters())
    told: dict[str, int] = {}

    def observe(name: str, values: Any) -> None:
        told[name] = told.get(name, 0) + len(values)

    with model.observed(observe):
        found = list(model.logits(rows, last))
    assert [one.shape for one in found] == [one.shape for one in whole]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, whole, strict=True))
    # All but the first token of each row.
    assert {count for name, count in told.items() if "layers.1." in name} == {6 + 1 + 39}
    # The tables were never in memory: of one the rows' tokens, of the other nothing.
    assert model.model.get_input_embeddings().weight.shape[0] == 10
    assert model.model.get_output_embeddings().weight.is_meta
    assert TorchReader(folder).greedy([5, 6], 4) is None


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_a_layer_at_a_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    from convert.model import layerwise, reference

    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    rows, last = [[5, 6, 7, 8], [9, 10, 11]], [4, 2]
    whole = [found.clone() for found in layerwise.load(base, adapter).logits(rows, last)]
    plain = next(layerwise.load(base).logits(rows, last))
    assert not torch.allclose(whole[0], plain, atol=1e-2)
    monkeypatch.setattr(reference, "WHOLE", 0)
    found = list(layerwise.load(base, adapter).logits(rows, last))
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, whole, strict=True))


def test_too_little_memory_is_a_note(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge.machine import hardware

    monkeypatch.setattr(hardware, "memory", lambda: hardware.Memory(10, 10))
    report = compared(base, copied(base, tmp_path / "b"))
    assert report.unequal == [] and report.logits == {}
    assert report.notes[-1].startswith("logits are not compared: ") and "GiB are free" in report.notes[-1]


# GGUF


@pytest.mark.slow
def test_gguf_files(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    a, same, other = (
        tiny_llama.write(tmp_path / f"{name}.gguf", seed=seed)
        for name, seed in (("模型 a", 0), ("b", 0), ("c", 1))
    )
    report = compare.run(a, same, console=quiet())
    assert report.logits["kl_mean"] == 0 and report.logits["greedy_equal"] == report.logits["greedy_tokens"]
    report = compare.run(a, other, console=quiet())
    assert report.warnings and report.logits["top1"] < 0.9
    changed = tiny_llama.write(tmp_path / "d.gguf", template=tiny_llama.TEMPLATE + " ")
    with pytest.raises(InputError, match="chat template: from character"):
        compare.run(a, changed, console=quiet())


def test_a_special_token_that_differs_is_found_with_gguf_first(tmp_path: Path) -> None:
    """Planted: a token that no template or prompt holds is spelled otherwise in one of the two."""
    pytest.importorskip("llama_cpp")
    path, other = tiny_llama.write(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    data = path.read_bytes()
    assert data.count(b"</s>") == 1
    other.write_bytes(data.replace(b"</s>", b"</z>"))
    for a, b in ((path, other), (other, path)):
        with contextlib.closing(open_reader(a)) as first, contextlib.closing(open_reader(b)) as second:
            assert first.special_tokens()[0] == "<s>" and "<|user|>" in first.special_tokens()
            report = compare.compare(first, second)
        assert report.facts["token_ids"] == "unequal" and len(report.unequal) == 1
        assert "'a </" in report.unequal[0]


def test_logits_do_not_depend_on_how_a_row_is_cut(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    reader = GgufReader(tiny_llama.write(tmp_path / "a.gguf"))
    ids = tiny_llama.ids("the quick brown fox jumps over the lazy dog, and once more: " * 3)
    [found] = reader.all_logits([ids], [len(ids)])
    assert found.shape == (len(ids), tiny_llama.VOCAB) and len(ids) > 128
    [part] = reader.all_logits([ids[:70]], [70])
    assert np.allclose(part, found[:70], atol=1e-3)
    # A text written token by token is the one that the logits of all its tokens choose.
    text = reader.greedy(ids[:9], 5)
    assert text is not None
    [chosen] = reader.all_logits([(ids[:9] + text)[:-1]], [len(text)])
    assert chosen.argmax(axis=1).tolist() == text
    reader.close()


def test_a_file_that_llama_cpp_refuses_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from tests.support.tiny_gguf import ONE_TENSOR, gguf, shape

    path = tmp_path / "odd.gguf"
    path.write_bytes(gguf(shape("odd") | {"tokenizer.chat_template": "{{ 1 }}"}, ONE_TENSOR, 4))
    with pytest.raises(InputError, match=r"llama\.cpp cannot load"):
        open_reader(path)


def test_the_report_is_kept_and_changes_no_digest(base: Path, tmp_path: Path) -> None:
    b = copied(base, tmp_path / "b")
    digest = manifest.text_digest(CHATML)
    made = manifest.write(b, manifest.Manifest("merged", "x", chat_template=digest, stop_ids=[0, 2]))
    console = quiet()
    compare.run(base, b, console=console)
    known = manifest.read(b)
    assert known.digest == made.digest and known.verify["logits"]["top1"] == 1.0
    assert known.verify["against"]["stage"] == "model" and known.verify["token_ids"] == "equal"
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "same top token" in text and "1.000" in text


def test_rows_of_the_data_set_are_found_through_the_parents(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(40)]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    settings = {"dataset": ["d"], "dataset_dir": str(tmp_path), "val_size": 0.1, "seed": 1}
    for folder in (adapter, merged):
        folder.mkdir()
    known = manifest.write(adapter, manifest.Manifest("adapter", "x", settings=settings))
    child = manifest.write(merged, manifest.Manifest("merged", "x", parents=[known.parent(adapter)]))
    found = probes.from_data(child)
    assert found.rows == "4 held-out rows" and all(probe.answer.startswith("a") for probe in found.probes)
    known.settings["val_size"] = 0
    child.parents = [manifest.write(adapter, known).parent(adapter)]
    assert probes.from_data(child).rows == "24 training rows"
    (adapter / "x.txt").write_text("trained again", encoding="utf-8")
    manifest.write(adapter, known)
    assert probes.from_data(child).note == "no adapter with a data set is known behind it"


def test_verb_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        cli.main([str(tmp_path / "a"), str(tmp_path / "b")])


def test_an_older_runs_relative_data_set_is_found_above_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, adapter = tmp_path / "project", tmp_path / "project" / "runs" / "a" / "adapter"
    for folder, count in ((project / "data", 8), (tmp_path / "elsewhere" / "data", 2)):
        folder.mkdir(parents=True)
        rows = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(count)]
        (folder / "d.json").write_text(json.dumps(rows), encoding="utf-8")
        (folder / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    adapter.mkdir(parents=True)
    settings = {"dataset": ["d"], "dataset_dir": "data"}
    known = manifest.write(adapter, manifest.Manifest("adapter", "x", settings=settings))
    child = manifest.Manifest("merged", "x", parents=[known.parent(adapter)])
    monkeypatch.chdir(tmp_path)
    assert probes.from_data(child).rows == "8 training rows"
    # The run's own folders first: another project's `data` may lie in the working folder.
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert probes.from_data(child).rows == "8 training rows"
    (project / "data" / "dataset_info.json").unlink()
    assert probes.from_data(child).rows == "2 training rows"
