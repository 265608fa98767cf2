"""Several artefacts behind one server: loaded when asked for, within a memory budget, oldest out.

A model is known by its id, never by a path of the client's. Each loaded one has an engine process of its own.
A reload loads the artefact anew beside the running one and swaps them; streams that run end on the old one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge.artefact.find import Artefact
from edge.backends.base import BackendInfo
from edge.engine.client import EngineProcess
from edge.engine.worker import Load
from edge.errors import EdgeError, RequestError
from edge.server.metrics import Metrics
from edge.server.served_model import Serving

if TYPE_CHECKING:
    from starlette.requests import Request

log = logging.getLogger("edge")

# How long an engine that was swapped out or unloaded may go on with what it has begun.
RETIRE_S = 600.0
_SWEEP_S = 0.5


@dataclass(frozen=True, slots=True)
class Planned:
    """How an artefact is to be loaded now. bytes: what it will take, by the estimate."""

    load: Load
    artefact: Artefact | None = None
    bytes: int = 0


@dataclass(eq=False)
class Known:
    """An artefact that can be served. plan: looks at its path afresh; raises EdgeError.

    used: when it was last asked for, expires: when it is unloaded (None: never), both on time.monotonic().
    """

    name: str
    plan: Callable[[], Planned]
    serving: Serving | None = None
    bytes: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    used: float = 0.0
    expires: float | None = None
    keep_alive: float | None = None
    loading: asyncio.Task[Serving] | None = None

    def ready(self) -> BackendInfo:
        """What is loaded. Raises RequestError (503) where nothing is."""
        if self.serving is not None:
            return self.serving.ready
        if self.loading is not None:
            raise RequestError("the model is being loaded", status=503, code="model_loading", retry_after=1.0)
        raise RequestError(
            f"{self.name} is not loaded; a request for it loads it", status=503, code="model_unloaded"
        )

    @property
    def digest(self) -> str:
        return self.serving.digest if self.serving else ""


class Registry:
    """The models of a server. budget: bytes that loaded ones may take together (None: no bound).

    keep_alive: seconds that an idle model stays loaded (None: for good).
    """

    def __init__(
        self,
        models: dict[str, Callable[[], Planned]],
        *,
        default: str | None = None,
        budget: int | None = None,
        keep_alive: float | None = None,
    ) -> None:
        assert models
        self.metrics = Metrics()
        self._known = {name: Known(name, plan, keep_alive=keep_alive) for name, plan in models.items()}
        self.default = default if default is not None else next(iter(models))
        assert self.default in self._known
        self._budget = budget
        self._keep_alive = keep_alive
        self._retired: set[asyncio.Task[None]] = set()
        self._room = asyncio.Lock()
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def names(self) -> list[str]:
        return list(self._known)

    @property
    def loaded(self) -> list[Known]:
        return [known for known in self._known.values() if known.serving is not None]

    def known(self, name: str | None) -> Known:
        """The model of that id; without one, the default. Raises RequestError (404)."""
        known = self._known.get(self.default if name is None else name)
        if known is None and name is not None and name.endswith(":latest"):
            # Ollama's clients add this to every name.
            known = self._known.get(name.removesuffix(":latest"))
        if known is None:
            served = ", ".join(f"'{one}'" for one in self._known)
            raise RequestError(
                f"the model '{name}' is not served here; {served} {'is' if len(self._known) == 1 else 'are'}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return known

    def start(self) -> asyncio.Task[Serving]:
        """Begin to load the default model; the task ends when it is ready, or raises EdgeError."""
        self._sweeper = asyncio.create_task(self._sweep())
        return self._load(self.known(None))

    async def take(self, name: str | None, *, keep_alive: float | None = None) -> Serving:
        """The model of that id, loaded first where it is not.

        keep_alive: seconds that it stays loaded after this request, negative for good; None: as configured.
        Raises RequestError: 404 for an unknown id, 503 where it cannot be loaded or has no room now.
        """
        known = self.known(name)
        self._touch(known, keep_alive)
        if known.serving is not None:
            return known.serving
        if known.loading is None:
            await self._make_room(known)
        if known.serving is not None:
            return known.serving
        task = known.loading or self._load(known)
        try:
            # A client that goes away must not end the loading for others.
            serving = await asyncio.shield(task)
        except EdgeError as error:
            raise _failed(error) from error
        self._touch(known, keep_alive)
        return serving

    async def unload(self, name: str | None) -> asyncio.Task[None] | None:
        """Let go of a model; what it is answering it may finish. The task ends with its process."""
        known = self.known(name)
        if known.serving is None:
            return None
        serving, known.serving = known.serving, None
        known.bytes = 0
        return self._retire(serving.engine)

    async def reload(self, name: str | None) -> tuple[str, str]:
        """Load the artefact anew and swap it in; the digests before and after.

        Running streams end on the engine that they began on. Raises RequestError where the new one cannot be
        loaded; the old one then goes on.
        """
        known = self.known(name)
        if known.loading is not None:
            await asyncio.wait([known.loading])
        old = known.serving
        before = old.digest if old else ""
        known.loading = asyncio.create_task(self._open(known))
        try:
            serving = await asyncio.shield(known.loading)
        except EdgeError as error:
            raise _failed(error) from error
        finally:
            known.loading = None
        if old is not None:
            self._retire(old.engine)
        return before, serving.digest

    async def close(self, seconds: float) -> None:
        """End every engine, each within `seconds`."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = [known.loading for known in self._known.values() if known.loading is not None]
        for task in [*tasks, *self._retired]:
            task.cancel()
        await asyncio.gather(*tasks, *self._retired, return_exceptions=True)
        await asyncio.gather(*(known.serving.engine.stop(seconds) for known in self.loaded if known.serving))

    def _touch(self, known: Known, keep_alive: float | None) -> None:
        if keep_alive is not None:
            known.keep_alive = keep_alive if keep_alive >= 0 else None
        known.used = time.monotonic()
        known.expires = None if known.keep_alive is None else known.used + known.keep_alive

    def _load(self, known: Known) -> asyncio.Task[Serving]:
        async def load() -> Serving:
            try:
                return await self._open(known)
            finally:
                known.loading = None
                if known.serving is None:
                    known.bytes = 0

        known.loading = asyncio.create_task(load())
        # Somebody waits for it, or the server ends: an error is never lost, and must not be warned about.
        known.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return known.loading

    async def _open(self, known: Known) -> Serving:
        """A new engine for `known`, ready, put in place of the one before."""
        try:
            planned = await asyncio.to_thread(known.plan)
        except OSError as error:
            raise EdgeError(f"{error.filename}: {error.strerror}", "check the artefact's path") from error
        engine = EngineProcess(planned.load, on_done=lambda done: self.metrics.ended(known.name, done))
        serving = Serving(planned.artefact, engine, known.name)
        engine.start()
        try:
            await engine.wait_ready()
        except BaseException:
            await engine.stop(0.0)
            raise
        known.serving, known.bytes = serving, planned.bytes
        self._touch(known, None)
        return serving

    async def _make_room(self, wanted: Known) -> None:
        """Unload what was asked for longest ago until `wanted` fits, and begin to load it.

        Raises RequestError (503) where there is no room for it.
        """
        if self._budget is None:
            return
        async with self._room:
            if wanted.serving is not None or wanted.loading is not None:
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
            while sum(known.bytes for known in self._known.values()) + need > self._budget:
                idle = [k for k in self.loaded if k.serving and not k.serving.engine.busy]
                if not idle:
                    raise RequestError(
                        f"no room for {wanted.name} now: the loaded models are at work",
                        status=503,
                        code="memory_budget",
                        retry_after=5.0,
                    )
                oldest = min(idle, key=lambda k: k.used)
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
            for known in self.loaded:
                assert known.serving is not None
                if known.expires is None:
                    continue
                if known.serving.engine.busy:
                    self._touch(known, None)
                elif time.monotonic() >= known.expires:
                    log.info("unloading %s: idle for its keep_alive", known.name)
                    await self.unload(known.name)


async def serving_for(request: Request, model: str | None) -> Serving:
    """The model that a request asks for, loaded. Raises RequestError (see `Registry.take`)."""
    registry: Registry = request.app.state.registry
    serving = await registry.take(model)
    request.state.model = serving.name
    return serving


def _failed(error: EdgeError) -> RequestError:
    return RequestError(str(error), status=503, code="model_failed")
