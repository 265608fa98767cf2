"""The step loop on the fake backend: whatever happens around a request, it gets what it would get alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import messages as msg
from edge.backends.fake import EOS, FakeBackend
from edge.pace import Newcomers, Pace
from edge.speculate import Lookup
from tests.desk import Desk
from tests.plans import Plan, params, plans


def spell(answer: str, prompt: str = "?") -> FakeBackend:
    """A backend that answers any prompt ending in `prompt` with `answer`."""
    return FakeBackend(reply=lambda ids: list(answer.encode()), context=256)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(plans, min_size=1, max_size=8),
    st.sampled_from([None, 48, 64, 100]),
    st.sampled_from([4, 7, 32]),
    st.booleans(),
)
def test_any_interleaving_gives_what_each_would_get_alone(
    todo: list[Plan], capacity: int | None, batch: int, speculate: bool
) -> None:
    desk = Desk(FakeBackend(slots=4, context=48, capacity=capacity, batch=batch), speculate=speculate)
    for turn in range(21):
        for key, plan in enumerate(todo):
            if plan.arrival == turn:
                desk.submit(key, plan.prompt, **params(plan, key))
            if plan.cancel == turn:
                desk.engine.cancel(key)
        desk.engine.turn()
    desk.run()
    assert desk.engine.cache.busy == 0
    for key, plan in enumerate(todo):
        alone = Desk(FakeBackend(slots=1, context=48), speculate=False)
        alone.submit(key, plan.prompt, **params(plan, key))
        alone.run()
        want = alone.made(key)
        done = desk.done(key)
        if done.reason == "cancelled":
            got = desk.made(key)
            assert got == want[: len(got)]
        else:
            assert desk.made(key) == want
            assert done.reason == alone.done(key).reason
            assert done.completion_tokens == alone.done(key).completion_tokens


def test_preemption_happens_and_loses_nothing() -> None:
    desk = Desk(FakeBackend(slots=4, context=40, capacity=48, batch=32))
    for key in range(4):
        desk.submit(key, [97 + key] * 8, max_tokens=20, temperature=0.0, ignore_eos=True)
    held = set()
    for _ in range(60):
        desk.engine.turn()
        held.add(len(desk.engine._scheduler.running))
    desk.run()
    assert len(held) > 1
    assert [desk.done(key).completion_tokens for key in range(4)] == [20] * 4


def test_s4_batched_requests_do_not_mix() -> None:
    desk = Desk(FakeBackend(slots=8, context=64, reply=lambda ids: [*(b"<" + bytes(ids[:1]) + b">")]))
    for key in range(8):
        desk.submit(key, str(key), max_tokens=20, temperature=0.0)
    desk.run()
    assert [desk.text(key) for key in range(8)] == [f"<{key}>" for key in range(8)]
    assert max(desk.backend.steps) >= 8


@pytest.mark.parametrize("limit", range(1, 21))
def test_s1_streams_join_to_the_whole(limit: int) -> None:
    whole = "你好👩‍🚀🇨🇳"
    desk = Desk(spell(whole), flush_s=0.0)
    desk.submit(1, "?", max_tokens=limit, temperature=0.0)
    desk.run()
    want = whole.encode()[:limit].decode("utf-8", "replace")
    assert desk.text(1) == want
    shown = [e.text for e in desk.events if isinstance(e, msg.Delta)]
    assert not any("\ufffd" in text for text in shown)


def test_s2_a_stop_string_ends_the_request_at_its_step() -> None:
    desk = Desk(spell("ABCDEFGHIJ"))
    desk.submit(1, "?", temperature=0.0, stop=["DEFG"])
    desk.run()
    done = desk.done(1)
    assert (desk.text(1), done.reason, done.stop, done.completion_tokens) == ("ABC", "stop", "DEFG", 7)


def test_s5_a_prompt_that_does_not_fit_is_refused_with_both_numbers() -> None:
    desk = Desk(FakeBackend(context=16))
    desk.submit(1, "x" * 300)
    refused = desk.refused(1)
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert "300" in refused.message
    assert "16" in refused.message


def test_the_context_ends_an_answer_without_max_tokens() -> None:
    desk = Desk(FakeBackend(context=32))
    desk.submit(1, "abcd", temperature=0.0, ignore_eos=True)
    desk.run()
    assert (desk.done(1).reason, desk.done(1).completion_tokens) == ("length", 28)


def test_s6_s7_a_prefix_is_reused_and_changes_nothing() -> None:
    desk = Desk(FakeBackend(slots=2, context=128))
    for key in range(3):
        desk.submit(key, "system prompt " * 5 + "q", max_tokens=8, temperature=0.0)
        while desk.engine._jobs or not desk.engine._inbox.empty():
            desk.engine.turn()
    desk.run()
    assert desk.text(0) == desk.text(1) == desk.text(2)
    assert [desk.done(key).cached_tokens for key in range(3)] == [0, 70, 70]
    assert sum(desk.backend.steps) < 71 + 2 * 1 + 3 * 8


def test_cancel_frees_the_slot_within_one_step_in_every_phase() -> None:
    desk = Desk(FakeBackend(slots=1, context=256, batch=16))
    desk.submit(1, "a" * 100)
    desk.engine.turn()
    desk.submit(2, "b")
    desk.engine.turn()
    for key in (2, 1):
        desk.engine.cancel(key)
    desk.engine.turn()
    assert desk.engine.cache.busy == 0
    assert desk.done(1).reason == desk.done(2).reason == "cancelled"
    assert desk.done(2).completion_tokens == 0
    desk.submit(3, "c", ignore_eos=True)
    for _ in range(5):
        desk.engine.turn()
    desk.engine.cancel(3)
    desk.engine.turn()
    assert desk.done(3).reason == "cancelled"
    assert desk.engine.cache.busy == 0


def test_a_long_prompt_never_stalls_a_running_stream() -> None:
    desk = Desk(FakeBackend(slots=2, context=512, batch=64), flush_s=0.0)
    desk.submit(1, "a", ignore_eos=True, max_tokens=400, temperature=0.0)
    for _ in range(5):
        desk.engine.turn()
    desk.submit(2, "b" * 300, max_tokens=4)
    for _ in range(5):
        before = sum(e.tokens for e in desk.events if isinstance(e, msg.Delta) and e.key == 1)
        desk.engine.turn()
        after = sum(e.tokens for e in desk.events if isinstance(e, msg.Delta) and e.key == 1)
        assert after > before
    desk.run()


def test_a_full_queue_is_refused_with_a_time_to_come_back() -> None:
    desk = Desk(FakeBackend(slots=1), max_queue=1)
    # One has a slot at once, one may wait.
    for key in range(4):
        desk.submit(key, "x", max_tokens=4, ignore_eos=True)
    desk.engine.turn()
    assert desk.refused(2).status == desk.refused(3).status == 429
    assert (desk.refused(2).retry_after or 0) >= 1
    desk.run()
    assert desk.done(0).reason == desk.done(1).reason == "length"


def test_first_come_first_served() -> None:
    desk = Desk(FakeBackend(slots=1, context=64))
    for key in range(5):
        desk.submit(key, [97 + key], max_tokens=3, ignore_eos=True)
    desk.run()
    assert [e.key for e in desk.events if isinstance(e, msg.Done)] == [0, 1, 2, 3, 4]


def test_a_deadline_ends_a_request_queued_or_running() -> None:
    now = [0.0]
    desk = Desk(FakeBackend(slots=1, context=512), clock=lambda: now[0])
    desk.submit(1, "x", ignore_eos=True, timeout_s=5.0)
    desk.submit(2, "y", timeout_s=3.0)
    for _ in range(4):
        desk.engine.turn()
    now[0] = 4.0
    desk.engine.turn()
    assert desk.done(2).reason == "timeout"
    now[0] = 6.0
    desk.engine.turn()
    assert desk.done(1).reason == "timeout"
    assert desk.engine.cache.busy == 0


def test_draining_refuses_newcomers_and_lets_the_others_finish() -> None:
    desk = Desk(FakeBackend(slots=1, context=64))
    desk.submit(1, "x", max_tokens=5, ignore_eos=True)
    desk.engine.turn()
    desk.engine.drain(100.0)
    desk.engine.turn()
    desk.submit(2, "y")
    desk.run()
    assert desk.done(1).completion_tokens == 5
    assert (desk.refused(2).status, desk.refused(2).code) == (503, "shutting_down")


def test_speculation_saves_steps_and_keeps_the_text() -> None:
    text = "the cat sat on the mat. " * 8

    def run(speculate: bool) -> Desk:
        desk = Desk(FakeBackend(context=512, reply=lambda ids: list(text.encode())), speculate=speculate)
        desk.submit(1, text + "?", temperature=0.0)
        desk.run()
        return desk

    plain, fast = run(False), run(True)
    assert plain.text(1) == fast.text(1) == text
    assert len(fast.backend.steps) < len(plain.backend.steps) / 3
    assert fast.done(1).accepted > 150


def test_speculation_pauses_where_it_does_not_pay() -> None:
    lookup = Lookup([1, 2, 3, 9, 1, 2, 3])
    tries = 0
    for _ in range(200):
        draft = lookup.draft(8)
        if draft:
            tries += 1
            lookup.learn(len(draft), 0)
    assert 1 < tries < 12


def test_a_sampled_text_is_the_same_with_and_without_speculation() -> None:
    def run(speculate: bool) -> list[bytes]:
        desk = Desk(FakeBackend(context=256), speculate=speculate)
        desk.submit(
            1, [97, 98, 99] * 10, temperature=1.0, seed=5, max_tokens=100, ignore_eos=True, logprobs=0
        )
        desk.run()
        return desk.made(1)

    assert run(True) == run(False)


def test_stop_ids_of_the_request_join_those_of_the_model() -> None:
    desk = Desk(spell("ab!cd"))
    desk.submit(1, "?", temperature=0.0, stop_ids=[ord("!")])
    desk.run()
    assert (desk.text(1), desk.done(1).reason) == ("ab", "stop")
    desk = Desk(spell("ab"))
    desk.submit(1, "?", temperature=0.0)
    desk.run()
    assert (desk.text(1), desk.done(1).completion_tokens) == ("ab", 3)
    assert EOS in desk.backend.info.stop_ids


def one(key: int = 1) -> Newcomers:
    return Newcomers(1, 2000, key, key)


def test_pace_bounds_what_a_prompt_adds_to_a_step() -> None:
    pace = Pace(512)
    pace.learn(4, 0, 0.080)
    pace.learn(0, 400, 2.0)
    assert pace.chunk(4, one()) == int(0.7 * 0.080 / 0.005)
    for _ in range(20):
        pace.learn(4, 16, 0.080 + 16 * 0.002)
    assert 26 <= pace.chunk(4, one()) <= 28
    assert pace.chunk(0, one()) == 80


def test_pace_lets_a_burst_go_first_to_its_last_prompt() -> None:
    pace = Pace(512)
    pace.learn(4, 0, 0.050)
    pace.learn(0, 400, 0.400)
    polite = int(0.7 * 0.050 / 0.001)
    assert pace.chunk(4, one(5)) == polite
    assert pace.chunk(12, Newcomers(2, 200, 6, 7)) == polite
    assert pace.chunk(4, Newcomers(2, 200, 8, 9)) == 400
    # The last of those two, beside many: still theirs; one that comes later is not.
    assert pace.chunk(12, one(9)) == 512
    assert pace.chunk(12, Newcomers(2, 200, 9, 10)) == 400
    assert pace.chunk(12, one(10)) == polite


def test_pace_reads_a_large_burst_in_larger_steps_within_a_bound() -> None:
    pace = Pace(4096)
    pace.learn(0, 400, 0.400)
    assert pace.chunk(0, Newcomers(8, 800, 1, 8)) == 400
    assert pace.chunk(0, Newcomers(8, 2000, 1, 8)) == 1000
    assert pace.chunk(1, Newcomers(8, 16000, 1, 8)) == 1500


def test_pace_knows_steps_of_each_width() -> None:
    pace = Pace(512)
    for rows, seconds in ((1, 0.010), (9, 0.050), (16, 0.070)):
        pace.learn(rows, 0, seconds)
    assert pace.quiet(5) == pytest.approx(0.030)
    assert (pace.quiet(1), pace.quiet(16), pace.quiet(32)) == (0.010, 0.070, 0.070)
    # A step that is short anyway may become as long as nobody feels.
    pace.learn(0, 100, 0.1)
    assert pace.chunk(1, one()) in (49, 50)
    # A lone stream at the end does not make the next crowd's steps look short.
    assert pace.chunk(16, one()) == int(0.7 * 0.070 / 0.001)
