"""What was measured of an artefact on this machine: kept in the user's cache and read back.

A result is keyed by the artefact, the backend's build, the CPU, and the settings that were planned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from edge.artefact import manifest
from edge.backends import llamacpp, onnx
from edge.errors import UnavailableError
from edge.loading.tune_trials import STREAMS, Speed
from edge.machine import build_llamacpp, hardware

_MEASURING = {"state": "measuring"}
log = logging.getLogger("edge")

Settings = TypeVar("Settings", llamacpp.Settings, onnx.Settings)


def kept_path(artefact: Path, asked: llamacpp.Settings | onnx.Settings) -> Path:
    """The file that keeps what was measured of the artefact, loaded as `asked`.

    Raises UnavailableError where there is no cache.
    """
    stat = artefact.stat()
    key = [artefact.name, stat.st_size, stat.st_mtime_ns, hardware.cpu_model()]
    streams = min(STREAMS, asked.slots)
    if isinstance(asked, onnx.Settings):
        key += [manifest.versions("onnxruntime").get("onnxruntime", ""), asked.threads, streams]
    else:
        key += [build_llamacpp.build_info(), asked.threads, streams, asked.layouts, asked.kv_type]
        key += [asked.gpu_layers, asked.extra_buffers]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8")).hexdigest()[:24]
    return hardware.cache_dir() / "tune" / f"{digest}.json"


def read(path: Path) -> dict[str, Any]:
    """The kept result; empty where nothing was measured."""
    result = _read(path)
    return result if result.get("state") == "measured" else {}


def speed(artefact: Path, asked: llamacpp.Settings | onnx.Settings) -> Speed | None:
    """How fast the artefact was measured to be; None where nothing was measured."""
    chosen = read(kept_path(artefact, asked)).get("chosen")
    return (chosen["one"], chosen["eight"], chosen["prompt"]) if chosen else None


def tuned(artefact: Path, asked: Settings, measure: Callable[[], dict[str, Any]]) -> Settings:
    """`asked` with the fastest choice, measured now unless it was before. Its `tuned` says when, or why not.

    measure: gives `Trials.result`. Raises what it raises, but for TimeoutError. Nothing is measured where the
    result cannot be kept: it would be measured at each start.
    """
    try:
        path = kept_path(artefact, asked)
        result = _read(path)
        if not result:
            hardware.writable_cache(path.parent.name)
    except UnavailableError as error:
        log.warning("%s is served untuned: %s", artefact.name, error)
        return dataclasses.replace(asked, tuned=f"skipped: {error.message}")
    if result.get("state") == "measuring":
        # The process died while it measured: serve with what is asked for rather than die again.
        return dataclasses.replace(asked, tuned="skipped: the last attempt did not end")
    if result.get("state") != "measured":
        _write(path, _MEASURING)
        try:
            result = {"state": "measured", **measure()}
        except TimeoutError as error:
            return dataclasses.replace(asked, tuned=f"skipped: {error}")
        finally:
            path.unlink(missing_ok=True)
        try:
            _write(path, result)
        except OSError as error:
            log.warning("what was measured of %s is not kept: %s", artefact.name, error)
    choice = {name: value for name, value in result["chosen"].items() if hasattr(asked, name)}
    note = f"measured {result['date']} in {result['seconds']} s"
    return dataclasses.replace(asked, **choice, tuned=note)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    measured = isinstance(result, dict) and isinstance(result.get("chosen"), dict)
    return result if measured or result == _MEASURING else {}


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
