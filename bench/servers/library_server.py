"""A small HTTP server around a library's own generation loop, as a careful user would write one.

    python -m bench.servers.library_server genai FOLDER --port 8002        onnxruntime-genai's Generator
    python -m bench.servers.library_server static FOLDER --port 8002       transformers with a static cache

Requests wait in one queue; a thread takes the next ones that the library can run as one batch, and streams
each token as it comes. Nobody joins a batch that runs. It speaks `POST /generate` as edge does, raw prompts
and greedy tokens alone, and answers `/health` at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.servers import genai_loop
from edge.console import guarded
from edge.errors import InputError
from edge.machine import hardware

MOST_ROWS = 32
# What a static cache holds; the workloads' longest prompts and 512 tokens of answer fit.
CONTEXT = 2048


@dataclass
class Request:
    """A waiting request: its prompt's tokens, how many to make, and what sends its events."""

    ids: list[int]
    tokens: int
    send: Callable[[dict[str, Any] | None], object]


class Library(Protocol):
    """A loop that runs a batch. info: for /health. rows: how many requests it takes at once."""

    info: dict[str, Any]
    rows: int

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens."""

    def run(self, batch: Sequence[Request], emit: Callable[[int, str], None]) -> None:
        """Make every row's tokens; emit(row, text) for each token, whose text may be empty."""


class Genai:
    """onnxruntime-genai over an exported folder.

    Only prompts of equal length share a batch: with padding on either side, its Generator gives other tokens
    than each prompt alone does.
    """

    rows = MOST_ROWS

    def __init__(self, folder: Path) -> None:
        threads = hardware.cpu_threads()
        self._loop = genai_loop.Loop(folder, threads)
        self._tokenizer = self._loop.library.Tokenizer(self._loop.model)
        version = str(self._loop.library.__version__)
        self.info = {"library": "onnxruntime-genai", "version": version, "device": "cpu", "threads": threads}

    def encode(self, prompt: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(prompt)]

    def run(self, batch: Sequence[Request], emit: Callable[[int, str], None]) -> None:
        generator = self._loop.generator([list(request.ids) for request in batch], batch[0].tokens)
        streams = [self._tokenizer.create_stream() for _ in batch]
        for _ in range(batch[0].tokens):
            generator.generate_next_token()
            for row, token in enumerate(generator.get_next_tokens()):
                emit(row, streams[row].decode(int(token)))


class Static:
    """transformers' generate with one static cache for all requests, one after the other.

    compiled: torch.compile takes the decoding step, of fixed shapes, before the first request.
    """

    rows = 1

    def __init__(self, folder: Path, dtype: str, *, compiled: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.generation.configuration_utils import CompileConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._torch: Any = torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        threads = hardware.cpu_threads()
        torch.set_num_threads(threads)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
        self._more: dict[str, Any] = {"cache_implementation": "static", "disable_compile": not compiled}
        if compiled:
            # By itself generate compiles on GPUs alone.
            self._more["compile_config"] = CompileConfig(fullgraph=False, mode="default")
            self._more["compile_config"]._compile_all_devices = True
        about = {"library": "transformers", "dtype": dtype, "device": device, "compiled": compiled}
        self.info = about | {"threads": threads}
        # The largest cache first: the shorter requests that follow use it too.
        request = Request(self.encode("1, 2, 3, 4,"), 8, lambda _: None)
        self._generate(request, lambda _: None, length=CONTEXT)

    def encode(self, prompt: str) -> list[int]:
        return list(self._tokenizer(prompt)["input_ids"])

    def run(self, batch: Sequence[Request], emit: Callable[[int, str], None]) -> None:
        from tokenizers.decoders import DecodeStream

        [request] = batch
        stream = DecodeStream(skip_special_tokens=False)
        self._generate(
            request, lambda token: emit(0, stream.step(self._tokenizer.backend_tokenizer, token) or "")
        )

    def _generate(self, request: Request, take: Callable[[int], None], length: int | None = None) -> None:
        from transformers import MaxLengthCriteria, StoppingCriteriaList

        seen = 0

        class Streamer:
            """Told of the prompt first, then of each token."""

            def put(self, value: Any) -> None:
                nonlocal seen
                if seen:
                    take(int(value))
                seen += 1

            def end(self) -> None:
                """Nothing is left to do."""

        ids = self._torch.tensor([request.ids], device=self._model.device)
        enough = len(request.ids) + request.tokens
        longest = length or enough
        with self._torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                max_length=longest,
                min_length=longest,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(enough)]),
                streamer=Streamer(),
                pad_token_id=0,
                **self._more,
            )


def work(library: Library, requests: queue.SimpleQueue[Request]) -> None:
    """Take requests from the queue and run them batch by batch, without an end."""
    waiting: list[Request] = []
    while True:
        while not waiting or not requests.empty():
            waiting.append(requests.get())
        batch = next_batch(waiting, library.rows)
        waiting = [request for request in waiting if request not in batch]
        run_batch(library, batch)


def run_batch(library: Library, batch: list[Request]) -> None:
    pending = [0] * len(batch)

    def emit(row: int, text: str) -> None:
        pending[row] += 1
        # Half a character has no text yet: its token is counted with the next.
        if text:
            batch[row].send({"text": text, "tokens": pending[row]})
            pending[row] = 0

    end: dict[str, Any] = {"done": True, "finish_reason": "length"}
    try:
        library.run(batch, emit)
    except Exception as error:  # the client gets the message, the log the rest, and the next batch runs
        traceback.print_exc()
        end = {"error": {"message": f"{type(error).__name__}: {error}"}}
    for request in batch:
        usage = {"prompt_tokens": len(request.ids), "completion_tokens": request.tokens}
        request.send(end if "error" in end else end | {"usage": usage})
        request.send(None)


def next_batch(waiting: Sequence[Request], rows: int) -> list[Request]:
    """The first of `waiting`, and those after it of as many tokens, in and out; at most `rows`."""
    shape = (len(waiting[0].ids), waiting[0].tokens)
    return [request for request in waiting if (len(request.ids), request.tokens) == shape][:rows]


def create_app(library: Library) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=work, args=(library, requests), daemon=True).start()

    async def generate(request: Any) -> Any:
        body = await request.json()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        ids = library.encode(body["prompt"])
        requests.put(
            Request(
                ids, body["max_tokens"], lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
            )
        )

        async def stream() -> AsyncIterator[str]:
            while (event := await events.get()) is not None:
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def health(_: Any) -> Any:
        return JSONResponse(library.info)

    return Starlette(
        routes=[Route("/generate", generate, methods=["POST"]), Route("/health", health, methods=["GET"])]
    )


def main(argv: list[str]) -> int:
    import uvicorn

    parser = argparse.ArgumentParser(
        prog="python -m bench.servers.library_server", description=__doc__.splitlines()[0]
    )
    parser.add_argument("library", choices=("genai", "static"))
    parser.add_argument("folder", type=Path, help="an ONNX folder (genai), a transformers folder (static)")
    parser.add_argument("--port", type=int, default=8002)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="static")
    parser.add_argument("--compile", action="store_true", help="static: torch.compile the decoding step")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise InputError(f"no such folder: {args.folder}", "give RUN/onnx or RUN/merged")
    static = args.library == "static"
    library: Library = (
        Static(args.folder, args.dtype, compiled=args.compile) if static else Genai(args.folder)
    )
    uvicorn.run(create_app(library), host="127.0.0.1", port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
