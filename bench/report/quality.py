"""Quality beside speed: how far each artefact is from the merged model, as edge.json has it.

Nothing is measured here. What a target reads decides its figures: servers of the same file share them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.servers.target import Target
from edge.artefact import manifest
from edge.errors import InputError


def of_target(run: Path, target: Target) -> dict[str, Any]:
    """What is known of the weights that a target reads; as `of_stage`, and empty for weights unknown.

    transformers in float32 is the reference; what rounding to another type costs is not measured.
    """
    if not target.stage:
        return {}
    if target.stage == "merged" and target.dtype != "float32":
        return {"unmeasured": f"the reference, rounded to {target.dtype}"}
    return of_stage(run, target.stage)


def of_stage(run: Path, stage: str) -> dict[str, Any]:
    """What is known of RUN/<stage> against RUN/merged.

    kl (mean, nats), kl_p99, top1 (share), positions; perplexity and rows where the data set was at hand. For
    `merged`: reference. Where nothing was measured: missing, the command that does it.
    """
    if stage == "merged":
        comparisons = (_logits(run / other) for other in ("gguf", "onnx"))
        logits: dict[str, Any] = next((one for one in comparisons if "perplexity" in one), {})
        return {"reference": True, **_perplexity(logits, 0)}
    logits = _logits(run / stage)
    if not logits:
        return {"missing": f"edge verify {run / 'merged'} {run / stage}"}
    figures = {"kl": "kl_mean", "kl_p99": "kl_p99", "top1": "top1", "positions": "positions"}
    return {name: logits[key] for name, key in figures.items() if key in logits} | _perplexity(logits, 1)


def _perplexity(logits: dict[str, Any], side: int) -> dict[str, Any]:
    """side: 0 for the merged model, 1 for what was compared with it."""
    if "perplexity" not in logits:
        return {}
    return {"perplexity": logits["perplexity"][side], "rows": logits.get("rows", "")}


def _logits(folder: Path) -> dict[str, Any]:
    """The figures of the comparison in the folder's edge.json; {} where there are none."""
    try:
        verify = manifest.read(folder).verify
    except InputError:
        return {}
    logits, quality = verify.get("logits"), verify.get("quality")
    if isinstance(logits, dict) and "kl_mean" in logits:
        return logits
    # Earlier ONNX exports kept a comparison of their own.
    if isinstance(quality, dict) and "kl" in quality:
        return {"kl_mean": quality["kl"], "top1": quality["top1"], "positions": quality["positions"]}
    return {}
