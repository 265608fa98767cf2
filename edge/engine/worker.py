"""The engine in a process of its own: `python -m edge.engine.worker`, started by edge.engine.client.

It reads one line of JSON from standard input (where to connect, what to load), connects back, loads the
model and serves frames until it has to drain. Standard input stays open as a lifeline: when it ends, the HTTP
process is gone and this one ends too. One thread (the main one) owns the model.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge.backends.base import Backend, BackendInfo
from edge.engine import protocol as msg
from edge.engine import tokenize
from edge.engine.core import Engine
from edge.engine.prefix_ram import PrefixRam
from edge.engine.prefix_store import PrefixStore
from edge.engine.request import check_ids, prompt_tokens
from edge.engine.tokenize import TokenizerThread
from edge.errors import EdgeError, RequestError

if TYPE_CHECKING:
    from edge.artefact.find import Artefact
    from edge.backends import llamacpp, onnx

# Characters or ids of a request that is read within milliseconds.
_QUICK = 2**14


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker loads: a backend's kind, a file, its settings and the engine's options.

    tune: measure on this machine what the settings leave open, or take what was measured before.
    store: a folder that keeps prefixes over restarts ("": none), up to store_mib. cache_ram: bytes for
    prefixes that had to leave their slot. lora: an adapter as GGUF, applied to the model ("": none). digest:
    the artefact's, if known. why: how the backend was chosen.
    """

    kind: str
    path: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    stop_ids: list[int] = field(default_factory=list)
    max_queue: int = 256
    speculate: bool = True
    tune: bool = False
    store: str = ""
    store_mib: int = 1024
    cache_ram: int = 0
    digest: str = ""
    lora: str = ""
    why: str = ""

    @classmethod
    def of(cls, artefact: Artefact, settings: llamacpp.Settings | onnx.Settings, **options: Any) -> Load:
        """How to load an artefact as it was planned."""
        return cls(
            kind=artefact.kind,
            path=str(artefact.path),
            settings=asdict(settings),
            stop_ids=sorted(artefact.stop_ids),
            digest=artefact.digest,
            lora=str(artefact.lora or ""),
            **options,
        )


def open_backend(load: Load) -> Backend:
    """The backend that `load` names. Raises EdgeError where it cannot be loaded."""
    if load.kind == "fake":
        from edge.backends.fake import FakeBackend

        return FakeBackend(**load.settings)
    if load.kind == "onnx":
        return _open_onnx(load)
    return _open_llamacpp(load)


def _open_llamacpp(load: Load) -> Backend:
    """With smaller batches, then with fewer layers on the GPU, where its memory turns out to hold no more."""
    from edge.backends.llamacpp import LlamaCpp, MemoryFullError, Model, Settings
    from edge.loading import tune_llamacpp

    planned = settings = msgspec.convert(load.settings, Settings)
    lora = Path(load.lora) if load.lora else None
    while True:
        model = None
        try:
            model = Model(
                Path(load.path), gpu_layers=settings.gpu_layers, extra_buffers=settings.extra_buffers
            )
            tuned = tune_llamacpp.settings(model, settings) if load.tune else settings
            return LlamaCpp(model, tuned, extra_stop_ids=frozenset(load.stop_ids), lora=lora)
        except MemoryFullError:
            # Imported late: a start that goes well needs neither.
            from edge.artefact.gguf_shards import read_whole
            from edge.loading.load_plan import BATCH

            if model is not None:
                model.close()
            layers = settings.gpu_layers
            if layers < 0:
                layers = read_whole(Path(load.path)).block_count + 1
            if layers and settings.batch > BATCH:
                settings = replace(settings, batch=BATCH)
            elif layers > 1:
                why = f"{planned.why}; its memory turned out to hold {layers - 1} layers"
                settings = replace(settings, gpu_layers=layers - 1, why=why)
            else:
                raise


def _open_onnx(load: Load) -> Backend:
    from edge.backends import onnx
    from edge.loading import tune_onnx

    settings = msgspec.convert(load.settings, onnx.Settings)
    model = onnx.Model(Path(load.path))
    if load.tune:
        settings = tune_onnx.settings(model, settings)
    return onnx.Onnx(model, settings, extra_stop_ids=frozenset(load.stop_ids))


def open_store(load: Load, info: BackendInfo) -> PrefixStore | None:
    """The stored prefixes of this model, build and cache layout; None where none are to be kept."""
    if not load.store:
        return None
    # A file without a manifest is identified by its size and time.
    stat = Path(load.path).stat() if load.path else None
    model = load.digest or (f"{stat.st_size}-{stat.st_mtime_ns}" if stat else load.kind)
    if load.lora:
        stat = Path(load.lora).stat()
        model += f" with {load.lora} {stat.st_size}-{stat.st_mtime_ns}"
    layout = {name: value for name, value in info.settings.items() if name != "tuned"}
    facts = json.dumps([model, info.kind, layout], sort_keys=True)
    key = hashlib.sha256(facts.encode("utf-8")).hexdigest()
    return PrefixStore(Path(load.store), key, load.store_mib * 2**20)


class Link:
    """The socket to the HTTP process. `send` may be called from any thread."""

    def __init__(self, address: tuple[str, int], secret: str) -> None:
        self._socket = socket.create_connection(address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self._socket.makefile("rb")
        self._lock = threading.Lock()
        self._socket.sendall(bytes.fromhex(secret))

    def send(self, events: list[msg.Event]) -> None:
        frame = msg.pack(events)
        with self._lock:
            self._socket.sendall(frame)

    def receive(self) -> msg.ToEngine | None:
        """The next request; None when the other side has closed."""
        head = self._reader.read(4)
        size = msg.frame_length(head) if len(head) == 4 else 0
        body = self._reader.read(size)
        return msg.unpack_request(body) if size and len(body) == size else None


class Router:
    """Reads requests and routes them, on a thread that does nothing else: what has to be tokenized waits on
    a tokenizer's thread, where it can be cancelled.
    """

    def __init__(self, link: Link, engine: Engine, backend: Backend) -> None:
        self._link, self._engine, self._backend = link, engine, backend
        # One for what is done within milliseconds, one for what may not be: a text of megabytes is read by a
        # single call of native code, and so is a constraint compiled.
        self._quick, self._slow = (
            TokenizerThread(self._tokenize, self._refuse, engine.cancel) for _ in range(2)
        )

    @property
    def busy(self) -> bool:
        return self._quick.busy or self._slow.busy

    def run(self) -> None:
        """Until the other side has closed."""
        while (request := self._link.receive()) is not None:
            match request:
                case msg.Cancel(key):
                    error = RequestError("cancelled", status=499, code="client_closed")
                    if not (self._quick.end(key, error) or self._slow.end(key, error)):
                        self._engine.cancel(key)
                case msg.Drain(seconds):
                    self._drain(seconds)
                case msg.Ping():
                    self._link.send([msg.Pong()])
                case _:
                    compiled = isinstance(request, msg.Submit) and request.constraint is not None
                    thread = self._slow if compiled or request.size > _QUICK else self._quick
                    thread.put(request, request.size)
        self._drain(0.0)

    def _drain(self, seconds: float) -> None:
        for thread in (self._quick, self._slow):
            thread.close(RequestError("the server is shutting down", status=503, code="shutting_down"))
        self._engine.drain(seconds)

    def _refuse(self, key: int, error: RequestError) -> None:
        self._link.send([msg.Refused.of(key, error)])

    def _tokenize(self, request: msg.ToTokenize, arrived: float, check: Callable[[], None]) -> None:
        try:
            match request:
                case msg.Submit():
                    self._engine.submit(request, arrived, check)
                case msg.Embed():
                    self._engine.embed(request, check)
                case _:
                    ids = self._ids(request, check)
                    pieces = [self._backend.decode(token) for token in ids]
                    self._link.send([msg.Encoded(request.key, ids, pieces)])
        except RequestError as error:
            self._refuse(request.key, error)
        except Exception as error:  # this thread serves the other requests, too
            traceback.print_exc()
            self._refuse(request.key, RequestError(f"internal error: {error}", status=500, code="internal"))

    def _ids(self, request: msg.Encode | msg.Decode, check: Callable[[], None]) -> list[int]:
        if isinstance(request, msg.Decode):
            check_ids(request.ids, self._backend.info.vocab, "tokens")
            return request.ids
        if request.whole:
            return prompt_tokens(self._backend, request.text, special=request.special, check=check)
        return tokenize.encode(self._backend, request.text, special=request.special, check=check)


def _end_with_parent() -> None:
    # Not through sys.stdin: its lock would be held by this thread when the interpreter ends.
    while os.read(0, 4096):
        pass
    # The model's threads may be in native code: nothing is left to save, so end at once.
    os._exit(0)


def main() -> int:
    faulthandler.enable()
    # Ctrl-C and a service's stop reach the whole group; the HTTP process decides how to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # What every model needs, while the one who orders is still planning.
    from edge.loading import tune_llamacpp  # noqa: F401

    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    order = json.loads(line)
    try:
        link = Link((order["host"], order["port"]), order["secret"])
    except OSError as error:
        sys.stderr.write(f"error: the server that this engine was started for does not answer: {error}\n")
        return 1
    threading.Thread(target=_end_with_parent, daemon=True).start()
    load = Load(**order["load"])
    began = time.monotonic()
    try:
        backend = open_backend(load)
    except EdgeError as error:
        link.send([msg.Failed(error.message, error.hint)])
        return error.exit_code
    store = open_store(load, backend.info)
    engine = Engine(
        backend,
        link.send,
        max_queue=load.max_queue,
        speculate=load.speculate,
        store=store,
        ram=PrefixRam(load.cache_ram),
    )
    chosen = {"chosen": load.why} if load.why else {}
    info = replace(backend.info, settings={**backend.info.settings, **chosen})
    link.send([msg.Ready(info, time.monotonic() - began)])
    router = Router(link, engine, backend)
    threading.Thread(target=router.run, name="router", daemon=True).start()
    try:
        engine.run()
    except EdgeError as error:
        # A step failed, maybe for lack of memory: the state it left in native code is unknown.
        link.send([msg.Failed(error.message, error.hint, again=True)])
        return error.exit_code
    backend.close()
    if router.busy:
        # Native code would go on while the interpreter ends.
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
