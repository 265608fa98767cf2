"""What each step holds: streams first, prompts in chunks, first come first served, and never too much."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.backends.base import Row
from edge.backends.fake import FakeBackend
from edge.engine.kv_cache import KVCache
from edge.engine.prefill_budget import Newcomers
from edge.engine.scheduler import Scheduler, Sequence, Work


class Bench:
    """A scheduler over the fake backend, whose plans are carried out: every row that ends makes a token."""

    def __init__(self, *, slots: int = 4, batch: int = 32, capacity: int | None = None) -> None:
        self.backend = FakeBackend(slots=slots, context=64, batch=batch, capacity=capacity)
        self.cache = KVCache(self.backend)
        outputs = self.backend.info.outputs
        self.scheduler = Scheduler(self.cache, slots=slots, batch=batch, outputs=outputs)
        self.admitted: list[int] = []

    def add(self, key: int, prompt: list[int] | int, limit: int = 60, *, reuse: bool = True) -> Sequence:
        tokens = [key % 200] * prompt if isinstance(prompt, int) else prompt
        sequence = Sequence(key, tokens, limit, reuse=reuse)
        self.scheduler.add(sequence)
        return sequence

    def run(self, plan: list[Work]) -> None:
        self.admitted += sorted({work.sequence.key for work in plan} - set(self.admitted))
        rows = []
        for work in plan:
            sequence = work.sequence
            assert sequence.slot is not None
            tokens = sequence.tokens[sequence.computed : sequence.computed + work.n]
            rows.append(Row(sequence.slot, sequence.computed, tokens + work.draft, work.outputs))
        self.backend.step(rows)
        for work, row in zip(plan, rows, strict=True):
            sequence, ends = work.sequence, work.ends
            self.cache.extend(row.slot, row.tokens)
            sequence.computed += work.n
            # Drafts are always wrong here.
            self.cache.truncate(row.slot, sequence.computed)
            if ends:
                sequence.tokens.append(7)
                if len(sequence.tokens) >= sequence.limit:
                    self.scheduler.remove(sequence)

    def step(self, chunk: int = 32) -> list[Work]:
        plan = self.scheduler.plan(chunk)
        if plan:
            self.run(plan)
        return plan


requests = st.lists(
    st.tuples(
        st.integers(0, 10),  # the step before which it arrives
        st.lists(st.integers(1, 3), min_size=1, max_size=40),
        st.integers(1, 15),
        st.booleans(),
    ),
    min_size=1,
    max_size=9,
)


@settings(deadline=None, max_examples=150)
@given(
    requests,
    st.sampled_from([None, 64, 100]),
    st.sampled_from([4, 7, 32]),
    st.sampled_from([4, 16, 64]),
    st.integers(0, 3),
)
def test_every_plan_is_within_its_bounds_and_everything_ends(
    arrivals: list[tuple[int, list[int], int, bool]],
    capacity: int | None,
    batch: int,
    chunk: int,
    drafts: int,
) -> None:
    bench = Bench(batch=batch, capacity=capacity)
    todo = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    todo = [(key, arrival) for key, (_, arrival) in enumerate(todo)]
    for step in range(600):
        while todo and todo[0][1][0] <= step:
            key, (_, prompt, new, reuse) = todo.pop(0)
            bench.add(key, list(prompt), len(prompt) + new, reuse=reuse)
        before = [s for s in bench.scheduler.running if s.decoding]
        plan = bench.scheduler.plan(chunk, lambda _, most, rows: [7] * min(most, drafts))
        slots = [work.sequence.slot for work in plan]
        assert slots == sorted(set(slots))  # type: ignore[type-var]
        assert sum(work.n + len(work.draft) for work in plan) <= batch
        assert sum(work.outputs for work in plan) <= bench.backend.info.outputs
        # Streams that run never wait, but for one that had to step back.
        decoded = [work.sequence for work in plan if work.decodes]
        assert decoded == sorted((s for s in before if s.slot is not None), key=lambda s: s.slot or 0)
        assert all(work.n == 1 for work in plan if work.decodes)
        if not plan and not todo:
            break
        if plan:
            # Raises where the unified KV cache would overflow.
            bench.run(plan)
    assert not bench.scheduler.running and not bench.scheduler.waiting
    assert bench.admitted == sorted(bench.admitted)
    assert bench.cache.busy == 0


@pytest.mark.parametrize(("prompt", "pieces"), [(30, [30]), (31, [20, 11]), (50, [20, 30])])
def test_a_piece_that_would_be_left_is_read_with_the_rest(prompt: int, pieces: list[int]) -> None:
    bench = Bench(slots=2, batch=64)
    bench.add(1, prompt)
    assert [bench.step(20)[0].n for _ in pieces] == pieces


def test_no_prompt_is_read_where_the_budget_is_zero() -> None:
    bench = Bench()
    bench.add(1, 5)
    assert bench.scheduler.plan(0) == []
    assert bench.scheduler.load() == (0, Newcomers(1, 5, 1, 1))


def test_load_counts_streams_and_those_that_could_begin() -> None:
    bench = Bench(slots=2)
    first = bench.add(1, 4)
    bench.step()
    assert first.decoding
    for key in (5, 6, 7):
        bench.add(key, 10)
    # One slot is free: of those that wait only the first could take it.
    assert bench.scheduler.load() == (1, Newcomers(1, 10, 5, 5))
    bench.step(4)
    assert bench.scheduler.load() == (2 - 1, Newcomers(1, 6, 5, 5))


def test_what_prefix_reuse_saves_is_told_once() -> None:
    bench = Bench()
    first = bench.add(1, [5] * 10, 11)
    bench.step()
    second = bench.add(2, [5] * 10, 11)
    assert bench.step()[0].n == 1
    assert (first.cached, second.cached) == (0, 9)


def test_the_youngest_steps_back_where_cells_run_short() -> None:
    bench = Bench(slots=2, capacity=64)
    old, young = bench.add(1, 20, 60), bench.add(2, 20, 60)
    while not young.decoding:
        bench.step()
    while young.slot is not None:
        bench.step()
        assert len(old.tokens) + len(young.tokens) < 80
    assert old.slot is not None
    assert (young.computed, list(bench.scheduler.waiting)) == (0, [young])
    made = len(young.tokens)
    assert made > 20
    while bench.step():
        pass
    # It kept its text, and went on after the other had ended.
    assert len(old.tokens) == len(young.tokens) == 60


def test_drafts_go_before_anybody_steps_back() -> None:
    bench = Bench(slots=2, capacity=64)
    for key in (1, 2):
        bench.add(key, 30, 64, reuse=False)
    while not all(s.decoding for s in bench.scheduler.running) or len(bench.scheduler.running) < 2:
        bench.step()
    plan = bench.scheduler.plan(32, lambda _, most, rows: [7] * min(most, 3))
    assert [len(work.draft) for work in plan] == [0, 0]
    assert len(bench.scheduler.running) == 2


def test_a_removed_sequence_leaves_its_slot_in_whatever_phase() -> None:
    bench = Bench(slots=1)
    running, waiting = bench.add(1, 40), bench.add(2, 3)
    bench.step(8)
    assert (running.slot, waiting.slot, bench.cache.busy) == (0, None, 1)
    bench.scheduler.remove(waiting)
    bench.scheduler.remove(running, keep=False)
    assert bench.cache.busy == 0 and bench.cache.lengths == [0]
    assert bench.scheduler.plan(8) == []
