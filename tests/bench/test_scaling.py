"""The simulation of replicas: what can be counted by hand, and two servers beside it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import scaling
from bench.scaling import Measured, Replica, Request
from edge.errors import InputError
from tests.support.fake_server import fake_server
from tests.support.ray_server import ray_server

ROOT = Path(__file__).parents[2]
# What the servers over the fake backend are told; seconds.
STEPS: dict[str, Any] = {"slots": 8, "context": 2048, "batch": 512, "step_s": 0.02, "token_s": 0.0002}
# Steps of 10 ms, and 10 ms for each row beyond the first; 1 ms for a prompt's token, 5 ms for HTTP.
ONE = Measured(slots=2, batch=512, step_s=[[1, 0.01], [2, 0.02]], prompt_token_s=0.001, first_s=0.015)


def test_one_client_waits_for_its_steps_alone() -> None:
    done = scaling.simulate([Replica(ONE)], scaling.alike(3, 20, 5), scaling.by_client, clients=1)
    each = 0.005 + 0.01 + 20 * 0.001 + 4 * 0.01
    rate, first = scaling.figures(done)
    assert rate == pytest.approx(1 / each) and first == pytest.approx(0.035)
    assert [one.key for one in done] == [1, 2, 3]


def test_slots_bound_what_runs_at_once_and_replicas_add_up() -> None:
    alone = scaling.simulate([Replica(ONE)], scaling.alike(40, 20, 50), scaling.by_client, clients=4)
    both = scaling.simulate(
        [Replica(ONE), Replica(ONE)], scaling.alike(80, 20, 50), scaling.by_client, clients=8
    )
    assert scaling.figures(both)[0] == pytest.approx(2 * scaling.figures(alone)[0], rel=0.05)
    # Four clients and two slots: half of the time goes by in the queue.
    assert scaling.figures(alone)[1] > 0.9
    busy = [sum(one.first <= other.first < one.end for one in alone) for other in alone]
    assert max(busy) == 2


def test_a_conversation_is_read_once_where_its_replica_knows_it() -> None:
    def first_tokens(known: int, route: scaling.Route) -> list[float]:
        turns = [Request(n, 100 * n, 2, start=float(n), conversation=7) for n in range(1, 5)]
        done = scaling.simulate([Replica(ONE, known), Replica(ONE, known)], turns, route)
        return [one.first - one.start for one in done]

    kept = first_tokens(1, scaling.by_conversation)
    assert kept[0] == pytest.approx(0.115) and max(kept[1:]) == pytest.approx(0.113)
    assert first_tokens(0, scaling.by_conversation)[-1] == pytest.approx(0.415)


def test_a_conversation_goes_elsewhere_while_its_replica_is_full() -> None:
    full = Replica(ONE, 1)
    full.running = [Request(1, 1, 1, 0.0), Request(2, 1, 1, 0.0)]
    free = Replica(ONE, 1)
    assert scaling.by_conversation(Request(3, 1, 1, 0.0, conversation=0), [full, free]) is free
    assert scaling.by_conversation(Request(3, 1, 1, 0.0, conversation=1), [full, free]) is free
    full.running.clear()
    assert scaling.by_conversation(Request(3, 1, 1, 0.0, conversation=0), [full, free]) is full


@pytest.mark.slow
def test_the_pages_table_is_what_the_command_prints(tmp_path: Path) -> None:
    """A file without its keys is refused."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    lines = scaling.table(ROOT / "docs" / "reports" / "scaling.json").splitlines()
    assert all(line in page for line in lines)
    (tmp_path / "x.json").write_text('{"places": [{"name": "x"}]}', encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.json"):
        scaling.table(tmp_path / "x.json")


@pytest.mark.matrix
@pytest.mark.timing
def test_two_servers_do_what_the_simulation_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the step times of this machine, and by those that were committed before the run."""
    with ExitStack() as stack:
        urls = [stack.enter_context(fake_server(reply="x" * 400, **STEPS)).url for _ in range(2)]
        measured = scaling.measure(urls[0])
        assert measured.slots == 8 and measured.step(8, 0) > 0.02
        assert scaling.main(["check", str(ROOT / "docs" / "reports" / "scaling-fake.json"), *urls]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["near"] and printed["requests"] == 128
        # It can fail: half as long steps are not what these servers have.
        path = tmp_path / "wrong.json"
        steps = [[rows, seconds / 2] for rows, seconds in measured.step_s]
        path.write_text(json.dumps(asdict(replace(measured, step_s=steps))), encoding="utf-8")
        assert scaling.main(["check", str(path), *urls]) == 1


@pytest.mark.matrix
@pytest.mark.timing
@pytest.mark.timeout(600)
def test_replicas_behind_one_entrance_do_what_the_simulation_says() -> None:
    """Ray's replicas, by the step times of one of them behind the same entrance: requests/s alone.

    The proxy adds to the first token's time under load what it does not add to a lone request's.
    """
    pytest.importorskip("ray")
    with ray_server(reply="x" * 400, replicas=[1, 1], max_queue=200, **STEPS) as one:
        measured = scaling.measure(one.url)
    with ray_server(reply="x" * 400, replicas=[2, 2], max_queue=200, **STEPS) as both:
        outcome = scaling.check(measured, [both.url], replicas=2)
    assert outcome["replicas"] == 2 and outcome["requests"] == 128
    assert abs(outcome["requests_per_s"]["ratio"] - 1) <= scaling.NEAR, outcome
    assert 0.4 < outcome["ttft_p50_s"]["ratio"] < 1 + scaling.NEAR, outcome
