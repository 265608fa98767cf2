"""Minutes of disorderly clients: `python -m bench.soak PATH --minutes 10 --streams 16`.

Clients ask for answers of random length, streamed and not, and many leave at random: before the first token,
in its midst, or not at all. At the end every slot must be free, every request that stayed answered in full,
the engine never restarted, and memory where it was. Exit code 1 where any of that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.measure import workloads
from bench.measure.load import Ours, ask, get_json
from bench.servers.target import ours, started
from edge.console import guarded

PATIENCE_S = 120.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a run, a folder with a GGUF, or a .gguf file")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as logs, started(ours(args.path), Path(logs) / "edge.log") as server:
        result = asyncio.run(_soak(server.url, args.minutes * 60, args.streams, args.seed))
        result |= {
            "memory_end_mib": server.memory.steady(time.perf_counter() - 10) // 2**20,
            "memory_median_mib": server.memory.steady(server.started + 30) // 2**20,
        }
        if result["failed"]:
            sys.stderr.write(server.log_tail() + "\n")
    good = (
        not result["failed"] and not result["busy_slots"] and not result["waiting"] and not result["restarts"]
    )
    sys.stdout.write(json.dumps({"good": good, **result}, ensure_ascii=False) + "\n")
    return 0 if good else 1


async def _soak(url: str, seconds: float, streams: int, seed: int) -> dict[str, object]:
    until = time.perf_counter() + seconds
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[str] = []

    async def client(number: int) -> None:
        draw = random.Random(f"{seed}/{number}")
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            tokens = draw.choice([1, 3, 10, 30, 60])
            [job] = workloads.make(1, tokens, seed=seed, first=100_000 * number + turn)
            job = replace(job, reuse=draw.random() < 0.5, speculate=draw.random() < 0.5)
            if draw.random() < 0.4:
                asked = asyncio.create_task(ask(url, Ours({"stream": job.index % 2 == 0}), job))
                await asyncio.sleep(draw.choice([0.002, 0.01, 0.1, 0.5, 1.5]))
                asked.cancel()
                outcomes["left"] += 1
                continue
            sample = await ask(url, Ours(), job, client=number, limit=PATIENCE_S)
            outcomes[sample.state] += 1
            if sample.state != "ok":
                failures.append(sample.error or f"{sample.completion_tokens} of {sample.wanted} tokens")

    await asyncio.gather(*(client(number) for number in range(streams)))
    await asyncio.sleep(1.0)
    info = await get_json(url, "/info")
    state = {name: info[name] for name in ("busy_slots", "waiting", "restarts", "steps")}
    return {**outcomes, **state, "failed": len(failures), "failures": failures[:5]}


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
