"""llama.cpp's side of a comparison, a process of its own: `python -m convert.verify.gguf_child < requests`.

Native code may abort, so the comparing process never loads llama.cpp. The first line of standard input names
the model, each further line is a request; the answer is a line of JSON, for `logits` float32 bytes too.
The model is loaded and stepped as edge.engine.worker does it: what is compared is what is served.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from convert.verify import stepping
from edge.backends.base import Logits, Row
from edge.backends.llamacpp import LlamaCpp, Model, Settings
from edge.errors import EdgeError


class Session:
    """order: `path`, `lora` (or ""), `context` in tokens, `threads`, `extra` (repacked weights)."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._model = Model(Path(order["path"]), gpu_layers=0, extra_buffers=order["extra"])
        settings = Settings(
            slots=1,
            context=order["context"],
            capacity=order["context"],
            batch=stepping.CHUNK,
            threads=order["threads"],
        )
        lora = Path(order["lora"]) if order["lora"] else None
        self._backend = LlamaCpp(self._model, settings, lora=lora)

    def about(self, request: dict[str, Any]) -> dict[str, Any]:
        info = self._backend.info
        return {
            "vocab": info.vocab,
            "ends": sorted(info.stop_ids),
            "bos": info.bos_text,
            "eos": info.eos_text,
        }

    def encode(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"ids": [self._backend.encode(text, special=True) for text in request["texts"]]}

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        pieces = (b"".join(self._backend.decode(token) for token in ids) for ids in request["rows"])
        return {"texts": [piece.decode("utf-8", "replace") for piece in pieces]}

    def logits(self, request: dict[str, Any]) -> Logits:
        """Those after the `last` tokens of `ids`."""
        return stepping.logits(self._backend, request["ids"], request["last"])

    def greedy(self, request: dict[str, Any]) -> dict[str, Any]:
        ends = frozenset(request["ends"])
        return {"ids": stepping.greedy(self._backend, request["ids"], request["count"], ends)}

    def speed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tokens a second of a prompt and of single steps after it: the best of a few rounds."""
        token = self._backend.encode("the", special=False)[0]
        prompt, steps = request["prompt"], request["steps"]
        best_prompt = best_step = float("inf")
        for _ in range(request["rounds"]):
            self._backend.truncate(0, 0)
            began = time.perf_counter()
            for begin in range(0, prompt, stepping.CHUNK):
                self._backend.step([Row(0, begin, [token] * min(stepping.CHUNK, prompt - begin), 0)])
            best_prompt = min(best_prompt, time.perf_counter() - began)
            for position in range(prompt, prompt + steps):
                began = time.perf_counter()
                self._backend.step([Row(0, position, [token], 1)])
                best_step = min(best_step, time.perf_counter() - began)
        return {"prompt": prompt / best_prompt, "decode": 1 / best_step}


def main() -> int:
    out = sys.stdout.buffer
    lines = iter(sys.stdin.buffer.readline, b"")
    try:
        session = Session(json.loads(next(lines)))
    except EdgeError as error:
        out.write(json.dumps({"error": error.message, "hint": error.hint}).encode("utf-8") + b"\n")
        return error.exit_code
    out.write(b'{"ready": true}\n')
    out.flush()
    for line in lines:
        request = json.loads(line)
        answer = getattr(session, request["op"])(request)
        if isinstance(answer, np.ndarray):
            out.write(json.dumps({"shape": answer.shape}).encode("utf-8") + b"\n" + answer.tobytes())
        else:
            out.write(json.dumps(answer).encode("utf-8") + b"\n")
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
