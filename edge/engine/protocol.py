"""What the HTTP process and the engine process say to each other: typed frames over a local socket.

A frame is a four-byte little-endian length and a msgpack body. Requests go one way, events the other; the
events of one step share a frame.
"""

from __future__ import annotations

import struct

import msgspec

from edge.engine.grammar import Constraint
from edge.engine.sampling import Params
from edge.engine.thinking_budget import ReasoningOptions

MAX_FRAME = 64 * 2**20
_LENGTH = struct.Struct("<I")


class Submit(msgspec.Struct, tag="submit"):
    """Generate after `prompt`: a text (special: control tokens are parsed) or token ids.

    timeout_s: the whole request, queue included. reuse: take over KV cells of requests before.
    constraint: what the answer must match. speculate: whether prompt lookup may draft for it.
    reasoning: a budget for its thought, and from where on the constraint rules.
    """

    key: int
    prompt: str | list[int]
    params: Params
    special: bool = True
    reuse: bool = True
    timeout_s: float | None = None
    constraint: Constraint | None = None
    speculate: bool = True
    reasoning: ReasoningOptions | None = None


class Cancel(msgspec.Struct, tag="cancel"):
    key: int


class Encode(msgspec.Struct, tag="encode"):
    """Token ids of `text`; whole: as a prompt of its own, begin token included."""

    key: int
    text: str
    special: bool
    whole: bool = False


class Decode(msgspec.Struct, tag="decode"):
    """The pieces of token ids; answered with Encoded."""

    key: int
    ids: list[int]


class Embed(msgspec.Struct, tag="embed"):
    """The vector of a prompt (see Submit): answered with Embedded, or Refused."""

    key: int
    prompt: str | list[int]


class Drain(msgspec.Struct, tag="drain"):
    """Admit nothing more; end after `seconds` at the latest."""

    seconds: float


ToEngine = Submit | Cancel | Encode | Decode | Embed | Drain


class Logprob(msgspec.Struct, array_like=True):
    """One token: its bytes, natural-log probability, and the best alternatives with theirs."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]


class Delta(msgspec.Struct, tag="delta"):
    """New text of a running request; tokens: how many were made since the last one."""

    key: int
    text: str
    tokens: int
    logprobs: list[Logprob] | None = None


class Done(msgspec.Struct, tag="done"):
    """The last event of a request. reason: stop, length, timeout or cancelled.

    queue_s, prefill_s, decode_s: seconds until it had a slot, until its first token, and after that.
    drafted, accepted: tokens proposed by speculation, and those that were right. reasoning_tokens: how many
    of the completion's tokens are reasoning; 0 for a request without ReasoningOptions.
    """

    key: int
    text: str
    tokens: int
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    stop: str | None = None
    drafted: int = 0
    accepted: int = 0
    reasoning_tokens: int = 0
    logprobs: list[Logprob] | None = None


class Refused(msgspec.Struct, tag="refused"):
    """A request that was not admitted: an HTTP status, a code and a message."""

    key: int
    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None


class Encoded(msgspec.Struct, tag="encoded"):
    key: int
    ids: list[int]
    pieces: list[bytes]


class Embedded(msgspec.Struct, tag="embedded"):
    """A text's vector: float32, little-endian, of length 1. tokens: how many it was made of."""

    key: int
    vector: bytes
    tokens: int


class Ready(msgspec.Struct, tag="ready"):
    """The model is loaded: what it is, where it runs, and how it was set."""

    kind: str
    name: str
    device: str
    why: str
    slots: int
    context: int
    capacity: int
    vocab: int
    stop_ids: list[int]
    bos_text: str
    eos_text: str
    add_bos: bool
    chat_template: str | None
    settings: dict[str, str]
    load_s: float
    embedding: int = 0


class Failed(msgspec.Struct, tag="failed"):
    """The engine cannot load, or (again) cannot go on and is started anew; what to know, and to do."""

    message: str
    hint: str
    again: bool = False


class Stats(msgspec.Struct, tag="stats"):
    """The engine's gauges, sent when they change, at most a few times a second.

    step_s: seconds spent in the backend's steps. up_s: seconds since the engine began.
    """

    running: int
    waiting: int
    busy_slots: int
    kv_tokens: int
    steps: int
    step_tokens: int
    step_s: float
    up_s: float


Event = Delta | Done | Refused | Encoded | Embedded | Ready | Failed | Stats

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_events = msgspec.msgpack.Decoder(list[Event])


def pack(message: ToEngine | list[Event]) -> bytes:
    """A whole frame. Raises ValueError over MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


def frame_length(head: bytes) -> int:
    """The body's length from a frame's first four bytes. Raises ValueError over MAX_FRAME."""
    length: int = _LENGTH.unpack(head)[0]
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    return length


def unpack_request(body: bytes) -> ToEngine:
    request: ToEngine = _to_engine.decode(body)
    return request


def unpack_events(body: bytes) -> list[Event]:
    return _events.decode(body)
