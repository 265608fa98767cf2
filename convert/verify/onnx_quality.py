"""How near an exported model is to the one it was made from, on answers that the latter gives.

The reference answers a few questions greedily; both then read the same tokens, and their next-token
distributions are compared at every token of the answers. The export is computed by the very backend that
serves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.verify.divergence import Divergence
from edge.backends.base import Row
from edge.backends.onnx import Model, Onnx, Settings

# Fewer of the most probable tokens kept than this, and the answers are another model's.
LEAST_TOP1 = 0.9
MOST_KL = 0.1
ANSWER = 32
QUESTIONS = (
    "Who are you?",
    "你是谁？",
    "What should I have for lunch?",
    "我今天该做什么？",
    "Write a short note to my landlord about the broken heater.",
    "请用一句话介绍一下你自己。",
    "What is 17 + 25?",
    "为什么天空是蓝色的？",
)


@dataclass(frozen=True, slots=True)
class Quality:
    """Over `positions` next tokens. top1: the share whose most probable token is the same. kl: mean and
    largest Kullback-Leibler divergence from the reference, in nats. difference: the largest of two logits.
    """

    positions: int
    top1: float
    kl: float
    kl_max: float
    difference: float

    @property
    def poor(self) -> bool:
        """Whether it should not be served without a word."""
        return not (self.top1 >= LEAST_TOP1 and self.kl <= MOST_KL)

    def facts(self) -> dict[str, Any]:
        """For edge.json."""
        return {name: round(value, 6) for name, value in asdict(self).items()} | {"poor": self.poor}


def compare(pairs: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Quality:
    """Quality of (reference, other) logits, each [positions, vocabulary]. Not a number counts as poor."""
    divergence = Divergence()
    difference = 0.0
    for reference, other in pairs:
        divergence.add(reference, other, reference.argmax(axis=1).tolist(), made=True)
        difference = float(np.maximum(difference, np.abs(reference - other).max()))
    found = divergence.numbers()
    if not found:
        raise ValueError("nothing to compare")
    if divergence.not_numbers:
        return Quality(found["positions"] + divergence.not_numbers, 0.0, math.nan, math.nan, difference)
    return Quality(found["positions"], found["top1"], found["kl_mean"], found["kl_max"], difference)


def measure(
    file: Path, merged: Path, prompts: list[list[int]], stop_ids: list[int], *, threads: int, device: str
) -> Quality:
    """Compare the ONNX `file` with the transformers folder `merged`, in float32, on answers to `prompts`.

    Raises InputError, UnavailableError where the file cannot be loaded on `device`.
    """
    rows, reference = reference_answers(merged, prompts, stop_ids)
    longest = max(len(row) for row, _ in rows)
    backend = Onnx(Model(file), Settings(slots=1, context=longest, threads=threads, device=device))
    try:
        return compare(
            (wanted, backend_logits(backend, row, begin))
            for (row, begin), wanted in zip(rows, reference, strict=True)
        )
    finally:
        backend.close()


def backend_logits(backend: Onnx, tokens: list[int], begin: int) -> NDArray[np.float32]:
    """Logits after each token of `tokens` from `begin` on, read in pieces as a server would."""
    backend.truncate(0, 0)
    parts = []
    piece = backend.info.outputs
    for at in range(0, len(tokens), piece):
        part = tokens[at : at + piece]
        outputs = max(0, min(len(part), at + len(part) - begin))
        parts.append(backend.step([Row(0, at, part, outputs)]).copy())
    return np.concatenate(parts)


def reference_answers(
    merged: Path, prompts: list[list[int]], stop_ids: list[int]
) -> tuple[list[tuple[list[int], int]], list[NDArray[np.float32]]]:
    """Greedy answers of the model in float32: ((tokens, where predictions of the answer begin), logits)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, local_files_only=True)
    model.eval()
    rows, reference = [], []
    with torch.inference_mode():
        for prompt in prompts:
            made = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=ANSWER,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=None,
                eos_token_id=stop_ids or None,
                pad_token_id=min(stop_ids, default=0),
            )[0]
            begin = len(prompt) - 1
            reference.append(model(input_ids=made[None]).logits[0, begin:].float().numpy())
            rows.append(([int(token) for token in made], begin))
    return rows, reference
