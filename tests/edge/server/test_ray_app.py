"""Replicas by Ray Serve, as clients see them. What is counted here is printed: pytest -s."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from edge import __version__
from edge.artefact import manifest
from edge.errors import InputError, UnavailableError, UsageError
from edge.machine.hardware import free_port
from edge.server.ray_entrance import VALUE, VARIABLE
from tests.support import tiny_llama
from tests.support.fake_server import CHAT, CLIENT, ROOT, Server, error, events, launch, user
from tests.support.ray_server import ray_server, replicas

pytest.importorskip("ray")
# A Ray takes seconds to start, on a busy machine a minute.
# A cluster takes both cores for a while: these run alone.
pytestmark = [pytest.mark.slow, pytest.mark.timing, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    reply = "One answer of a thousand letters. " * 30
    with ray_server(reply=reply, context=1024, slots=4, step_s=0.01, max_queue=500) as started:
        until(lambda: len(sums(started, "edge_ready")) == 2)
        yield started


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def until(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.1)


def status(server: Server, path: str, key: str) -> int:
    with contextlib.suppress(httpx.HTTPError):
        return server.get(path, headers={"x-api-key": key}).status_code
    return 0


def sums(server: Server, metric: str, label: str = "replica") -> Counter[str]:
    """The values of a metric by one of its labels."""
    answer = server.get("/metrics")
    counts: Counter[str] = Counter()
    for labels, value in re.findall(rf"(?m)^{metric}{{(.*)}} (\S+)$", answer.text):
        counts[dict(re.findall(r'(\w+)="([^"]*)"', labels))[label]] += int(float(value))
    return counts


def counted(server: Server, metric: str, label: str) -> Counter[str]:
    """`sums` of what is over: replicas tell it once a second."""
    time.sleep(2.5)
    return sums(server, metric, label)


def idle(server: Server) -> bool:
    return not any((sums(server, "edge_running_requests") + sums(server, "edge_waiting_requests")).values())


def many(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, verify=False, timeout=120, limits=limits)


def test_all_replicas_are_asked_for_their_state(server: Server) -> None:
    assert server.get("/ready").json() == {"status": "ready", "model": "fake"}
    assert server.get("/health").json()["status"] == "ready"
    assert len(sums(server, "edge_kv_cells")) == 2
    refused = CLIENT.get(server.url + "/metrics", headers={"host": "evil.example"})
    assert (refused.status_code, error(refused)["code"]) == (403, "wrong_host")


def test_answers_and_errors_are_those_of_one_server(server: Server) -> None:
    body = {"messages": user(), "max_tokens": 8}
    answer = server.post(CHAT, body)
    assert answer.json()["choices"][0]["message"]["content"] == "One answ"
    assert len(answer.headers.get_list("x-request-id")) == 1
    pieces = events(server.post(CHAT, {**body, "stream": True}))
    assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces) == "One answ"
    refused = server.post(CHAT, {**body, "messages": []})
    assert (refused.status_code, error(refused)["param"]) == (400, "messages")
    assert server.post("/admin/reload", {}).status_code == 403


def talk(server: Server, conversations: int, turns: int, **headers: str) -> tuple[int, int]:
    """(prompt tokens, those that came from the KV cache) of conversations that go on in turn."""
    histories = [user(f"Question {number} of somebody. " * 2) for number in range(conversations)]
    usages = []
    for turn in range(turns):
        for number, history in enumerate(histories):
            given = {name: value.format(turn=turn, number=number) for name, value in headers.items()}
            answer = server.post(CHAT, {"messages": history, "max_tokens": 40}, headers=given).json()
            usages.append(answer["usage"])
            history += [answer["choices"][0]["message"], *user(f"And then, {turn}?")]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    return sum(usage["prompt_tokens"] for usage in usages), cached


@pytest.mark.matrix
def test_a_conversation_stays_with_the_replica_that_holds_its_prefix(server: Server) -> None:
    prompt, cached = talk(server, 4, 4)
    # A session of its own for each request: replicas by chance, as without affinity.
    scattered_prompt, scattered = talk(server, 4, 4, **{"x-session-id": "{number}-{turn}-by-chance"})
    say(f"affinity: {cached} of {prompt} prompt tokens cached; by chance {scattered} of {scattered_prompt}")
    # All but what each turn adds.
    assert cached > 0.6 * prompt
    assert scattered < cached


async def streams(url: str, count: int, seed: int) -> Counter[str]:
    """Streams of which some clients leave, at once or after some events: how each ended for its client."""
    chance = random.Random(seed)

    async def stream(client: httpx.AsyncClient, number: int) -> str:
        leaves = chance.choice([None, 0, 1, 3, 10])
        body = {"messages": user(f"stream {number}"), "max_tokens": 200, "stream": True}
        body["speculate"] = False
        read, last = 0, ""
        async with client.stream("POST", CHAT, json=body) as response:
            async for line in response.aiter_lines():
                if read == leaves:
                    return "left"
                read += line.startswith("data: ")
                last = line or last
        return "whole" if last == "data: [DONE]" else last

    async with many(url) as client:
        return Counter(await asyncio.gather(*(stream(client, number) for number in range(count))))


@pytest.mark.matrix
def test_clients_that_leave_leave_nothing_running(server: Server) -> None:
    count = 200
    before = counted(server, "edge_answers_total", "reason")
    ends = asyncio.run(streams(server.url, count, count))
    after = counted(server, "edge_answers_total", "reason") - before
    assert idle(server)
    say(f"{count} streams: clients {dict(ends)}, engines {dict(after)}")
    assert set(ends) <= {"left", "whole"} and ends.total() == count
    # A client may leave before its request has a replica; one that is gone may have been answered whole.
    assert 0 < after["cancelled"] <= ends["left"]
    assert ends["whole"] <= after.total() - after["cancelled"]
    assert after.total() <= count


async def asked_while(url: str, count: int, event: Any) -> list[tuple[str, int, str, httpx.Headers]]:
    """(kind, status, how it ended, headers) of requests around `event`, which runs while they do."""

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[str, int, str, httpx.Headers]:
        stream = number % 2 == 0
        # Two of one session, so that either kind is on each replica.
        body = {"messages": user(f"request {number // 2}"), "max_tokens": 80, "stream": stream}
        body["speculate"] = False
        answer = await client.post(CHAT, json=body)
        if answer.status_code != 200:
            return "json", answer.status_code, error(answer)["code"], answer.headers
        if not stream:
            return "json", 200, "whole", answer.headers
        codes = [row["error"]["code"] for row in events(answer) if "error" in row]
        return "stream", 200, codes[0] if codes else "whole", answer.headers

    async with many(url) as client:
        requests = [asyncio.create_task(ask(client, number)) for number in range(count)]
        await asyncio.to_thread(event)
        return list(await asyncio.gather(*requests))


@pytest.mark.matrix
def test_a_killed_replica_loses_what_it_had_begun_and_nothing_else() -> None:
    with ray_server(reply="a" * 200, context=1024, slots=4, step_s=0.05, max_queue=500) as server:
        until(lambda: len(sums(server, "edge_ready")) == 2)
        victim, *_ = replicas(server)

        def kill() -> None:
            until(lambda: sorted(sums(server, "edge_running_requests").values()) == [4, 4], 30)
            victim.kill()

        rows = asyncio.run(asked_while(server.url, 40, kill))
        ends = Counter((kind, status, end) for kind, status, end, _ in rows)
        say(f"40 requests, a replica of 4 slots killed: {dict(ends)}")
        lost = [row for row in rows if row[2] != "whole"]
        # Those that had a slot of it, and no other.
        assert 2 <= len(lost) <= 4 and {row[2] for row in lost} == {"replica_lost"}
        assert {(kind, status) for kind, status, *_ in lost} == {("json", 503), ("stream", 200)}
        assert {headers["retry-after"] for kind, _, _, headers in lost if kind == "json"} == {"1"}
        until(lambda: len(sums(server, "edge_ready")) == 2)
        until(lambda: idle(server), 10)
        assert victim.pid not in [process.pid for process in replicas(server)]


@pytest.mark.matrix
def test_an_end_waits_for_answers_and_names_what_it_tears_off() -> None:
    with ray_server(reply="abc " * 200, context=1024, slots=4, step_s=0.05, drain=2.0) as server:
        bodies: list[dict[str, Any]] = [
            {"messages": user(), "max_tokens": tokens, "stream": stream, "speculate": False}
            for tokens, stream in ((20, False), (700, True))
        ]
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(server.post, CHAT, body) for body in bodies]
            until(lambda: sums(server, "edge_running_requests").total() == 2, 10)
            server.process.send_signal(signal.SIGINT)
            short, long = (answer.result() for answer in answers)
        assert short.status_code == 200
        assert events(long)[-1]["error"]["code"] == "replica_lost"
        assert server.process.wait(60) == 0


@pytest.mark.matrix
def test_replicas_are_added_under_load() -> None:
    with ray_server(reply="abc " * 200, context=1024, slots=4, step_s=0.1, replicas=[1, 2]) as server:
        assert len(sums(server, "edge_ready")) == 1
        rows = asyncio.run(asked_while(server.url, 60, lambda: until(lambda: len(replicas(server)) == 2)))
        assert {(status, end) for _, status, end, _ in rows} == {(200, "whole")}


# Ray's own modules use what pydantic calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_config_says_is_checked_before_ray_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge.server import ray_app

    run = tiny_llama.publish(tmp_path / "run")
    command = [str(run), "--replicas", "2", "--threads", "1"]
    good = {"edge": __version__, "digest": manifest.read(run / "gguf").digest, "command": command}
    with pytest.raises(UnavailableError, match=f"start it with {VARIABLE}="):
        ray_app.application(good)
    monkeypatch.setenv(VARIABLE, VALUE)
    assert ray_app.application(good)
    for changed, kind, message in (
        ({"edge": "0.0.1"}, UsageError, "the config is of edge 0.0.1, this is"),
        ({"digest": "sha256:0"}, InputError, "holds another export than the config was written for"),
        ({"command": [str(run), "--no-such"]}, UsageError, "none of edge serve"),
        ({"command": [*command, "--host", "0.0.0.0"]}, UsageError, "reachable by others"),
        ({"command": [*command, "--api-key-file", "a"]}, UsageError, "Ray's proxy reads the keys too"),
        ({"command": [str(run), "--replicas", "4096"]}, UsageError, "each engine needs a core"),
    ):
        with pytest.raises(kind, match=message):
            ray_app.application({**good, **changed})


@pytest.mark.matrix
def test_a_real_model_by_the_command_line(tmp_path: Path) -> None:
    run = tiny_llama.publish(tmp_path / "运行 run")
    serve = [sys.executable, "-m", "edge.cli", "serve", str(run), "--port", "0", "--no-tune", "--ctx", "256"]
    with launch([*serve, "--replicas", "2", "--threads", "1"], EDGE_API_KEY="secret") as server:
        until(lambda: status(server, "/ready", "secret") == 200)
        assert server.get("/health").status_code == 200
        assert server.get("/metrics").status_code == 401
        answer = server.post("/generate", {"prompt": "hi", "max_tokens": 4}, headers={"x-api-key": "secret"})
        assert answer.headers["x-edge-digest"] == manifest.read(run / "gguf").digest
        engines = psutil.Process(server.process.pid).children(recursive=True)
        assert sum("edge.engine.worker" in process.cmdline() for process in engines) == 2
    psutil.wait_procs(engines, timeout=10)
    assert not [process for process in engines if process.is_running()]


# As the README of the export has it; a source tree beside that.
CLUSTER = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    VARIABLE: VALUE,
    "PYTHONPATH": str(ROOT),
}


def run_deploy(command: list[str], config: Path) -> bool:
    done = subprocess.run([*command, str(config)], env={**os.environ, **CLUSTER}, capture_output=True)
    return done.returncode == 0


@contextlib.contextmanager
def head(port: int) -> Iterator[None]:
    """A Ray that is not ours to start, as on a cluster's first machine. port: of its dashboard."""
    ports = {
        name: free_port() for name in ("--port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    }
    words = [word for name, value in ports.items() for word in (name, str(value))]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2"]
    command += ["--object-store-memory", str(80 * 2**20), "--dashboard-port", str(port), *words]
    process = subprocess.Popen(command, env={**os.environ, **CLUSTER}, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in processes:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.wait()


def publish_another(run: Path) -> None:
    """The same model with another digest, as a new export has."""
    with manifest.publish(run / "gguf") as partial:
        tiny_llama.write(partial / "微小.gguf")
        (partial / "new.txt").write_text("new", "utf-8")
        manifest.write(partial, manifest.Manifest("gguf", "微小", stop_ids=[2, 7]))


def write_config(run: Path, port: int) -> Path:
    """The config of `edge export deploy`, with two replicas on another port."""
    import yaml

    from convert.export import deploy

    config = deploy.run(run, "ray", overwrite=True) / "serve.yaml"
    values = yaml.safe_load(config.read_text("ascii"))
    values["http_options"]["port"] = port
    command = values["applications"][0]["args"]["command"]
    command[command.index("--replicas") + 1] = "2"
    command += ["--threads", "1", "--no-tune", "--ctx", "256", "--slots", "2"]
    config.write_text(yaml.safe_dump(values), "ascii")
    return config


@pytest.mark.matrix
def test_a_rolling_update_under_load(tmp_path: Path) -> None:
    run = tiny_llama.publish(tmp_path / "run")
    dashboard, port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    deploy = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", f"http://127.0.0.1:{dashboard}"]

    def digest() -> str | None:
        with contextlib.suppress(httpx.HTTPError):
            answer = CLIENT.post(url + "/generate", json={"prompt": "hi", "max_tokens": 1})
            return answer.headers.get("x-edge-digest")
        return None

    with head(dashboard):
        until(lambda: run_deploy(deploy, write_config(run, port)))
        until(lambda: digest() == manifest.read(run / "gguf").digest)
        before = manifest.read(run / "gguf").digest
        shutil.rmtree(run / "gguf")
        publish_another(run)
        after = manifest.read(run / "gguf").digest
        assert after != before
        counts = asyncio.run(under_load(url, lambda: update(deploy, write_config(run, port), digest, after)))
        say(f"requests around an update: {dict(counts)}")
        assert {status for status, _ in counts} == {200}
        assert {which for _, which in counts} == {before, after}


def update(command: list[str], config: Path, digest: Any, after: str) -> None:
    assert run_deploy(command, config)
    # Both replicas answer with the new one.
    until(lambda: {digest() for _ in range(12)} == {after})


async def under_load(url: str, event: Any) -> Counter[tuple[int, str]]:
    """(status, digest) of what four clients are answered while `event` runs."""
    counts: Counter[tuple[int, str]] = Counter()
    done = asyncio.Event()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            body = {"prompt": f"{number} {turn}", "max_tokens": 16, "stream": bool(turn % 2)}
            answer = await client.post("/generate", json=body)
            whole = "error" not in answer.text
            counts[answer.status_code if whole else 0, answer.headers.get("x-edge-digest", "")] += 1

    async with many(url) as client:
        clients = [asyncio.create_task(ask(client, number)) for number in range(4)]
        try:
            await asyncio.to_thread(event)
            await asyncio.sleep(1)
        finally:
            done.set()
        await asyncio.gather(*clients)
    return counts
