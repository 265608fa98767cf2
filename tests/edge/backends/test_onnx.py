"""The ONNX backend: files that cannot be trusted, tokens, rows, steps."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("tokenizers")

import onnx
import onnxruntime
from onnx import TensorProto, helper

from convert.export.onnx_graph import add_candidates
from edge.artefact.onnx_header import CANDIDATES, read_onnx
from edge.backends import onnx_embedding
from edge.backends.base import Candidates, Row, StepInterrupted
from edge.backends.onnx import Model, Onnx, Settings
from edge.backends.onnx_io_binding import Buffer, Mask
from edge.backends.onnx_kv_cache import HostKVCache
from edge.backends.onnx_tokenizer import Vocabulary
from edge.engine import protocol as msg
from edge.engine.grammar import Constraint
from edge.errors import EdgeError, InputError
from edge.machine import hardware
from edge.machine.hardware import Memory
from tests.support import tiny_onnx
from tests.support.desk import Desk

SMALL = Settings(slots=4, context=128, batch=64, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("模型 目录")
    tiny_onnx.write(made, name=tiny_onnx.FILE)
    return made


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The model's path, in a folder that may be damaged."""
    shutil.copytree(folder, tmp_path / "m")
    return tmp_path / "m" / tiny_onnx.FILE


def edit(path: Path, change: Callable[[Any], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


# -- untrusted files ---------------------------------------------------------------------------------------


def test_the_header_says_what_planning_needs(folder: Path) -> None:
    header = read_onnx(folder / tiny_onnx.FILE)
    assert (header.block_count, header.head_count, header.head_count_kv) == (2, 4, 2)
    assert (header.key_length, header.embedding_length) == (16, 64)
    assert (header.vocab_size, header.context_length, header.cache_type) == (tiny_onnx.VOCAB, 512, "float32")
    assert header.files == (tiny_onnx.FILE, f"{tiny_onnx.FILE}.data")
    assert header.weights_bytes == sum((folder / name).stat().st_size for name in header.files)
    assert header.selects
    assert (header.hidden, header.candidates) == (64, 0)
    assert header.matrices == {32: 2 * 6 + 1}


@pytest.mark.parametrize(
    "place", ["../weights", "/etc/passwd", "sub/weights", "..", "C:\\weights", "a\\..\\b", "", "missing"]
)
def test_weights_outside_the_folder_are_refused(copy: Path, place: str) -> None:
    (copy.parent.parent / "weights").write_bytes(b"\0" * 10**6)

    def move(model: Any) -> None:
        [entry] = [e for e in model.graph.initializer[-2].external_data if e.key == "location"]
        entry.value = place

    edit(copy, move)
    with pytest.raises(InputError, match=r"its folder|damaged"):
        read_onnx(copy)


def test_a_link_that_leads_out_of_the_folder_is_refused(copy: Path) -> None:
    data = copy.with_name(f"{tiny_onnx.FILE}.data")
    data.rename(copy.parent.parent / "elsewhere")
    try:
        data.symlink_to(copy.parent.parent / "elsewhere")
    except OSError:
        pytest.skip("links need a privilege here")
    with pytest.raises(InputError, match="not a file in its folder"):
        read_onnx(copy)


def test_weights_that_were_cut_off_are_named(copy: Path) -> None:
    data = copy.with_name(f"{tiny_onnx.FILE}.data")
    data.write_bytes(data.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cut off"):
        read_onnx(copy)


@pytest.mark.parametrize(("key", "value"), [("offset", "-8"), ("length", "4"), ("offset", "99999999999")])
def test_wrong_places_within_the_weights_are_refused(copy: Path, key: str, value: str) -> None:
    def change(model: Any) -> None:
        [entry] = [e for e in model.graph.initializer[-2].external_data if e.key == key]
        entry.value = value

    edit(copy, change)
    with pytest.raises(InputError, match="should have"):
        read_onnx(copy)


def test_operators_from_other_libraries_are_refused(copy: Path) -> None:
    def change(model: Any) -> None:
        model.graph.node[0].domain = "ai.onnx.contrib"

    edit(copy, change)
    with pytest.raises(InputError, match=r"ai\.onnx\.contrib"):
        read_onnx(copy)


def test_programs_for_a_device_are_refused(copy: Path) -> None:
    edit(copy, lambda model: setattr(model.graph.node[0], "op_type", "EPContext"))
    with pytest.raises(InputError, match="compiled elsewhere"):
        read_onnx(copy)


def test_a_cut_or_scrambled_graph_is_an_error_never_a_crash(copy: Path) -> None:
    whole = copy.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole))])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        copy.write_bytes(bytes(data))
        try:
            read_onnx(copy)
        except InputError as error:
            assert tiny_onnx.FILE in str(error) or "m" in str(error)


def test_other_inputs_and_missing_ones_are_named(copy: Path) -> None:
    edit(copy, lambda model: setattr(model.graph.input[0], "name", "inputs_embeds"))
    with pytest.raises(InputError, match="inputs_embeds"):
        read_onnx(copy)


def test_a_graph_without_chosen_positions_is_not_served(copy: Path) -> None:
    def change(model: Any) -> None:
        del model.graph.input[-1]

    edit(copy, change)
    assert not read_onnx(copy).selects
    with pytest.raises(InputError, match="edge export onnx"):
        Model(copy)


def test_candidates_of_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path, candidates=8)
    assert read_onnx(path).candidates == 8
    edit(path, lambda model: setattr(model.graph.output[-1].type.tensor_type.shape.dim[2], "dim_value", 7))
    with pytest.raises(InputError, match="candidates"):
        read_onnx(path)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "坏.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match="坏"):
        read_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="0 bytes"):
        read_onnx(path)


# -- tokens ----------------------------------------------------------------------------------------------


def test_control_tokens_are_parsed_only_where_asked(folder: Path) -> None:
    vocabulary = Vocabulary(folder, tiny_onnx.VOCAB)
    assert vocabulary.encode("<|end|>x", special=True) == [tiny_onnx.END, ord("x")]
    assert vocabulary.encode("<|end|>x", special=False) == list(b"<|end|>x")
    assert vocabulary.decode(tiny_onnx.END) == b""
    # One that people see, and one that no text has.
    assert vocabulary.decode(258) == b"<think>"
    assert vocabulary.decode(tiny_onnx.VOCAB - 1) == b""


def test_s20_the_begin_token_comes_from_the_tokenizer(folder: Path) -> None:
    vocabulary = Vocabulary(folder, tiny_onnx.VOCAB)
    assert (vocabulary.bos_id, vocabulary.add_bos) == (tiny_onnx.BOS, True)
    assert (vocabulary.bos_text, vocabulary.eos_text) == ("<|begin|>", "<|end|>")
    assert vocabulary.encode("x", special=True) == [ord("x")]


def test_sentencepiece_spaces_and_bytes(tmp_path: Path) -> None:
    described = tiny_onnx.tokenizer()
    words = {"▁": 0, "a": 1, "<0xE4>": 2, "▁a": 3}
    described["model"] = {"type": "BPE", "vocab": words, "merges": [], "byte_fallback": True}
    described["added_tokens"], described["pre_tokenizer"] = [], None
    described["post_processor"] = None
    described["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    vocabulary = Vocabulary(tmp_path, 8)
    assert [vocabulary.decode(token) for token in range(4)] == [b" ", b"a", b"\xe4", b" a"]
    assert not vocabulary.add_bos


@pytest.mark.slow
def test_a_vocabulary_whose_bytes_are_not_known_is_refused(tmp_path: Path) -> None:
    described = tiny_onnx.tokenizer()
    described["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(InputError, match="WordPiece"):
        Vocabulary(tmp_path, 300)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        Vocabulary(tmp_path, 300)
    # At its first use the package panics, by what is no Exception.
    text = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": text, "pair": text, "special_tokens": {}}
    described = {**tiny_onnx.tokenizer(), "post_processor": template}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        Vocabulary(tmp_path, 300)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_onnx.tokenizer()), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "\\ud800"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer_config\.json cannot be read.*surrogates"):
        Vocabulary(tmp_path, 300)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="more tokens"):
        Vocabulary(folder, 200)


# -- rows ------------------------------------------------------------------------------------------------


def filled(lengths: list[int], room: int = 16) -> HostKVCache:
    """Rows whose cells hold their slot's number."""
    rows = HostKVCache(layers=1, slots=len(lengths), heads=1, room=room, width=2, dtype="float32")
    for slot, n in enumerate(lengths):
        rows.cells[:, rows.row(slot), :, :n] = slot + 1
    return rows


def holds(rows: HostKVCache, slot: int, n: int) -> bool:
    return bool((rows.cells[:, rows.row(slot), :, :n] == slot + 1).all())


def test_neighbours_are_not_moved() -> None:
    rows = filled([3, 3, 3, 3])
    assert rows.window([1, 2], [3, 3, 3, 3]) == (1, 2)
    assert [rows.row(slot) for slot in range(4)] == [0, 1, 2, 3]


def test_slots_move_together_and_keep_their_cells() -> None:
    lengths = [3, 9, 4, 7, 0, 5]
    rows = filled(lengths)
    first, count = rows.window([0, 3, 5], lengths)
    assert count == 3
    assert sorted(rows.row(slot) for slot in (0, 3, 5)) == list(range(first, first + 3))
    assert sorted(rows.row(slot) for slot in range(6)) == list(range(6))
    assert all(holds(rows, slot, n) for slot, n in enumerate(lengths))


def test_running_along_is_kept_up_while_moving_costs_more() -> None:
    lengths = [1000, 1000, 1000]
    rows = filled(lengths, room=1024)
    windows = [rows.window([0, 2], lengths) for _ in range(8)]
    # One row along for each step: 2000 tokens are worth eight of 256.
    assert windows == [(0, 3)] * 7 + [(0, 2)]
    assert all(holds(rows, slot, n) for slot, n in enumerate(lengths))


def test_a_full_slot_is_never_run_along() -> None:
    lengths = [900, 1024, 900]
    rows = filled(lengths, room=1024)
    assert rows.window([0, 2], lengths)[1] == 2
    assert all(holds(rows, slot, n) for slot, n in enumerate(lengths))


def test_cells_of_another_length_do_not_fit() -> None:
    rows = filled([5, 0])
    cells = rows.save(0, 5)
    assert not rows.restore(1, cells, 4)
    assert not rows.restore(1, cells[:-1], 5)
    assert rows.restore(1, cells, 5)


# -- the backend -----------------------------------------------------------------------------------------


def test_what_it_says_of_itself(folder: Path) -> None:
    made = Onnx(Model(folder / tiny_onnx.FILE), SMALL, extra_stop_ids=frozenset({tiny_onnx.END}))
    info = made.info
    assert (info.kind, info.name, info.device, info.why) == ("onnx", tiny_onnx.FILE, "cpu", "asked for")
    assert (info.slots, info.context, info.capacity, info.shared) == (4, 128, 512, False)
    assert info.stop_ids == {tiny_onnx.END}
    assert info.chat_template == tiny_onnx.TEMPLATE
    assert (info.settings["provider"], info.settings["matrices"]) == ("CPUExecutionProvider", "13 of 32 bits")
    made.close()


def test_the_default_position_is_the_last(folder: Path) -> None:
    made = Onnx(Model(folder / tiny_onnx.FILE), SMALL)
    tokens = list(b"abcde")
    feeds: dict[str, Any] = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, 5), np.int64)}
    empty = np.zeros((1, 2, 0, 16), np.float32)
    feeds |= {f"past_key_values.{layer}.{part}": empty for layer in range(2) for part in ("key", "value")}
    [logits] = made._session.run(["logits"], feeds)
    np.testing.assert_allclose(logits[0], made.step([Row(0, 0, tokens, 1)]), atol=1e-5)
    made.close()


def test_a_vector_is_the_mean_of_the_last_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Onnx(Model(folder / tiny_onnx.FILE), SMALL)
    assert made.info.embedding == tiny_onnx.WIDTH
    tokens = list(b"a text that is read in several pieces")
    feeds = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    empty = np.zeros((1, 2, 0, 16), np.float32)
    feeds |= {f"past_key_values.{layer}.{part}": empty for layer in range(2) for part in ("key", "value")}
    [states] = made._session.run(["hidden_states"], feeds)
    want = states[0].mean(axis=0)
    monkeypatch.setattr(onnx_embedding, "PIECE", 16)
    np.testing.assert_allclose(made.embed(tokens), want / np.linalg.norm(want), atol=1e-5)
    monkeypatch.setattr(hardware, "memory", lambda: Memory(2**30, 1000))
    with pytest.raises(EdgeError, match="37 tokens needs"):
        made.embed(tokens)
    made.close()


def test_a_graph_without_hidden_states_gives_no_vectors(copy: Path) -> None:
    edit(copy, lambda model: model.graph.output.pop(1))
    made = Onnx(Model(copy), SMALL)
    assert made.info.embedding == 0
    desk = Desk(made)
    desk.engine.embed(msg.Embed(1, "a text"))
    refused = desk.refused(1)
    assert (refused.status, refused.code) == (400, "unsupported")
    assert "embeddings" in refused.message
    made.close()


def test_a_step_is_interrupted_between_its_runs_and_within_one(folder: Path) -> None:
    model = Model(folder / tiny_onnx.FILE)
    made = Onnx(model, Settings(slots=2, context=512, batch=512, device="cpu"))
    made.step([Row(0, 0, list(b"before"), 0)])
    want = made.step([Row(1, 0, list(b"y" * 50), 1)]).copy()
    made.truncate(1, 0)
    run, calls = made._run, []

    def impatient(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            made.interrupt()
        run(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "_run", impatient)
        with pytest.raises(StepInterrupted):
            made.step([Row(0, 6, [5], 0), Row(1, 0, list(b"y" * 50), 1)])
    assert made._lengths == [6, 0]
    np.testing.assert_allclose(made.step([Row(1, 0, list(b"y" * 50), 1)]), want, atol=1e-5)
    made.step([Row(0, 6, [5], 1)])
    # Within a run: the flag is set by another thread, which needs the interpreter's lock meanwhile.
    stop = threading.Event()

    def nag() -> None:
        while not stop.is_set():
            made.interrupt()
            time.sleep(0)

    thread = threading.Thread(target=nag)
    thread.start()
    try:
        interrupted = False
        for _ in range(200):
            try:
                made.truncate(0, 0)
                made.step([Row(0, 0, list(b"z" * 500), 1)])
            except StepInterrupted:
                interrupted = True
                break
    finally:
        stop.set()
        thread.join()
    assert interrupted
    made.close()


@pytest.mark.parametrize("candidates", [0, 8])
def test_texts_of_about_one_length_are_begun_in_one_run(tmp_path: Path, candidates: int) -> None:
    def opened() -> tuple[Onnx, list[tuple[int, int]]]:
        made = Onnx(Model(tiny_onnx.write(tmp_path, candidates=candidates)), SMALL)
        ran: list[tuple[int, int]] = []
        run = made._run
        made._run = lambda one: ran.append((one.width, len(one.totals))) or run(one)  # type: ignore[method-assign]
        return made, ran

    def best(found: Any) -> list[int]:
        return [int(one.ids[0] if isinstance(one, Candidates) else one.argmax()) for one in found]

    texts = [list(text) for text in (b"a first text", b"second text", b"third", b"the fourth text")]
    made, ran = opened()
    few = bool(candidates)
    rows = [Row(slot, 0, text, int(slot != 1), few) for slot, text in enumerate(texts)]
    got = best(made.step(rows))
    # The third is too short to go with the others, and parts the fourth from them.
    assert ran == [(12, 2), (5, 1), (15, 1)]
    for slot in range(4):
        made.truncate(slot, 0)
    ran.clear()
    again = best(made.step([rows[0], rows[3], Row(1, 0, texts[1], 1, few)]))
    assert ran == [(12, 2), (15, 1)]
    alone, ran = opened()
    want = [best(alone.step([Row(slot, 0, text, 1, few)]))[0] for slot, text in enumerate(texts)]
    assert (got, again) == ([want[0], want[2], want[3]], [want[0], want[3], want[1]])
    # What lay behind the shorter one is not seen.
    after = [made.step([Row(1, len(texts[1]), [7], 1)]), alone.step([Row(1, len(texts[1]), [7], 1)])]
    np.testing.assert_allclose(after[0][0], after[1][0], atol=1e-5)
    made.close()
    alone.close()


def test_rows_that_need_few_logits_get_candidates(tmp_path: Path) -> None:
    made = Onnx(Model(tiny_onnx.write(tmp_path, candidates=8)), SMALL)
    assert made.info.candidates == 8
    text = list(b"abcd")
    want = made.step([Row(0, 0, text, 4), Row(1, 0, text[:1], 1)]).copy()
    for slot in (0, 1):
        made.truncate(slot, 0)
    got = made.step([Row(0, 0, text, 4, few=True), Row(1, 0, text[:1], 1)])
    # Each run by itself: the second one's row wants all.
    np.testing.assert_array_equal(got[4], want[4])
    for row, whole in zip(got[:4], want[:4], strict=True):
        assert isinstance(row, Candidates)
        best = np.argsort(-whole, kind="stable")[:8]
        np.testing.assert_array_equal(row.ids, best)
        np.testing.assert_array_equal(row.logits, whole[best])
    # One row that needs all gives all to those of its run.
    both = made.step([Row(0, 4, [5], 1, few=True), Row(1, 1, [5], 1)])
    assert np.isfinite(both).all()
    made.close()


@pytest.mark.parametrize("vocabulary", [40, 1000, 1024])
def test_candidates_of_a_long_row_are_found_in_groups(vocabulary: int) -> None:
    shape = ["batch", "outputs", vocabulary]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "logits"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["logits"])], "head", [x], [y])
    add_candidates(graph, 4)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    # Many of them equal; the last tokens among the largest.
    logits = np.random.default_rng(0).integers(-9, 9, (3, 2, vocabulary)).astype(np.float32)
    logits[0, 0, -3:], logits[0, 1] = 9, -np.inf
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values, ids = session.run(list(CANDIDATES), {"x": logits})
    want = np.argsort(-logits, axis=2, kind="stable")[:, :, :4]
    np.testing.assert_array_equal(values, np.take_along_axis(logits, want, axis=2))
    np.testing.assert_array_equal(ids[np.isfinite(values)], want[np.isfinite(values)])


@pytest.mark.parametrize(
    ("given", "few"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "ignore_eos": True}, True),
        ({"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 1}, True),
        ({"temperature": 1.0, "top_k": 64, "seed": 2}, True),
        ({"temperature": 1.0, "top_k": 64, "seed": 2, "ignore_eos": True}, False),
        ({"temperature": 1.0, "top_p": 0.9, "seed": 3}, False),
        ({"temperature": 0.0, "repetition_penalty": 1.3}, False),
        ({"temperature": 0.0, "logit_bias": {97: 5.0}}, False),
        ({"temperature": 0.0, "logprobs": 0}, False),
        ({"temperature": 0.0, "constraint": Constraint("regex", "[ab]{20}")}, False),
    ],
)
def test_candidates_give_the_same_tokens(tmp_path: Path, given: dict[str, Any], few: bool) -> None:
    def run(candidates: int) -> tuple[list[list[int]], set[bool]]:
        path = tiny_onnx.write(tmp_path / str(candidates), candidates=candidates)
        made = Onnx(Model(path), SMALL, extra_stop_ids=frozenset({tiny_onnx.END}))
        desk, ran, asked, step = Desk(made), [], set(), made.step

        def watched(rows: Any) -> Any:
            ran.extend([row.slot, row.pos, *row.tokens] for row in rows)
            asked.update(row.few for row in rows)
            return step(rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made, "step", watched)
            for key in range(3):
                desk.submit(key, f"number {key}", max_tokens=24, **given)
            desk.run()
        made.close()
        return ran, asked

    (want, _), (got, asked) = run(0), run(64)
    assert got == want
    assert asked == {few}


def test_a_mask_is_that_of_its_rows_whatever_came_before() -> None:
    mask, draw = Mask(slots=4, context=100), np.random.default_rng(7)
    totals, wide = [1], set[int]()
    for _ in range(2000):
        # Mostly one token more for each row; now and then other rows, or a piece of a prompt.
        if draw.random() < 0.05 or max(totals) > 100:
            totals = draw.integers(1, 101, draw.integers(1, 5)).tolist()
        exact = bool(draw.random() < 0.1)
        rows, width = mask.set(list(totals), exact=exact)
        grid = mask.buffer.array[: rows * width].reshape(rows, width)
        assert (grid == (np.arange(width) < np.array(totals)[:, None])).all()
        assert max(totals) <= width <= (max(totals) if exact else 100)
        wide |= set() if exact else {width}
        totals = [total + int(draw.integers(0, 2)) for total in totals]
    # Decoding keeps to few widths, so that what is bound stays so.
    assert wide == {64, 100}


def test_another_precision_of_the_cache_gives_float32_logits(tmp_path: Path) -> None:
    # What the backend makes of 16-bit logits, without a model that computes in them.
    made = Onnx(Model(tiny_onnx.write(tmp_path)), SMALL)
    want = made.step([Row(0, 0, list(b"ab"), 2)]).copy()
    buffers = made._outputs._buffers[False]
    buffers["logits"] = Buffer(buffers["logits"].array.astype(np.float16))
    made._outputs._narrow = True
    made.truncate(0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "_run", lambda *given: None)
        got = made.step([Row(0, 0, list(b"ab"), 2)])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=0.05)
    made.close()
