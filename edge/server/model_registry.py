"""Several models behind one server: loaded when asked for, within a memory budget, oldest out.

Clients name a model by its id, never by a path. Each loaded model has an engine process of its own. A reload
loads the artefact anew beside the running engine and swaps the two; running streams end on the old one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from edge.artefact.find import Artefact
from edge.backends.base import BackendInfo
from edge.engine.client import EngineProcess, Worker
from edge.engine.worker import Load
from edge.errors import EdgeError, RequestError
from edge.server.metrics import Metrics
from edge.server.served_model import ServedModel, loading

log = logging.getLogger("edge")

# How long an engine that was swapped out or unloaded may finish what it has begun.
RETIRE_S = 600.0
_SWEEP_S = 0.5
# How often an awaited export is looked for, and how often one that did not fit is planned again.
_LOOK_S, _REPLAN_S = 1.0, 15.0


@dataclass(frozen=True, slots=True)
class Planned:
    """How an artefact is to be loaded now. bytes: the estimated memory that it takes. begun: who loads it."""

    load: Load
    artefact: Artefact | None = None
    bytes: int = 0
    begun: Worker | None = None


@dataclass(eq=False)
class ModelEntry:
    """A model that can be served. plan: reads its path afresh; raises EdgeError.

    served: the loaded model, or None. used: when it was last asked for; expires: when it is unloaded (None:
    never); both on time.monotonic(). created: Unix time. absent: why there is no model to load yet, where it
    is waited for.
    """

    name: str
    plan: Callable[[], Planned]
    served: ServedModel | None = None
    bytes: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    used: float = 0.0
    expires: float | None = None
    keep_alive: float | None = None
    loading: asyncio.Task[ServedModel] | None = None
    absent: str = ""

    @property
    def status(self) -> str:
        """loading, ready, failed, waiting or unloaded."""
        if self.served is not None:
            return self.served.engine.state
        return "loading" if self.loading is not None else "waiting" if self.absent else "unloaded"

    @property
    def digest(self) -> str:
        return self.served.digest if self.served else ""

    def ready(self) -> BackendInfo:
        """What the engine has loaded. Raises RequestError (503) where there is none."""
        self.check_exported()
        if self.served is not None:
            return self.served.ready
        if self.loading is not None:
            raise loading()
        raise RequestError(
            f"{self.name} is not loaded; a request for it loads it", status=503, code="model_unloaded"
        )

    def check_exported(self) -> None:
        """Raise RequestError (503) while an export is waited for."""
        if self.status == "waiting":
            text = f"no model is served yet; waiting for an export: {self.absent}"
            raise RequestError(text, status=503, code="model_waiting", retry_after=_REPLAN_S)

    def touch(self, keep_alive: float | None = None) -> None:
        """Note a use. keep_alive: seconds from now on, negative for good; None keeps what holds."""
        if keep_alive is not None:
            self.keep_alive = keep_alive if keep_alive >= 0 else None
        self.used = time.monotonic()
        self.expires = None if self.keep_alive is None else self.used + self.keep_alive


class Registry:
    """The models of a server. budget: bytes that the loaded ones may take together (None: no bound).

    keep_alive: seconds that an idle model stays loaded (None: for good). accept_any: an unknown id means the
    default model. awaited: the default model may not be there yet; what this gives changes with it.
    """

    def __init__(
        self,
        models: dict[str, Callable[[], Planned]],
        *,
        default: str | None = None,
        budget: int | None = None,
        keep_alive: float | None = None,
        accept_any: bool = False,
        awaited: Callable[[], object] | None = None,
    ) -> None:
        assert models
        self._accept_any = accept_any
        self._awaited = awaited
        self.metrics = Metrics()
        self.entries = {name: ModelEntry(name, plan, keep_alive=keep_alive) for name, plan in models.items()}
        self.default = default if default is not None else next(iter(models))
        assert self.default in self.entries
        self._budget = budget
        self._retired: set[asyncio.Task[None]] = set()
        self._room = asyncio.Lock()
        self._sweeper: asyncio.Task[None] | None = None
        self._first: asyncio.Task[ServedModel] | None = None

    @property
    def first(self) -> ModelEntry:
        """The default model."""
        return self.entries[self.default]

    @property
    def engines(self) -> dict[str, EngineProcess]:
        """The engine of each loaded model."""
        return {name: entry.served.engine for name, entry in self.entries.items() if entry.served is not None}

    def exported(self) -> list[ModelEntry]:
        """Every model that can be asked for. Raises RequestError (503) while an export is waited for."""
        self.first.check_exported()
        return [*self.entries.values()]

    def entry(self, name: str | None) -> ModelEntry:
        """The model of that id; without one, the default.

        Raises RequestError: 404 for an unknown id, 503 while the first export is waited for.
        """
        self.first.check_exported()
        if name is None:
            return self.first
        # Ollama's clients add the tag to every name.
        entry = self.entries.get(name) or self.entries.get(name.removesuffix(":latest"))
        if entry is None and self._accept_any:
            return self.first
        if entry is None:
            names = ", ".join(f"'{served}'" for served in self.entries)
            raise RequestError(
                f"the model '{name}' is not served here; {names} {'is' if len(self.entries) == 1 else 'are'}",
                status=404,
                code="model_not_found",
                param="model",
                hint="ask for it by that id; --accept-any-model takes every id for a single model",
            )
        return entry

    def start(self) -> asyncio.Task[ServedModel]:
        """Begin to load the default model, or to wait for it.

        The task ends when the model is ready, or raises EdgeError for one that is not awaited.
        """
        self._sweeper = asyncio.create_task(self._sweep())
        if self._awaited is not None:
            self.first.absent = "it is looked for"
            self._first = asyncio.create_task(self._load_when_exported(self.first, self._awaited))
            return self._first
        return self._load(self.first)

    async def take(self, name: str | None, *, keep_alive: float | None = None) -> ServedModel:
        """The model of that id, loaded first where it is not.

        keep_alive: seconds that it stays loaded after this request, negative for good; None: as configured.
        Raises RequestError: 404 for an unknown id, 503 where it cannot be loaded or has no room now.
        """
        entry = self.entry(name)
        entry.touch(keep_alive)
        if entry.served is None and entry.loading is None:
            await self._make_room(entry)
        if entry.served is not None:
            return entry.served
        served = await _loaded(entry.loading or self._load(entry))
        entry.touch(keep_alive)
        return served

    async def unload(self, name: str | None) -> asyncio.Task[None] | None:
        """Take a model out; it may finish its running answers. The task ends with its process."""
        entry = self.entry(name)
        if entry.served is None:
            return None
        served, entry.served, entry.bytes = entry.served, None, 0
        return self._retire(served.engine)

    async def reload(self, name: str | None) -> tuple[str, str]:
        """Load the artefact anew and swap it in; the digests before and after.

        Running streams end on the engine that they began on. Raises RequestError where the new one cannot be
        loaded; the old one then stays.
        """
        entry = self.entry(name)
        if entry.loading is not None:
            await asyncio.wait([entry.loading])
            entry.check_exported()
        old, before = entry.served, entry.digest
        served = await _loaded(self._load(entry))
        if old is not None:
            self._retire(old.engine)
        return before, served.digest

    async def close(self, seconds: float) -> None:
        """End every engine, each within `seconds`."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        loads = [entry.loading for entry in self.entries.values() if entry.loading is not None]
        tasks: list[asyncio.Task[ServedModel] | asyncio.Task[None]] = [*loads, *self._retired]
        if self._first is not None:
            tasks.append(self._first)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(engine.stop(seconds) for engine in self.engines.values()))

    async def _load_when_exported(self, entry: ModelEntry, exported: Callable[[], object]) -> ServedModel:
        """Load the model once it is there. What cannot be loaded is logged, and another export waited for."""
        seen, again, logged = None, 0.0, ""
        while True:
            state = await asyncio.to_thread(exported)
            if state != seen or time.monotonic() >= again:
                seen, again = state, time.monotonic() + _REPLAN_S
                try:
                    planned = await _plan(entry)
                    # What ended an engine would end it again.
                    again = math.inf
                    assert planned.artefact is not None
                    entry.name = self.default = planned.artefact.name
                    self.entries = {entry.name: entry}
                    served = await self._load(entry, planned)
                    entry.absent = ""
                    return served
                except EdgeError as error:
                    entry.absent = str(error)
                    # Counts and sizes differ at each look.
                    if (new := re.sub(r"\d[\d,.]*", "0", entry.absent)) != logged:
                        log.warning("waiting for an export: %s", error)
                        logged = new
            await asyncio.sleep(_LOOK_S)

    def _load(self, entry: ModelEntry, planned: Planned | None = None) -> asyncio.Task[ServedModel]:
        async def load() -> ServedModel:
            try:
                return await self._open(entry, planned or await _plan(entry))
            finally:
                entry.loading = None
                if entry.served is None:
                    entry.bytes = 0

        entry.loading = asyncio.create_task(load())
        # Somebody waits for it, or the server ends: an error is never lost, and must not be warned about.
        entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return entry.loading

    async def _open(self, entry: ModelEntry, planned: Planned) -> ServedModel:
        """A new engine for `entry`, ready, put in place of the one before."""
        engine = EngineProcess(
            planned.load,
            on_done=lambda done: self.metrics.ended(entry.name, done),
            begun=planned.begun,
        )
        engine.start()
        try:
            await engine.wait_ready()
        except BaseException:
            await engine.stop(0.0)
            raise
        entry.served, entry.bytes = ServedModel(planned.artefact, engine, entry.name), planned.bytes
        entry.touch()
        return entry.served

    async def _make_room(self, wanted: ModelEntry) -> None:
        """Unload the models that were used longest ago until `wanted` fits, and begin to load it.

        Raises RequestError (503) where there is no room for it.
        """
        if self._budget is None:
            return
        async with self._room:
            if wanted.served is not None or wanted.loading is not None:
                return
            try:
                need = (await asyncio.to_thread(wanted.plan)).bytes
            except EdgeError as error:
                raise _failed(error) from error
            if need > self._budget:
                raise RequestError(
                    f"{wanted.name} needs about {need / 2**20:,.0f} MiB, the memory budget is "
                    f"{self._budget / 2**20:,.0f} MiB",
                    status=503,
                    code="memory_budget",
                )
            while sum(entry.bytes for entry in self.entries.values()) + need > self._budget:
                idle = [self.entries[name] for name, engine in self.engines.items() if not engine.busy]
                if not idle:
                    raise RequestError(
                        f"no room for {wanted.name} now: the loaded models are at work",
                        status=503,
                        code="memory_budget",
                        retry_after=5.0,
                    )
                oldest = min(idle, key=lambda entry: entry.used)
                log.info("unloading %s to make room for %s", oldest.name, wanted.name)
                ended = await self.unload(oldest.name)
                if ended is not None:
                    # Its memory must be free before the next one is planned and loaded.
                    await asyncio.shield(ended)
            wanted.bytes = need
            self._load(wanted)

    def _retire(self, engine: EngineProcess) -> asyncio.Task[None]:
        async def end() -> None:
            until = time.monotonic() + RETIRE_S
            try:
                while engine.busy and time.monotonic() < until:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            finally:
                await engine.stop(0.5)

        task = asyncio.create_task(end())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)
        return task

    async def _sweep(self) -> None:
        """Unload what has been idle for longer than its keep_alive."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            for name, engine in self.engines.items():
                entry = self.entries[name]
                if entry.expires is None:
                    continue
                if engine.busy:
                    entry.touch()
                elif time.monotonic() >= entry.expires:
                    log.info("unloading %s: idle for its keep_alive", name)
                    await self.unload(name)


def registry_of(request: Request) -> Registry:
    registry: Registry = request.app.state.registry
    return registry


async def served_model(request: Request, name: str | None, keep_alive: float | None = None) -> ServedModel:
    """The model that a request asks for, loaded; as `Registry.take`. The access log names it."""
    model = await registry_of(request).take(name, keep_alive=keep_alive)
    request.state.model = model.name
    return model


async def _plan(entry: ModelEntry) -> Planned:
    """How the model of `entry` is to be loaded now. Raises EdgeError."""
    try:
        return await asyncio.to_thread(entry.plan)
    except OSError as error:
        raise EdgeError(f"{error.filename}: {error.strerror}", "check the artefact's path") from error


async def _loaded(task: asyncio.Task[ServedModel]) -> ServedModel:
    """The result of a load. A client that leaves does not end it for others."""
    try:
        return await asyncio.shield(task)
    except EdgeError as error:
        raise _failed(error) from error


def _failed(error: EdgeError) -> RequestError:
    return RequestError(str(error), status=503, code="model_failed")
