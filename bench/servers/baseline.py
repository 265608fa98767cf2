"""The usual first attempt, faithfully: FastAPI around transformers' `generate`, as tutorials show it.

    python -m bench.servers.baseline MODEL_DIR --port 8001

The handler is asynchronous and calls `generate` directly, so nothing else is answered meanwhile; the prompt
is encoded as it is, the answer is decoded with the prompt in it, and both together have at most 512 tokens.
Only what a measurement needs was added: `max_new_tokens`, which forces exactly that many greedy tokens, token
counts in the answer, and `/health`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edge.console import guarded
from edge.errors import InputError

DTYPES = ("float32", "bfloat16")


def create_app(folder: Path, dtype: str = "float32") -> Any:
    """The application over a transformers folder. dtype: one of DTYPES; tutorials' versions took float32."""
    import torch
    from fastapi import FastAPI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    app = FastAPI()

    @app.get("/generate")
    async def generate(prompt: str, max_new_tokens: int | None = None) -> dict[str, Any]:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        if max_new_tokens is None:
            outputs = model.generate(**inputs, max_length=512)
        else:
            outputs = model.generate(
                **inputs, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False
            )
        read = inputs["input_ids"].shape[1]
        return {
            "generate_text": tokenizer.decode(outputs[0], skip_special_tokens=True),
            "usage": {"prompt_tokens": read, "completion_tokens": outputs.shape[1] - read},
        }

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ready", "device": device, "dtype": dtype, "threads": torch.get_num_threads()}

    return app


def main(argv: list[str]) -> int:
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m bench.servers.baseline", description="The slow server.")
    parser.add_argument("folder", type=Path, help="a transformers folder, such as RUN/merged")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        raise InputError(
            f"{args.folder} is not a transformers folder: it has no config.json", "give RUN/merged"
        )
    uvicorn.run(create_app(args.folder, args.dtype), host="127.0.0.1", port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
