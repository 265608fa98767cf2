"""Bounded fuzzing of everything that takes what others wrote: `python -m tests.fuzz`, `make fuzz`.

A part is a function of tests.fuzz.runner's form, listed in PARTS.
"""

from __future__ import annotations

import os

from tests.fuzz import conversations, files, grammars, http, kills, templates, training
from tests.fuzz.runner import Part

PARTS: dict[str, Part] = {
    "gguf": files.gguf,
    "onnx": files.onnx,
    "native": files.native,
    "access": http.access,
    "smuggling": http.smuggling,
    "bodies": http.bodies,
    "leaving": http.leaving,
    "conversations": conversations.conversations,
    "grammars": grammars.grammars,
    "templates": templates.templates,
    "base": training.base,
    "data": training.data,
    "config": training.config,
    "engine": kills.engine,
    "checkpoints": kills.checkpoints,
}
if not hasattr(os, "fork"):  # Windows
    del PARTS["native"], PARTS["checkpoints"]
