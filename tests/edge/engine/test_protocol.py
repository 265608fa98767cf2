"""Frames between the two processes: what goes in comes out, and no length is taken on trust."""

from __future__ import annotations

import pytest

from edge.backends.fake import FakeBackend
from edge.engine import protocol as msg
from edge.engine.grammar import Constraint
from edge.engine.sampling import Params
from edge.engine.thinking_budget import ReasoningOptions
from edge.errors import RequestError


@pytest.mark.parametrize(
    "request_",
    [
        msg.Submit(1, "你好", Params(temperature=0.5, logit_bias={3: 1.5}, stop=["a"]), timeout_s=2.0),
        msg.Submit(
            2,
            [1, 2, 3],
            Params(),
            constraint=Constraint("regex", "a+"),
            reasoning=ReasoningOptions(inside=True, budget=3),
        ),
        msg.Cancel(3),
        msg.Encode(4, "text", special=True, whole=True),
        msg.Decode(5, [1, 2]),
        msg.Embed(6, "text"),
        msg.Drain(1.5),
    ],
    ids=lambda request: type(request).__name__,
)
def test_requests_come_out_as_they_went_in(request_: msg.ToEngine) -> None:
    frame = msg.pack(request_)
    assert msg.frame_length(frame[:4]) == len(frame) - 4
    assert msg.unpack_request(frame[4:]) == request_


def test_the_events_of_a_step_share_a_frame() -> None:
    events: list[msg.Event] = [
        msg.Delta(1, "a", 1, [msg.Logprob(b"\xe4", -0.5, [(b"a", -1.0)])]),
        msg.Embedded(2, b"\x00\x01", 3),
        msg.Stats(running=1, step_s=0.5),
        msg.Ready(FakeBackend(chat_template="x").info, 1.5),
        msg.Failed("it cannot", "try this", again=True),
    ]
    assert msg.unpack_events(msg.pack(events)[4:]) == events


def test_a_refusal_is_the_same_error_on_the_other_side() -> None:
    error = RequestError("no", status=429, code="queue_full", param="messages", retry_after=2.5)
    [event] = msg.unpack_events(msg.pack([msg.Refused.of(7, error)])[4:])
    assert isinstance(event, msg.Refused) and event.key == 7
    other = event.error()
    for name in ("status", "code", "param", "retry_after"):
        assert getattr(other, name) == getattr(error, name)
    assert str(other) == str(error)


def test_a_frame_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msg, "MAX_FRAME", 100)
    with pytest.raises(ValueError, match="message of"):
        msg.pack(msg.Encode(1, "x" * 101, special=False))
    with pytest.raises(ValueError, match="frame of 101 bytes"):
        msg.frame_length((101).to_bytes(4, "little"))
    assert msg.frame_length((100).to_bytes(4, "little")) == 100
