"""Serving with little of a GPU's memory free, told nothing, beside llama-server with the layers set by hand.

The rest of the memory is taken by a process of its own. Both servers cannot be loaded at once there, so each
is started anew for each round, in turn. llama-server gets as many slots and KV cells as ours took.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from bench.engines import race, sides
from bench.engines.race import Case, Rates, Row
from bench.measure.load import get_json
from bench.servers.reference_servers import llama_server
from bench.servers.target import Target, ours, started
from edge.artefact.find import Artefact
from edge.errors import EdgeError, UnavailableError
from edge.machine import hardware

STREAMS = (1, 8)
# Layers by hand: around what ours took, up to where the memory ends.
_AROUND = (4, 3, 2, 1, 0, -1)
Measured = dict[int, Rates]


def rows(
    artefact: Artefact, caps: Sequence[float], logs: Path, console: Console, *, tokens: int, rounds: int
) -> Iterator[Row]:
    """Rows of each cap in GiB. Raises UnavailableError without an NVIDIA GPU."""
    if not hardware.gpus():
        raise UnavailableError("no NVIDIA GPU was found")
    for cap in caps:
        with _only(cap):
            yield from _capped(artefact, cap, logs, console, tokens=tokens, rounds=rounds)


@contextlib.contextmanager
def _only(gib: float) -> Iterator[None]:
    command = [sys.executable, "-m", "bench.measure.gpu_ballast_child", str(int(gib * 2**30))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ballast:
        assert ballast.stdin is not None and ballast.stdout is not None
        if not ballast.stdout.readline():
            raise EdgeError("the GPU's memory could not be taken")
        # Popen closes its input at the end, which ends it.
        yield


def _capped(
    artefact: Artefact, cap: float, logs: Path, console: Console, *, tokens: int, rounds: int
) -> Iterator[Row]:
    target = ours(artefact.path)
    with started(target, logs / "edge.log", watch=False) as server:
        about = asyncio.run(get_json(server.url, "/info"))
    settings, layers = about["settings"], int(about["settings"]["gpu_layers"])
    console.print(f"{cap:g} GiB: {about['slots']} slots, {about['kv_cells']} KV cells, {settings}")

    def by_hand(count: int) -> Target:
        return llama_server(
            artefact.path,
            slots=about["slots"],
            context=about["kv_cells"] // about["slots"],
            threads=hardware.cpu_threads(),
            flash_attention=settings["flash_attention"] == "on",
            gpu_layers=count,
            unified=settings["kv"] == "unified",
        )

    tried: dict[int, Measured] = {}
    for count in [99] if layers < 0 else [layers + more for more in _AROUND]:
        # More layers than fit end it before it is ready.
        with contextlib.suppress(EdgeError):
            tried[count] = _measure(by_hand(count), logs, tokens)
            console.print(f"{cap:g} GiB: llama-server, {count} layers: {tried[count][1].total:.1f} tokens/s")
    if not tried:
        raise EdgeError(f"llama-server starts with none of the layers around {layers}")
    results: dict[str, list[Measured]] = {}
    while len(results.get("llama-server", ())) < rounds:
        best = max(tried, key=lambda count: tried[count][1].total)
        results = {"edge": [], "llama-server": []}
        for _ in range(rounds):
            results["edge"].append(_measure(target, logs, tokens))
            try:
                results["llama-server"].append(_measure(by_hand(best), logs, tokens))
            except EdgeError:
                # It starts with so many, and its memory ends in the middle of an answer.
                console.print(f"{cap:g} GiB: llama-server ended while it answered with {best} layers")
                del tried[best]
                if not tried:
                    raise
                break
    for count in STREAMS:
        where = "all layers" if layers < 0 else f"{layers} layers"
        name = f"{cap:g} GiB free, {where} on the GPU, {count} streams"
        case = Case(name, (tokens,) * count, "total", (), 0, goals={"llama-server": 1.0})
        yield from race.rows(case, {side: [one[count] for one in all_] for side, all_ in results.items()})


def _measure(target: Target, logs: Path, tokens: int) -> Measured:
    with started(target, logs / f"{target.name}.log", watch=False) as server:
        side = sides.Server(server)
        side.run([], (8,))
        return {count: side.run([], (tokens,) * count) for count in STREAMS}
