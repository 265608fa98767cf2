"""Quality beside speed: what each artefact lost, as `edge verify` and the exports wrote it into edge.json.

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
        found: dict[str, Any] = {"reference": True}
        for other in ("gguf", "onnx"):
            perplexity = _logits(run / other).get("perplexity")
            if perplexity and "perplexity" not in found:
                found |= {"perplexity": perplexity[0], "rows": _logits(run / other).get("rows", "")}
        return found
    logits = _logits(run / stage)
    if "kl_mean" in logits:
        kept = {"kl": logits["kl_mean"], "kl_p99": logits.get("kl_p99")}
        kept |= {"top1": logits["top1"], "positions": logits["positions"]}
        if "perplexity" in logits:
            kept |= {"perplexity": logits["perplexity"][1], "rows": logits.get("rows", "")}
        return kept
    exported = _verify(run / stage).get("quality")
    if isinstance(exported, dict) and "kl" in exported:
        return {key: exported[key] for key in ("kl", "top1", "positions")}
    return {"missing": command(run, stage)}


def command(run: Path, stage: str) -> str:
    """What measures the stage."""
    if stage == "onnx":
        return f"edge export onnx {run} --overwrite"
    return f"edge verify {run / 'merged'} {run / stage}"


def _verify(folder: Path) -> dict[str, Any]:
    try:
        return manifest.read(folder).verify
    except InputError:
        return {}


def _logits(folder: Path) -> dict[str, Any]:
    found = _verify(folder).get("logits")
    return found if isinstance(found, dict) else {}
