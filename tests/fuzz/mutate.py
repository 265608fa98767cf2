"""Odd values, and changes to bytes, JSON values and texts. All of it is decided by the generator given."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**30, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
TEXTS = [
    "", " ", "a", "none", "auto", "null", "true", "0", "-1", "1e999", "\0", "\ud800", "👩‍🚀", "é\u0301",
    "\u202e", "../../etc/passwd", "/", "C:\\x", "a" * 300, "{{ 7*7 }}", "{% for x in y %}", "<|im_end|>",
    "<think>", "<tool_call>", "</tool_call>", "%s%n", "data:,x", "http://127.0.0.1:9/", "x\r\ny: z", "你好",
]  # fmt: skip
# What the objects in requests, files and schemas call their parts.
NAMES = [
    "type", "role", "content", "text", "name", "function", "arguments", "tool_calls", "format", "schema",
    "id", "input", "tool_use_id", "thinking", "strict", "parameters", "properties", "call_id", "output",
    "model", "chat_template_kwargs", "cut",
]  # fmt: skip
KINDS = [
    "text", "function", "json_schema", "json_object", "message", "tool_use", "tool_result", "function_call",
    "function_call_output", "input_text", "output_text", "reasoning", "image_url", "regex", "object",
    "thinking", "user", "assistant", "system", "tool", "developer",
]  # fmt: skip


def value(rng: Random, depth: int = 3) -> Any:
    """A JSON value of any kind; lists and objects are `depth` levels deep at most."""
    kind = rng.randrange(8 if depth else 5)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice(KINDS)
    if kind == 4:
        return rng.choice(([], {}, [[]], [None], "x" * 70_000, "<|im_end|>" * 2000, "[" * 20_000))
    if kind == 5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice(NAMES if rng.random() < 0.8 else TEXTS): value(rng, depth - 1)
        for _ in range(rng.randrange(5))
    }


def places(whole: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything within a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(whole, (dict, list)):
        for key in whole if isinstance(whole, dict) else range(len(whole)):
            items += [(whole, key), *places(whole[key])]
    return items


def inside(rng: Random, whole: Any, count: int = 3) -> Any:
    """A copy of a JSON value in which up to `count` places are changed, left out, renamed or repeated."""
    whole = copy.deepcopy(whole)
    for _ in range(rng.randint(1, count)):
        if not (within := places(whole)):
            return value(rng)
        container, key = rng.choice(within)
        how = rng.randrange(8)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[rng.choice(NAMES + TEXTS)] = container[key]
        elif how == 2 and isinstance(container, list):
            container[key:key] = [container[key]] * rng.choice((1, 3, 200))
        elif how == 3:
            container[key] = [container[key]]
        elif how > 5 and isinstance(container[key], (int, float)):
            # Still a number: what lies behind the check of its type.
            container[key] = rng.choice(NUMBERS)
        elif how == 4:
            container[key] = rng.choice(within)[0]
            container[key] = copy.deepcopy(value(rng, 1)) if container[key] is container else container[key]
            whole = json.loads(json.dumps(whole)) if _is_tree(whole) else value(rng)
        else:
            container[key] = value(rng)
    return whole


def _is_tree(whole: Any) -> bool:
    try:
        json.dumps(whole)
    except ValueError:  # a circle
        return False
    return True


def data(rng: Random, whole: bytes, *, end: int | None = None) -> bytes:
    """A copy of `whole` with up to eight changes before `end`: other bytes, numbers, cuts, repetitions."""
    changed = bytearray(whole)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(max(1, min(len(changed), len(whole) if end is None else end)))
        how = rng.randrange(10)
        if how < 4:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif how < 6:
            size = rng.choice("BHIQ")
            number = rng.choice((0, 1, 2, 255, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64)))
            packed = struct.pack(f"<{size}", number & (2 ** (8 * struct.calcsize(size)) - 1))
            changed[at : at + len(packed)] = packed
        elif how < 7:
            del changed[at : at + rng.choice((1, 2, 8, 100))]
        elif how < 8:
            changed[at:at] = changed[at : at + rng.choice((1, 4, 64))] * rng.choice((1, 2, 100))
        elif how < 9:
            changed[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def text_of(rng: Random, whole: Any) -> bytes:
    """A JSON value as text; now and then the text is damaged, or nested without end."""
    if rng.random() < 0.02:
        depth = rng.choice((60, 2_000, 100_000))
        return b"[" * depth + b"]" * rng.choice((0, depth))
    # Half a surrogate pair is written as it stands.
    text = json.dumps(whole, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return data(rng, text) if rng.random() < 0.1 else text
