"""The Protocol's promises and the engine over it, for every backend: fake, llama.cpp, ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge import messages as msg
from edge.backends.base import Backend, Row
from edge.backends.fake import FakeBackend
from tests import desk
from tests.plans import Plan, params, plans

SLOTS, CONTEXT, BATCH = 4, 128, 64
Make = Callable[..., Backend]


@pytest.fixture(scope="module", params=["fake", "llamacpp", "onnx", "onnx-device"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Makes backends of one kind with `slots`, `context`, `batch`."""
    made: list[Backend] = []
    # S16: native code must open a path that is not ASCII.
    folder = tmp_path_factory.mktemp("模型 目录")
    defaults = {"slots": SLOTS, "context": CONTEXT, "batch": BATCH}
    if request.param == "fake":
        build: Callable[[dict[str, int]], Backend] = lambda given: FakeBackend(**given)  # noqa: E731
    elif request.param == "llamacpp":
        pytest.importorskip("llama_cpp")
        from edge.backends.llamacpp import LlamaCpp, Model, Settings
        from tests import tiny_llama

        model = Model(tiny_llama.write(folder / "тест.gguf"))

        def build(given: dict[str, int]) -> Backend:
            return LlamaCpp(model, Settings(capacity=given["slots"] * given["context"], **given))
    else:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
        from edge.backends import onnx, onnx_providers
        from edge.backends.onnx_device import DeviceRows
        from tests import tiny_onnx

        class OnTheProcessor(DeviceRows):
            def __init__(self, runtime: Any, provider: str, device: str, **given: Any) -> None:
                super().__init__(runtime, provider, "cpu", **given)

        exported = onnx.Model(tiny_onnx.write(folder, name="тест.onnx"))

        if request.param == "onnx-device":
            # A device's memory, allotted and copied as a card's is, but the processor's.
            patch = pytest.MonkeyPatch()
            open_session = onnx_providers.open_session
            patch.setattr(
                onnx_providers,
                "open_session",
                lambda *given, **more: dataclasses.replace(open_session(*given, **more), memory="host"),
            )
            patch.setattr(onnx, "DeviceRows", OnTheProcessor)
            request.addfinalizer(patch.undo)

        def build(given: dict[str, int]) -> Backend:
            return onnx.Onnx(exported, onnx.Settings(**given, device="cpu"))

    def backend(**given: int) -> Backend:
        made.append(build({**defaults, **given}))
        return made[-1]

    yield backend
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def shared(make: Make) -> Backend:
    return make()


@pytest.fixture
def backend(shared: Backend) -> Backend:
    for slot in range(SLOTS):
        shared.truncate(slot, 0)
    return shared


def ids(backend: Backend, text: str) -> list[int]:
    return backend.encode(text, special=False)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, atol=2e-3)


# -- the Protocol ------------------------------------------------------------------------------------------


def test_text_goes_to_tokens_and_back(backend: Backend) -> None:
    text = "a  3\n你好👩‍🚀\0!"
    assert b"".join(backend.decode(token) for token in ids(backend, text)) == text.encode()
    assert all(0 <= token < backend.info.vocab for token in ids(backend, text))


def test_chunks_batches_and_outputs_give_the_same_logits(backend: Backend) -> None:
    prompt = ids(backend, "the quick brown fox")
    whole = backend.step([Row(0, 0, prompt, len(prompt))]).copy()
    assert whole.shape == (len(prompt), backend.info.vocab)
    assert whole.dtype == np.float32
    backend.step([Row(1, 0, prompt[:7], 0), Row(2, 0, ids(backend, "other"), 1)])
    rows = [Row(2, 5, ids(backend, "x"), 1), Row(1, 7, prompt[7:], 2), Row(3, 0, ids(backend, "third"), 0)]
    mixed = backend.step(rows)
    assert mixed.shape == (3, backend.info.vocab)
    close(mixed[1:], whole[-2:])


def test_slots_of_unequal_length_in_one_step(backend: Backend) -> None:
    texts = ["a", "abcdefgh", "the quick brown fox", "xyz"]
    alone = []
    for text in texts:
        alone.append(backend.step([Row(0, 0, ids(backend, text), 1)]).copy()[0])
        backend.truncate(0, 0)
    for slot, text in enumerate(texts):
        if len(text) > 1:
            backend.step([Row(slot, 0, ids(backend, text)[:-1], 0)])
    # In another order than the slots', with one that is not asked for its logits.
    rows = [
        Row(slot, len(texts[slot]) - 1, ids(backend, texts[slot])[-1:], int(slot != 1))
        for slot in (2, 0, 3, 1)
    ]
    close(backend.step(rows), [alone[slot] for slot in (2, 0, 3)])


def test_idle_slots_between_busy_ones_keep_their_tokens(backend: Backend) -> None:
    text = ids(backend, "abcdefgh")
    whole = backend.step([Row(1, 0, text, 1)]).copy()
    backend.truncate(1, 7)
    backend.step([Row(0, 0, ids(backend, "left"), 0), Row(3, 0, ids(backend, "right"), 0)])
    for at in range(40):
        backend.step([Row(3, 5 + at, text[:1], 1), Row(0, 4 + at, text[:1], 1)])
    close(backend.step([Row(1, 7, text[7:], 1)]), whole)


def test_a_full_slot_is_not_written_over_by_its_neighbours(backend: Backend) -> None:
    text = ids(backend, "ab" * (CONTEXT // 2))
    for at in range(0, CONTEXT - 1, 60):
        backend.step([Row(1, at, text[at : min(at + 60, CONTEXT - 1)], 0)])
    want = backend.step([Row(1, CONTEXT - 1, text[-1:], 1)]).copy()
    backend.step([Row(0, 0, text[:3], 0), Row(2, 0, text[:5], 0)])
    for at in range(3):
        backend.step([Row(0, 3 + at, text[:1], 1), Row(2, 5 + at, text[:1], 1)])
    backend.truncate(1, CONTEXT - 1)
    close(backend.step([Row(1, CONTEXT - 1, text[-1:], 1)]), want)


def test_copy_and_truncate(backend: Backend) -> None:
    prompt = ids(backend, "abcdefgh")
    whole = backend.step([Row(0, 0, prompt, 1)]).copy()
    backend.step([Row(1, 0, ids(backend, "zzz"), 0)])
    backend.copy(0, 1, 5)
    close(backend.step([Row(1, 5, prompt[5:], 1)]), whole)
    backend.truncate(0, 3)
    close(backend.step([Row(0, 3, prompt[3:], 1)]), whole)
    backend.truncate(0, 0)
    close(backend.step([Row(0, 0, prompt, 1)]), whole)
    for src, dst, n in ((0, 0, 1), (0, 1, 99)):
        with pytest.raises(ValueError):
            backend.copy(src, dst, n)
    with pytest.raises(ValueError):
        backend.truncate(0, 9)


def test_cells_are_saved_and_restored(backend: Backend) -> None:
    prompt = ids(backend, "abcdefgh")
    whole = backend.step([Row(0, 0, prompt, 1)]).copy()
    backend.truncate(0, 7)
    cells = backend.save(0)
    assert backend.restore(2, cells, 7)
    close(backend.step([Row(2, 7, prompt[7:], 1)]), whole)
    with pytest.raises(ValueError, match="restore"):
        backend.restore(2, cells, 7)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Row(0, 0, [], 0)],
        [Row(SLOTS, 0, [5], 1)],
        [Row(-1, 0, [5], 1)],
        [Row(0, 1, [5], 1)],
        [Row(0, 0, [5], 2)],
        [Row(0, 0, [10**6], 1)],
        [Row(0, 0, [-1], 1)],
        [Row(0, 0, [5], 1), Row(0, 1, [5], 1)],
        [Row(0, 0, [5] * (BATCH + 1), 1)],
    ],
)
def test_what_would_end_the_process_is_refused_first(backend: Backend, rows: list[Row]) -> None:
    with pytest.raises(ValueError):
        backend.step(rows)
    backend.step([Row(0, 0, [5], 1)])


# -- the engine over it -------------------------------------------------------------------------------------


class Desk(desk.Desk):
    """Its backend's slots are emptied before, and are all free afterwards."""

    def __init__(self, backend: Backend, **options: Any) -> None:
        for slot in range(backend.info.slots):
            backend.truncate(slot, 0)
        super().__init__(backend, **options)

    def run(self, turns: int = 10_000) -> None:
        super().run(turns)
        assert self.engine.cache.busy == 0

    def one_by_one(self, prompts: list[str], **given: Any) -> list[str]:
        for key, prompt in enumerate(prompts):
            self.submit(key, prompt, **given)
            while self.engine._jobs or not self.engine._inbox.empty():
                self.engine.turn()
        self.run()
        return [self.text(key) for key in range(len(prompts))]


def test_s4_batched_requests_get_what_each_would_get_alone(backend: Backend) -> None:
    prompts = [f"repeat the number {k} " * (1 + k % 3) for k in range(9)]
    alone = Desk(backend).one_by_one(prompts, temperature=0.0, max_tokens=24)
    desk = Desk(backend)
    for key, prompt in enumerate(prompts):
        desk.submit(key, prompt, temperature=0.0, max_tokens=24)
    desk.run()
    assert [desk.text(key) for key in range(9)] == alone
    assert len(set(alone)) > 5


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.lists(plans, min_size=1, max_size=7), st.booleans())
def test_any_interleaving_gives_what_each_would_get_alone(
    backend: Backend, todo: list[Plan], speculate: bool
) -> None:
    desk = Desk(backend, speculate=speculate)
    for turn in range(21):
        for key, plan in enumerate(todo):
            if plan.arrival == turn:
                desk.submit(key, plan.prompt, **params(plan, key))
            if plan.cancel == turn:
                desk.engine.cancel(key)
        desk.engine.turn()
    desk.run()
    for key, plan in enumerate(todo):
        alone = Desk(backend, speculate=False)
        alone.submit(key, plan.prompt, **params(plan, key))
        alone.run()
        want, done = alone.made(key), desk.done(key)
        if done.reason == "cancelled":
            assert desk.made(key) == want[: len(desk.made(key))]
        else:
            assert desk.made(key) == want
            assert (done.reason, done.completion_tokens) == (
                alone.done(key).reason,
                alone.done(key).completion_tokens,
            )


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
def test_s1_streams_join_to_the_whole(backend: Backend, limit: int) -> None:
    desk = Desk(backend, flush_s=0.0)
    desk.submit(1, "你好", max_tokens=limit, temperature=0.0, ignore_eos=True, logprobs=0)
    desk.run()
    assert desk.text(1) == b"".join(desk.made(1)).decode("utf-8", "replace")
    assert desk.done(1).completion_tokens == limit


def test_s5_the_context_is_a_limit_that_is_told(backend: Backend) -> None:
    desk = Desk(backend)
    desk.submit(1, "x" * 300)
    desk.submit(2, "abcd", temperature=0.0, ignore_eos=True)
    desk.run()
    [refused] = [e for e in desk.events if isinstance(e, msg.Refused)]
    assert (refused.key, refused.status, refused.code) == (1, 400, "context_length_exceeded")
    done = desk.done(2)
    assert (done.reason, done.prompt_tokens + done.completion_tokens) == ("length", CONTEXT)


def test_s6_s7_a_prefix_is_reused_and_changes_nothing(backend: Backend) -> None:
    desk = Desk(backend)
    texts = desk.one_by_one(["system prompt " * 5 + "q"] * 3, temperature=0.0, max_tokens=8)
    assert texts[0] == texts[1] == texts[2]
    whole = desk.done(0).prompt_tokens
    assert [desk.done(key).cached_tokens for key in range(3)] == [0, whole - 1, whole - 1]


def test_cancel_frees_the_slot_within_one_step_in_every_phase(backend: Backend) -> None:
    desk = Desk(backend)
    for key in range(SLOTS + 1):
        desk.submit(key, "a" * 100, ignore_eos=True)
    desk.engine.turn()
    desk.engine.cancel(SLOTS)
    desk.engine.cancel(0)
    desk.engine.turn()
    assert desk.done(SLOTS).completion_tokens == 0
    assert desk.done(0).reason == "cancelled"
    for _ in range(20):
        desk.engine.turn()
    for key in range(1, SLOTS):
        desk.engine.cancel(key)
    desk.engine.turn()
    assert desk.engine.cache.busy == 0


def test_speculation_keeps_the_text(backend: Backend) -> None:
    def run(speculate: bool, **given: Any) -> Desk:
        desk = Desk(backend, speculate=speculate)
        desk.submit(1, "abcabcabcabcabc", max_tokens=60, ignore_eos=True, logprobs=0, **given)
        desk.run()
        return desk

    for sampling in ({"temperature": 0.0}, {"temperature": 0.7, "seed": 3}):
        assert run(True, **sampling).made(1) == run(False, **sampling).made(1)
