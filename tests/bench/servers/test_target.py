"""Servers that run already, the bench's own small server, and the view of what runs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import cli, rounds, run_from_gguf, side_by_side
from bench.measure import progress
from bench.measure.http1 import Lines, request
from bench.measure.load import ask, spread_evenly
from bench.measure.workloads import Job, Plan
from bench.report.definitions import DEFINITIONS
from bench.servers import external, library_server
from bench.servers.address import name_and_url
from bench.servers.library_server import Request, next_batch
from bench.servers.target import started
from edge.artefact import manifest
from edge.errors import EdgeError, ExistsError, InputError, UsageError

KEY = "k-1"


class Other(BaseHTTPRequestHandler):
    """OpenAI's and Ollama's interface, as far as they are asked.

    strict: unknown fields are refused. version: what vLLM's route for it answers, "" without that route.
    """

    strict = False
    locked = False
    version = ""
    models: tuple[str, ...] = ("m",)
    bodies: list[dict[str, Any]]

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _wrong_key(self) -> bool:
        return self.locked and self.headers.get("authorization") != f"Bearer {KEY}"

    def do_GET(self) -> None:
        if self._wrong_key():
            return self._send(401, "application/json", "{}")
        if self.path == "/version":
            status = 200 if self.version else 404
            return self._send(status, "application/json", json.dumps({"version": self.version}))
        field, key = ("models", "name") if self.path.endswith("tags") else ("data", "id")
        said = {field: [{key: name} for name in self.models]}
        return self._send(200, "application/json", json.dumps(said))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self._wrong_key():
            return self._send(401, "application/json", "{}")
        self.bodies.append(body)
        if self.path.endswith("/generate"):
            rows: list[dict[str, Any]] = [{"response": "la ", "done": False}] * 2
            rows.append({"response": "", "done": True, "done_reason": "stop"})
            rows[-1] |= {"prompt_eval_count": 7, "eval_count": 3}
            return self._send(200, "application/x-ndjson", "".join(json.dumps(row) + "\n" for row in rows))
        if self.strict and "ignore_eos" in body:
            return self._send(400, "application/json", '{"error": "unknown field"}')
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        events: list[dict[str, Any]] = [{"choices": [{"text": "la "}]} for _ in range(3)]
        events += [{"choices": [{"text": "", "finish_reason": "length"}]}, {"choices": [], "usage": usage}]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return self._send(200, "text/event-stream", text)


@contextlib.contextmanager
def other(**more: Any) -> Iterator[tuple[str, Any]]:
    handler = type("Handler", (Other,), {"bodies": [], **more})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_openai_server_is_asked_for_exact_lengths_with_raw_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(external.KEY, KEY)
    with other(locked=True) as (url, handler):
        target = external.target("vllm", url)
        assert target.forced and target.stage == "" and target.dialect.key == KEY
        sample = asyncio.run(ask(target.url, target.dialect, Job("Hello", 0, 10)))
    asked = handler.bodies[-1]
    assert (asked["prompt"], asked["model"], asked["temperature"]) == ("Hello", "m", 0.0)
    assert (asked["max_tokens"], asked["ignore_eos"]) == (10, True) and "min_tokens" not in asked
    assert (sample.state, sample.prompt_tokens, sample.text) == ("ok", 7, "la la la ")
    # Ten tokens in three pieces of unknown size.
    assert [tokens for _, tokens in sample.events] == [3, 3, 4]


def test_a_server_that_refuses_the_forcing_fields_is_marked() -> None:
    with other(strict=True) as (url, handler):
        target = external.target("strict", f"{url}/v1/")
        assert not target.forced
        assert asyncio.run(ask(target.url, target.dialect, Job("x", 0, 4))).state == "ok"
        assert "ignore_eos" not in handler.bodies[-1]


def test_ollama_is_asked_raw_and_its_short_answers_are_incomplete(tmp_path: Path) -> None:
    with other() as (url, handler):
        target = external.target("ollama", f"{url}/api#other")
        with started(target, tmp_path / "log") as server:
            assert server.pid is None and server.load_s == 0.0
            part = rounds.Measured(target)
            reads = {0: 99}
            rate = rounds.warm(part, server, reads)
        assert rate > 0 and part.unforced == "it gave 3 of 16 tokens"
        body = handler.bodies[-1]
        assert (body["model"], body["raw"], body["options"]["num_predict"]) == ("other", True, 16)
        sample = asyncio.run(ask(target.url, target.dialect, Job("x", 0, 16)))
        assert (sample.state, sample.completion_tokens, sample.finish) == ("incomplete", 3, "stop")
        assert [tokens for _, tokens in sample.events] == [1, 2]


def test_models_of_an_outside_server() -> None:
    with other(models=("a", "b")) as (url, _):
        with pytest.raises(InputError, match="several models: a, b"):
            external.target("x", url)
        assert external.target("x", f"{url}#b").dialect.model == "b"  # type: ignore[attr-defined]
    with other(models=()) as (url, _), pytest.raises(InputError, match="lists no model"):
        external.target("x", url)
    with pytest.raises(EdgeError, match="does not answer"):
        external.target("x", "http://127.0.0.1:9")


def test_what_an_outside_server_tells_of_itself() -> None:
    with other(version="0.25.0") as (url, _):
        assert external.told(external.target("vllm", url)) == {"url": url, "version": "0.25.0"}
    with other() as (url, _):
        assert external.told(external.target("x", url)) == {"url": url}


def test_a_key_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with other(locked=True) as (url, _):
        for fragment in ("", "#m"):
            monkeypatch.delenv(external.KEY, raising=False)
            with pytest.raises(InputError, match="wants a key") as caught:
                external.target("x", url + fragment)
            assert external.KEY in caught.value.hint
            monkeypatch.setenv(external.KEY, "other")
            with pytest.raises(InputError, match="does not take the key in"):
                external.target("x", url + fragment)


@pytest.mark.parametrize(
    "given",
    ["x=ftp://h", "=http://h", "a b=http://h", "../x=http://h", "x=http://", "x=http://h:99999", "x="],
)
def test_names_and_urls_are_checked(given: str) -> None:
    with pytest.raises(UsageError, match="NAME=URL"):
        name_and_url(given, "--targets")


def test_target_names() -> None:
    assert cli.target_names("edge, genai,edge,x=http://h:1/v1") == ("edge", "genai", "x=http://h:1/v1")
    for given in ("nothing", "edge,edge=http://h", "a=http://h:1,a=http://h:2", ""):
        with pytest.raises(UsageError):
            cli.target_names(given)
    with pytest.raises(UsageError, match="same server"):
        cli.target_names("a=http://h:1/v1,b=http://h:1/api")


def test_each_name_has_a_target(tmp_path: Path) -> None:
    assert tuple(side_by_side.targets(tmp_path, tmp_path / "x.gguf", Plan())) == cli.TARGETS


def test_wrong_arguments_are_refused_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from bench import cli\n"
        "try: cli.main(['x', '--targets', 'nothing'])\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print([name for name in ('numpy', 'rich', 'psutil', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["UsageError", "[]"]


def test_tokens_of_unknown_pieces_are_spread_evenly() -> None:
    assert [n for _, n in spread_evenly([(0.0, 0), (1.0, 0), (2.0, 0)], 7)] == [2, 2, 3]
    assert spread_evenly([(0.0, 0), (1.0, 0)], 0) == [(0.0, 0), (1.0, 0)]


def test_lines_come_whole_however_they_are_cut() -> None:
    lines = Lines()
    text = '{"a": "你"}\n\n{"b": 1}\n'.encode()
    found = [one for at in range(len(text)) for one in lines.feed(text[at : at + 1])]
    assert found == ['{"a": "你"}', '{"b": 1}']
    assert b"authorization: Bearer s3\r\n" in request("GET", "h", "/", key="s3")
    assert b"authorization" not in request("GET", "h", "/")


class Toy:
    """A library that takes two requests of equal shape at once, and says what it was given."""

    rows = 2

    def __init__(self) -> None:
        self.info: dict[str, Any] = {"library": "toy"}

    def encode(self, prompt: str) -> list[int]:
        return [ord(letter) for letter in prompt]

    def run(self, batch: Sequence[Request], emit: Any) -> None:
        if batch[0].ids == [ord("!")]:
            raise RuntimeError("broken")
        for number in range(batch[0].tokens):
            for row in range(len(batch)):
                # Every second token is half a character.
                emit(row, "" if number % 2 == 0 and number + 1 < batch[0].tokens else "你")


def test_only_prompts_of_one_shape_share_a_batch() -> None:
    def asked(length: int, tokens: int = 4) -> Request:
        return Request([0] * length, tokens, lambda _: None)

    waiting = [asked(3), asked(5), asked(3), asked(3, 8), asked(3)]
    assert next_batch(waiting, 32) == [waiting[0], waiting[2], waiting[4]]
    assert next_batch(waiting, 2) == [waiting[0], waiting[2]]
    assert next_batch(waiting, 1) == [waiting[0]]


def test_the_small_server_answers_each_and_outlives_an_error() -> None:
    starlette = pytest.importorskip("starlette.testclient")
    with starlette.TestClient(library_server.create_app(Toy())) as client:
        assert client.get("/health").json() == {"library": "toy"}
        answers = [client.post("/generate", json={"prompt": p, "max_tokens": 3}).text for p in ("!", "ab")]
    assert "RuntimeError: broken" in answers[0] and "done" not in answers[0]
    events = [json.loads(line[6:]) for line in answers[1].splitlines() if line.startswith("data: {")]
    assert [(e["text"], e["tokens"]) for e in events[:-1]] == [("你", 2), ("你", 1)]
    assert events[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 3}
    assert answers[1].endswith("data: [DONE]\n\n")


@pytest.mark.slow
def test_a_static_cache_gives_the_tokens_of_plain_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.support.toy import make_model

    monkeypatch.setattr(library_server, "CONTEXT", 96)
    threads = torch.get_num_threads()
    library = library_server.Static(make_model(tmp_path / "m"), "float32", compiled=False)
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for prompt in ("Hello, world", "A longer question: who are you?"):
        ids = library.encode(prompt)
        texts: list[str] = []
        library.run([Request(ids, 20, lambda _: None)], lambda _, text, add=texts.append: add(text))
        plain = model.generate(torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False)
        wanted = library._tokenizer.decode(plain[0, len(ids) :])
        assert len(texts) == 20
        # Bytes of a character that is not complete are held back.
        assert wanted.rstrip("\ufffd").startswith("".join(texts)[:-1]) and len("".join(texts)) > 5


def test_the_small_server_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        library_server.main(["static", str(tmp_path / "missing")])


def test_without_a_terminal_there_are_plain_lines() -> None:
    text = io.StringIO()
    case = ("mixed", 8)
    with progress.View(Console(file=text, width=60)) as view:
        view.say("starting edge")
        view.expect(["baseline", "edge"], {case: 2}, {("baseline", case): 100.0, ("edge", case): 10.0})
        assert view.left() == pytest.approx(220.0)
        view.begin("edge", case)
        view.seen(3)
        view.end(93.4)
    first, second = text.getvalue().splitlines()
    assert first == "starting edge"
    # The round took no time, so the next of this target will take none; the other's are still guessed.
    assert second == "edge: mixed, 8 clients, round 1 of 2: 93.4 tokens/s; about 3:20 min left"


def test_on_a_terminal_the_view_shows_round_rate_and_results() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    case = ("mixed", 1)
    with progress.View(console) as view:
        view.expect(["edge"], {case: 3}, {("edge", case): 10.0})
        view.begin("edge", case)
        view.end(50.0)
        view.begin("edge", case)
        with console.capture() as shown:
            console.print(view)
        assert "no token yet" in shown.get()
        view.seen(5)
        with console.capture() as shown:
            console.print(view)
    assert re.search(r"edge: mixed, 1 client, round 2 of 3, [\d.]+ tokens/s; about \d+ s left", shown.get())
    assert "50.0 (1)" in shown.get()


def test_the_docs_define_every_figure_in_the_same_words() -> None:
    text = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name, meaning in DEFINITIONS.items():
        assert f"| {name} | {meaning} |" in text


def test_a_run_from_a_gguf_needs_one(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"x\.gguf"):
        run_from_gguf.make(tmp_path / "x.gguf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.matrix
@pytest.mark.slow
def test_a_gguf_becomes_a_merged_folder_with_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    safetensors = pytest.importorskip("safetensors.numpy")
    from convert.export import gguf
    from tests.convert.export.test_gguf import write_model

    first = tmp_path / "first"
    write_model(first / "merged", tied=False)
    file = gguf.run(first, quant="F16", console=Console(quiet=True))
    folder = run_from_gguf.make(file, tmp_path / "模型")
    known = manifest.read(folder)
    assert (known.stage, known.name, known.settings["dtype"]) == ("merged", "模型", "float16")
    made = safetensors.load_file(folder / "model.safetensors")
    model = transformers_of(first / "merged")
    name = "model.layers.1.mlp.down_proj.weight"
    assert abs(made[name].astype("float32") - model.state_dict()[name].float().numpy()).max() < 1e-4
    with pytest.raises(ExistsError):
        run_from_gguf.make(file, tmp_path / "模型")


def transformers_of(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder)
