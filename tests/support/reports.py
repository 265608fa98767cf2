"""A report from rounds that a test made or measured."""

from __future__ import annotations

from typing import Any

from bench.measure.process_probe import Noise
from bench.measure.workloads import Plan
from bench.report import build as report
from bench.rounds import Measured


def build(measured: list[Measured], **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "plan": Plan(tokens=4, clients=(1,)),
        "asked_tokens": 4,
        "command": "edge bench runs/x",
        "model": {
            "run": "贝壳 <x>",
            "base_model": "b",
            "merged": {"digest": "sha256:1", "bytes": 2**21},
            "gguf": {"digest": "sha256:2", "file": "x.gguf", "bytes": 2**20},
        },
        "noise": (Noise(0.0, 0.0), Noise(0.0, 0.0)),
        "gpu": None,
        "footprints": {},
        "quality": {},
        "sweeps": {},
        "together": True,
        "seconds": 1.0,
    }
    return report.build(measured, **given | more)
