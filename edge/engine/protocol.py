"""The messages between the HTTP process and the engine process: typed frames over a local socket.

A frame is a four-byte little-endian length and a msgpack body. Requests go one way, events the other; the
events of one step share a frame.
"""

from __future__ import annotations

import msgspec

from edge.backends.base import BackendInfo
from edge.engine.grammar import Constraint
from edge.engine.sampling import Params
from edge.engine.thinking_budget import ReasoningOptions
from edge.errors import RequestError
from edge.prompt import Prompt

MAX_FRAME = 64 * 2**20


class Submit(msgspec.Struct, tag="submit"):
    """Generate after `prompt`: a rendered one, a text (special: control tokens are parsed) or token ids.

    timeout_s: of the whole request, queue included. reuse: KV cells of earlier requests may serve its prefix.
    constraint: what the answer must match. speculate: whether prompt lookup may draft for it.
    reasoning: for a reasoning model, its thinking budget and where the constraint begins.
    """

    key: int
    prompt: str | list[int] | Prompt
    params: Params
    special: bool = True
    reuse: bool = True
    timeout_s: float | None = None
    constraint: Constraint | None = None
    speculate: bool = True
    reasoning: ReasoningOptions | None = None

    @property
    def size(self) -> int:
        """Characters or ids to be tokenized."""
        return len(self.prompt.text if isinstance(self.prompt, Prompt) else self.prompt)


class Cancel(msgspec.Struct, tag="cancel"):
    key: int


class Encode(msgspec.Struct, tag="encode"):
    """Token ids of `text`; whole: as a prompt of its own, begin token included."""

    key: int
    text: str | Prompt
    special: bool
    whole: bool = False

    @property
    def size(self) -> int:
        return len(self.text.text if isinstance(self.text, Prompt) else self.text)


class Decode(msgspec.Struct, tag="decode"):
    """The pieces of token ids; answered with Encoded."""

    key: int
    ids: list[int]

    @property
    def size(self) -> int:
        return len(self.ids)


class Embed(msgspec.Struct, tag="embed"):
    """The vector of a prompt (see Submit): answered with Embedded, or Refused."""

    key: int
    prompt: str | list[int]

    @property
    def size(self) -> int:
        return len(self.prompt)


class Drain(msgspec.Struct, tag="drain"):
    """Admit nothing more; end after `seconds` at the latest."""

    seconds: float


class Ping(msgspec.Struct, tag="ping"):
    """Answered with Pong at once, however long the model's step takes."""


# Requests that the tokenizer's thread handles.
ToTokenize = Submit | Encode | Decode | Embed
ToEngine = ToTokenize | Cancel | Drain | Ping


class Logprob(msgspec.Struct, array_like=True):
    """One token: its bytes, natural-log probability, and the best alternatives with theirs."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]


class Delta(msgspec.Struct, tag="delta"):
    """New text of a running request. tokens: how many were sampled since the last event."""

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

    @classmethod
    def of(cls, key: int, error: RequestError) -> Refused:
        return cls(key, error.status, error.code, str(error), error.param, error.retry_after)

    def error(self) -> RequestError:
        return RequestError(
            self.message,
            status=self.status,
            code=self.code,
            param=self.param,
            retry_after=self.retry_after,
        )


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
    """The model is loaded. load_s: seconds that it took."""

    info: BackendInfo
    load_s: float


class Failed(msgspec.Struct, tag="failed"):
    """The engine cannot load the model; or, with `again`, it cannot go on and is to be restarted."""

    message: str
    hint: str
    again: bool = False


class Stats(msgspec.Struct, tag="stats"):
    """The engine's gauges, sent when they change, at most a few times a second.

    kv_tokens: tokens in all slots. ram_bytes, ram_hits, ram_evictions: of the prefixes kept in RAM. steps,
    step_tokens, step_s: steps of the backend, their tokens, the seconds spent in them. up_s: seconds since
    the engine began.
    """

    running: int = 0
    waiting: int = 0
    busy_slots: int = 0
    kv_tokens: int = 0
    ram_bytes: int = 0
    ram_hits: int = 0
    ram_evictions: int = 0
    steps: int = 0
    step_tokens: int = 0
    step_s: float = 0.0
    up_s: float = 0.0


class Pong(msgspec.Struct, tag="pong"):
    """The engine's process is alive."""


Event = Pong | Delta | Done | Refused | Encoded | Embedded | Ready | Failed | Stats

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_events = msgspec.msgpack.Decoder(list[Event])


def pack(message: ToEngine | list[Event]) -> bytes:
    """A whole frame. Raises ValueError over MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes")
    return len(body).to_bytes(4, "little") + body


def frame_length(head: bytes) -> int:
    """The body's length from a frame's first four bytes. Raises ValueError over MAX_FRAME."""
    length = int.from_bytes(head, "little")
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    return length


def unpack_request(body: bytes) -> ToEngine:
    request: ToEngine = _to_engine.decode(body)
    return request


def unpack_events(body: bytes) -> list[Event]:
    return _events.decode(body)
