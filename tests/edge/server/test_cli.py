"""`edge serve` on a tiny real GGUF, as a user runs it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge.artefact import find, manifest
from edge.errors import EdgeError, InputError, UnavailableError, UsageError
from edge.server import cli
from tests.support import tiny_llama
from tests.support.fake_server import Server, launch
from tests.support.tiny_llama import publish


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("运行 run"))


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    command = [
        sys.executable,
        "-m",
        "edge.cli",
        "serve",
        str(run),
        "--port",
        "0",
        "--no-tune",
        "--ctx",
        "256",
    ]
    with launch(command) as started:
        started.wait()
        yield started


@pytest.mark.slow
def test_it_says_what_it_serves(server: Server, run: Path) -> None:
    info = server.get("/info").json()
    assert info["model"] == "微小"
    assert info["digest"] == manifest.read(run / "gguf").digest
    assert {2, 7, tiny_llama.END} <= set(info["stop_ids"])
    assert (info["backend"], info["device"], info["context"]) == ("llamacpp", "cpu", 256)
    assert info["why"]
    health = server.get("/health").json()
    assert (health["status"], health["device"]) == ("ready", "cpu")


def test_it_answers_over_every_route(server: Server) -> None:
    answer = server.get("/generate", params={"prompt": "你好", "max_tokens": 8})
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == 1 + 1 + 6 + 1 + 1
    assert answer.headers["x-edge-device"] == "cpu"
    assert answer.json()["digest"].startswith("sha256:")
    body = {
        "model": "微小",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    chat = server.post("/v1/chat/completions", body).json()
    post = server.post("/generate", {"prompt": "hi", "max_tokens": 8}).json()
    assert chat["choices"][0]["message"]["content"] == post["generate_text"]


def test_s6_the_same_prompt_three_times(server: Server) -> None:
    body = {"prompt": "the same words " * 14, "max_tokens": 16}
    first, *others = [server.post("/generate", body).json() for _ in range(3)]
    assert all(other["generate_text"] == first["generate_text"] for other in others)
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, *others)]
    assert cached[0] < 5
    assert cached[1:] == [first["usage"]["prompt_tokens"] - 1] * 2
    cold = server.post("/generate", {**body, "cache_prompt": False}).json()
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_schema_is_obeyed_by_the_real_vocabulary(server: Server) -> None:
    answer = server.post("/generate", {"prompt": "x", "regex": "你好[0-9]{3}", "temperature": 1.5})
    assert answer.json()["generate_text"].startswith("你好")
    assert answer.json()["finish_reason"] == "stop"


# -- what can be served ----------------------------------------------------------------------------------


def test_run_folder_and_file_are_the_same_artefact(run: Path) -> None:
    by_run, by_folder = find.resolve(run), find.resolve(run / "gguf")
    by_file = find.resolve(run / "gguf" / "微小.gguf")
    assert by_run == by_folder == by_file
    assert by_run.stop_ids == frozenset({2, 7})


def test_m2_another_template_than_the_exported_one_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, chat_template=manifest.text_digest("another"))
    with pytest.raises(InputError, match="chat template"):
        find.resolve(tmp_path)


def test_a_foreign_file_is_served_by_its_own_header(tmp_path: Path) -> None:
    found = find.resolve(tiny_llama.write(tmp_path / "x.gguf", template=None))
    assert (found.name, found.digest, found.chat_template) == ("x", "", None)


# -- several artefacts ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_artefacts_by_their_names(tmp_path: Path) -> None:
    paths = [str(publish(tmp_path / name, name=name)) for name in ("one", "two")]
    serve = [sys.executable, "-m", "edge.cli", "serve", "--port", "0", "--no-tune", "--ctx", "128", *paths]
    with launch([*serve, "--default", "two", "--memory-budget", "1500"]) as server:
        server.wait()
        assert server.get("/health").json()["models"] == {"one": "unloaded", "two": "ready"}
        body = {"prompt": "hi", "max_tokens": 2}
        assert server.post("/generate", body).headers["x-edge-model"] == "two"
        first = server.post("/generate", {**body, "model": "one"})
        assert (first.status_code, first.headers["x-edge-model"]) == (200, "one")
        shown = server.post("/api/show", {"model": "one"}).json()
        assert shown["details"]["format"] == "gguf"
        assert (
            server.post("/v1/embeddings", {"model": "one", "input": "hi"}).json()["usage"]["total_tokens"] > 0
        )
    for extra, message in (
        (["--default", "x"], "none of"),
        (["--name", "n"], "single model"),
        (paths, "the id"),
    ):
        with pytest.raises(UsageError, match=message):
            cli.main(["--port", "0", *paths, *extra])


@pytest.mark.slow
def test_adapters_are_asked_for_by_their_ids(tmp_path: Path, run: Path, server: Server) -> None:
    """Base and adapters behind one server, at once: each answers as it does when it is served alone."""
    folder = tmp_path / "a=b 目录"
    folder.mkdir()
    adapters = [tiny_llama.write_lora(folder / f"{name}.gguf", seed=seed) for seed, name in enumerate("xy")]
    common = [
        sys.executable,
        "-m",
        "edge.cli",
        "serve",
        str(run),
        "--port",
        "0",
        "--no-tune",
        "--ctx",
        "256",
    ]

    def text(asked: Server, model: str | None) -> str:
        body = {"prompt": "hello", "max_tokens": 24, "model": model, "temperature": 0}
        answer = asked.post("/generate", body)
        assert answer.status_code == 200, answer.text
        found: str = answer.json()["generate_text"]
        return found

    with launch([*common, "--lora", str(adapters[0])]) as one:
        one.wait()
        alone = text(one, None)
    command = [*common, "--lora", str(adapters[0]), "--lora", f"第二={adapters[1]}"]
    with launch(command) as several:
        several.wait()
        ids = [one["id"] for one in several.get("/v1/models").json()["data"]]
        assert ids == ["x", "第二", "微小"]
        with ThreadPoolExecutor(6) as pool:
            asked = [None, *ids, *ids]
            found = list(pool.map(lambda model: text(several, model), asked))
        assert found[1:4] == found[4:] and found[0] == found[1] == alone
        assert found[3] == text(server, None) and len(set(found[1:4])) == 3
        unknown = several.post("/generate", {"prompt": "x", "model": "y"})
        assert unknown.status_code == 404 and "'第二'" in unknown.json()["error"]["message"]


@pytest.mark.slow
def test_adapters_that_cannot_be_served_are_said_at_once(tmp_path: Path, run: Path) -> None:
    lora = tiny_llama.write_lora(tmp_path / "x.gguf")
    for more, message in (
        (["--lora", str(lora), "--lora", str(lora)], "two of the models have the id 'x'"),
        (["--lora", f"={lora}"], "the name or the path is missing"),
        (["--lora", f"n={tmp_path / 'none.gguf'}"], "no such file"),
        (["--lora", f"n={run / 'gguf' / '微小.gguf'}"], "is no LoRA adapter"),
        ([str(run), "--lora", str(lora)], "--lora goes with a single model"),
    ):
        with pytest.raises(EdgeError, match=message):
            cli.main([str(run), *more, "--port", "0"])


# -- an export that is waited for -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_waits_answers_and_takes_the_export_when_it_is_there(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "edge.cli", "serve", str(run), "--port", "0", "--no-tune"]
    key = {"authorization": "Bearer boss"}
    with (
        log.open("w", encoding="utf-8") as written,
        launch([*command, "--ctx", "128", "--wait"], log=written, EDGE_ADMIN_KEY="boss") as server,
    ):

        def waits_for(message: str) -> None:
            until = time.monotonic() + 20
            while message not in server.get("/ready").json()["error"]["message"]:
                assert time.monotonic() < until, server.get("/ready").text
                time.sleep(0.05)

        waits_for("run is not there yet")
        assert (server.get("/ready").status_code, server.get("/health").status_code) == (503, 200)
        assert server.get("/health").json()["models"] == {"run": "waiting"}
        asked = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}]}
        for path, kind in (
            ("/v1/messages", "type"),
            ("/api/chat", "error"),
            ("/v1/chat/completions", "error"),
        ):
            refused = server.post(path, asked | ({} if path == "/api/chat" else {"max_tokens": 3}))
            assert refused.status_code == 503, refused.text
            assert int(refused.headers["retry-after"]) > 0
            assert kind in refused.json() and "waiting for an export" in refused.text
        for path in ("/v1/models", "/api/tags", "/info"):
            assert server.get(path).status_code == 503
        assert server.post("/admin/reload", {}, headers=key).status_code == 503
        (run / "gguf").mkdir(parents=True)
        (run / "gguf" / "x.gguf").write_bytes(b"GGUF, or what was copied of it")
        waits_for("x.gguf")
        (run / "gguf" / "x.gguf").unlink()
        (run / "gguf").rmdir()
        publish(run)
        server.wait()
        before = server.get("/info").json()
        assert (before["model"], before["digest"]) == ("微小", manifest.read(run / "gguf").digest)
        assert (
            server.post("/v1/chat/completions", {**asked, "model": "微小", "max_tokens": 3}).status_code
            == 200
        )
        with manifest.publish(run / "gguf", overwrite=True) as partial:
            tiny_llama.write(partial / "second.gguf")
            manifest.write(partial, manifest.Manifest("gguf", "微小"))
        swapped = server.post("/admin/reload", {}, headers=key).json()
        after = server.get("/info").json()
        assert swapped["changed"] and (after["file"], after["digest"]) == ("second.gguf", swapped["digest"])
    lines = log.read_text(encoding="utf-8").splitlines()
    # Each reason once, however often it was looked for.
    assert 2 <= sum("WARNING edge: waiting for an export" in line for line in lines) <= 5
    assert not any("Traceback" in line for line in lines)


def test_waiting_is_for_a_single_model() -> None:
    for more in (["b"], ["--lora", "x.gguf"]):
        with pytest.raises(UsageError, match="--wait goes with a single model"):
            cli.main(["a", *more, "--wait", "--port", "0"])


def test_replicas_need_ray(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="--replicas needs the package 'ray'") as caught:
        cli.main([str(run), "--replicas", "2"])
    assert "--extras ray" in str(caught.value)
