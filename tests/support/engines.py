"""Servers of other projects, with the JSON of their documentation, over a model that is a table of logits.

vLLM's is as 0.25.0 answered.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from convert.verify.reader import Reader
from edge.backends.base import Logits
from edge.prompt import AddedTokens
from tests.support.toy import CHATML, make_stub

VOCAB = 384
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # their ids are their places


@cache
def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    # from_file takes no path in another encoding than UTF-8.
    return Tokenizer.from_str(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))


class TableModel(Reader):
    """A stage whose next token depends on the last one and its place. noise: added to the table of `seed`."""

    def __init__(self, folder: Path, *, template: str = CHATML, seed: int = 0, noise: float = 0.0) -> None:
        if not (folder / "stub").exists():
            make_stub(folder / "stub")
        self._tokenizer = _tokenizer(str(folder / "stub"))
        tokens = AddedTokens.of([(text, True) for text in SPECIAL])
        super().__init__(
            folder, None, stage="merged", kind="float16", template=template, bos="", eos="", tokens=tokens,
            ends=[0, 2], vocab=VOCAB,
        )  # fmt: skip
        random = np.random.default_rng(seed)
        self.table = random.normal(0, 4, (VOCAB, VOCAB)).astype(np.float32)
        self.table += noise * np.random.default_rng(9).normal(0, 1, self.table.shape).astype(np.float32)
        # It says what can be read: no control tokens, and no parts of characters, whose texts are not unique.
        texts = self.decode([[token] for token in range(VOCAB)])
        self.table[:, [token for token, text in enumerate(texts) if not text or "\ufffd" in text]] -= 40
        self.table[5::32, 2] = 60

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [row.ids for row in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]

    def special_tokens(self) -> list[str]:
        return SPECIAL

    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        for ids, count in zip(rows, last, strict=True):
            yield np.stack([self.next(ids[: len(ids) - back]) for back in reversed(range(count))])

    def next(self, ids: list[int]) -> Logits:
        """The logits after `ids`."""
        row: Logits = self.table[(ids[-1] + len(ids)) % VOCAB]
        return row

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        raise AssertionError("the server writes the answers")

    def close(self) -> None:
        pass


class Engine:
    """What a server does with a model; `kind` chooses whose routes it has.

    stops: tokens at which it ends. ends: whether it does so where none is forced. before: ids that it puts
    before every prompt. top: the most alternatives that it names. bias: whether it takes one. key: what it
    wants. models: what it lists. ftype: of its weights.
    """

    def __init__(
        self, kind: str, model: TableModel, *, stops: Sequence[int] = (0, 2), ends: bool = True,
        before: Sequence[int] = (),
        top: int = 20, bias: bool = True, key: str = "", models: Sequence[str] = ("conch",),
        ftype: str = "F16",
    ) -> None:  # fmt: skip
        self.kind, self.model, self.stops, self.ends, self.before = kind, model, stops, ends, list(before)
        self.top, self.bias, self.key, self.models, self.ftype = top, bias, key, models, ftype
        self.asked: list[dict[str, Any]] = []

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        if body is not None:
            self.asked.append(body)
        route = f"_{path.partition('?')[0].strip('/').replace('/', '_').replace('-', '_')}"
        routes = {
            "llama-server": ("_props", "_tokenize", "_detokenize", "_apply_template", "_completion"),
            "vllm": ("_tokenize", "_detokenize"),
            "ollama": ("_api_show", "_api_chat"),
            "openai": (),
        }[self.kind]
        if route not in ("_v1_models", "_v1_chat_completions", *routes):
            if self.kind == "vllm":
                return 404, {"detail": "Not Found"}
            return 404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
        return getattr(self, route)(body)

    # Of all.

    def _v1_models(self, _: Any) -> tuple[int, Any]:
        owner = {"vllm": "vllm", "llama-server": "llamacpp"}.get(self.kind, "library")
        return 200, {"object": "list", "data": [{"id": name, "owned_by": owner} for name in self.models]}

    def _v1_chat_completions(self, body: Any) -> tuple[int, Any]:
        wanted, bias = body.get("top_logprobs", 0), body.get("logit_bias", {})
        if wanted > self.top:
            return 400, {"error": {"message": f"top_logprobs: at most {self.top}"}}
        if bias and not self.bias:
            return 400, {"error": {"message": "logit_bias is not supported"}}
        if beyond := [int(token) for token in bias if int(token) >= VOCAB]:
            return 400, {"error": {"message": f"token_id(s) {beyond} in logit_bias contain out-of-vocab ids"}}
        prompt = self._prompt(body["messages"])
        ids, end = self._speak(prompt, body["max_tokens"], bias)
        # vLLM counts and names the token at which it ends.
        made = ids if self.kind != "vllm" or end is None else [*ids, end]
        by_id = body.get("return_tokens_as_token_ids", False)
        content = self._named(prompt, made, wanted, "token_id" if by_id else "text") if wanted else None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.model.decode([ids])[0]},
            "finish_reason": "length" if end is None else "stop",
            "logprobs": {"content": content} if content else None,
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(made)}
        return 200, {"object": "chat.completion", "choices": [choice], "usage": usage}

    def _prompt(self, messages: Any) -> list[int]:
        return self.before + self.model.prompt_ids([messages])[0]

    def _speak(self, prompt: list[int], count: int, bias: dict[str, float]) -> tuple[list[int], int | None]:
        """Greedy ids, and the end behind them; None where they reached `count`."""
        ids: list[int] = []
        while len(ids) < count:
            row = self.model.next(prompt + ids).copy()
            for token, value in bias.items():
                row[int(token)] += value
            if int(row.argmax()) in self.stops and (self.ends or bias):
                return ids, int(row.argmax())
            ids.append(int(row.argmax()))
        return ids, None

    def _named(self, prompt: list[int], ids: list[int], top: int, how: str) -> list[dict[str, Any]]:
        """The log-probabilities of an answer."""
        rows = []
        for place, token in enumerate(ids):
            row = self.model.next(prompt + ids[:place]).astype(np.float64)
            row -= np.log(np.exp(row - row.max()).sum()) + row.max()
            best = [self._entry(int(id), row[id], how) for id in np.argsort(-row)[:top]]
            if how == "token_id":
                # Bytes of the alternatives' names, not of what they stand for.
                best = [entry | {"bytes": [*entry["token"].encode()]} for entry in best]
            rows.append(self._entry(token, row[token], how) | {"top_logprobs": best})
        return rows

    def _entry(self, token: int, logprob: float, how: str) -> dict[str, Any]:
        text = SPECIAL[token] if token < 3 else self.model.decode([[token]])[0]
        if self.kind == "vllm":
            # A part of a character has neither text nor bytes.
            text = text.replace("\ufffd", "")
        entry: dict[str, Any] = {"token": text, "logprob": float(logprob), "bytes": list(text.encode())}
        if how == "token_id":
            entry["token"] = f"token_id:{token}"
        return entry | {"id": token} if how == "id" else entry

    # llama.cpp's.

    def _props(self, _: Any) -> tuple[int, Any]:
        given = {"chat_template": self.model.template, "model_ftype": self.ftype, "total_slots": 1}
        return 200, {"default_generation_settings": {"n_ctx": 512}, **given}

    def _apply_template(self, body: Any) -> tuple[int, Any]:
        return 200, {"prompt": self.model.prompt(body["messages"]).text}

    def _tokenize(self, body: Any) -> tuple[int, Any]:
        if "messages" in body:
            ids = self.model.prompt_ids([body["messages"]])[0]
        else:
            ids = self.model.encode([body["content"] if self.kind == "llama-server" else body["prompt"]])[0]
        return 200, {"tokens": ids, "count": len(ids), "max_model_len": 512, "token_strs": None}

    def _detokenize(self, body: Any) -> tuple[int, Any]:
        # Control tokens are written out.
        text = self.model._tokenizer.decode(body["tokens"], skip_special_tokens=False)
        return 200, {"content" if self.kind == "llama-server" else "prompt": text}

    def _completion(self, body: Any) -> tuple[int, Any]:
        prompt, top = body["prompt"], body["n_probs"]
        ids, end = self._speak(prompt, body["n_predict"], {})
        texts = self.model.decode([ids[: count + 1] for count in range(len(ids))])
        whole = [not text.endswith("\ufffd") for text in texts]
        # Tokens that end within a character have no entry.
        named = [*itertools.compress(self._named(prompt, ids, top, "id"), whole)]
        stop = "limit" if end is None else "eos"
        text = self.model.decode([ids])[0]
        return 200, {"content": text, "tokens": ids, "stop_type": stop, "completion_probabilities": named}

    # Ollama's.

    def _api_show(self, _: Any) -> tuple[int, Any]:
        stops = "".join(f'stop                           "{SPECIAL[token]}"\n' for token in self.stops)
        given = {"parameters": stops + "num_ctx 512", "template": "{{ .Prompt }}"}
        return 200, {**given, "details": {"quantization_level": self.ftype}, "model_info": {"x": 1}}

    def _api_chat(self, body: Any) -> tuple[int, Any]:
        prompt = self._prompt(body["messages"])
        ids, end = self._speak(prompt, body["options"]["num_predict"], {})
        message = {"role": "assistant", "content": self.model.decode([ids])[0]}
        answer: dict[str, Any] = {
            "message": message,
            "done": True,
            "done_reason": "length" if end is None else "stop",
        }
        if body.get("logprobs"):
            answer["logprobs"] = self._named(prompt, ids, body["top_logprobs"], "text")
        return 200, answer | {"prompt_eval_count": len(prompt), "eval_count": len(ids)}


@contextlib.contextmanager
def serving(engine: Any) -> Iterator[str]:
    """The URL of a server over anything that has `answer` and `key`."""

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            if engine.key and self.headers.get("Authorization") != f"Bearer {engine.key}":
                status, value = 401, {"error": "Unauthorized"}
            else:
                status, value = engine.answer(self.path, body)
            kind, data = "application/json", value
            if not isinstance(value, bytes):
                data = json.dumps(value).encode()
            else:
                kind = "text/html"
            self.send_response(status)
            for name, text in getattr(engine, "headers", {}).items():
                self.send_header(name, text)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
