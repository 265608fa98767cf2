"""`edge doctor`: what this machine has, what of it is used, and the command for what is missing."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from edge.artefact import manifest
from edge.errors import UnavailableError
from edge.machine import build_llamacpp, hardware
from edge.machine.cuda_libraries import gpu_remedy, missing_library
from edge.machine.llamacpp_source import BUILD, CONSTRAINTS, PACKAGE, STOCK

EXTRAS = ("serve", "onnx", "train", "export-onnx", "bench", "dev")


@dataclass(frozen=True)
class Item:
    """One line: what was checked, what is there, and what to do where something is missing."""

    group: str
    name: str
    found: str
    todo: str = ""


def items() -> list[Item]:
    """Everything that is checked, in the order it is shown."""
    gpus = hardware.gpus()
    return [*_machine(hardware.describe()), *_gpus(gpus), *_llamacpp(gpus), *_packages(gpus)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _machine(machine: dict[str, Any]) -> Iterator[Item]:
    yield Item("machine", "system", f"{machine['os']}, Python {machine['python']}")
    flags = " ".join(machine["flags"]) or "features unknown"
    yield Item("machine", "CPU", f"{machine['cpu']} ({flags})")
    cores = f"{machine['physical_cores'] or '?'} cores, {machine['logical_cpus']} logical"
    quota = hardware.cpu_quota()
    limit = f", the container allows {quota:g}" if quota is not None else ""
    yield Item("machine", "threads used", f"{machine['threads']} ({cores}{limit})")
    total, available = _gib(machine["memory_total"]), _gib(machine["memory_available"])
    yield Item("machine", "memory", f"{total}, {available} available")
    free = shutil.disk_usage(".").free
    todo = "" if free > 10 * 2**30 else "free some disk space: a run takes up to 10 GiB"
    yield Item("machine", "disk here", f"{_gib(free)} free", todo)
    try:
        yield Item("machine", "cache", f"{hardware.writable_cache('').absolute()} can be written")
    except UnavailableError as error:
        yield Item("machine", "cache", f"{error.message}: nothing is tuned or built", error.hint)


def _gpus(gpus: list[hardware.GPU]) -> Iterator[Item]:
    if not gpus:
        yield Item("gpu", "NVIDIA", "none (nvidia-smi shows no GPU): everything runs on the CPU")
    for gpu in gpus:
        memory = f"{_gib(gpu.memory_total)} ({_gib(gpu.memory_free)} free)"
        text = f"{gpu.name}, {memory}, driver {gpu.driver}, CUDA up to {gpu.cuda or 'unknown'}"
        yield Item("gpu", f"GPU {gpu.index}", text)


def _llamacpp(gpus: list[hardware.GPU]) -> Iterator[Item]:
    group = "llama.cpp"
    try:
        compiler = build_llamacpp.compiler()
        yield Item(group, "compiler", f"{compiler.kind}: {compiler.version or 'found'}")
    except UnavailableError as error:
        yield Item(group, "compiler", "none", error.hint)
    installed = manifest.versions(PACKAGE).get(PACKAGE)
    if not installed:
        yield Item(group, PACKAGE, "not installed", BUILD)
        return
    outcome = build_llamacpp.probe()
    if outcome.error:
        library = missing_library(outcome.error, gpus)
        if library:
            text, todo = f"{library.file} is missing", f"{library.install}, or: {BUILD}"
        else:
            text, todo = f"it does not load: {outcome.error}", f"{BUILD} --force"
        yield Item(group, PACKAGE, f"{installed}: {text}", todo)
        return
    info = build_llamacpp.build_info()
    if not info:
        text = f"{installed}, {STOCK}"
        yield Item(group, PACKAGE, text, BUILD)
        return
    flags = [f"{name}={value}" for name, value in sorted(info["defines"].items()) if "LLAMA" not in name]
    moved = info["cpu_key"] != build_llamacpp.cpu_key()
    todo = f"{BUILD}  (it was built on another CPU)" if moved else ""
    yield Item(group, PACKAGE, f"{installed}, built for {info['cpu']} ({' '.join(flags)})", todo)
    checks = ", ".join(f"{mode} {result}" for mode, result in info["check"].items())
    yield Item(group, "checked by decoding", checks, "; ".join(info["notes"]))
    if gpus and not info["gpu"]:
        yield Item(group, "GPU", "not used by this build", f"{BUILD} --cuda  (or: make install CUDA=1)")
    elif gpus:
        remedy = gpu_remedy(outcome.no_gpu, gpus) or f"{BUILD} --cuda --force"
        yield Item(group, "GPU", outcome.no_gpu or "used", remedy if outcome.no_gpu else "")


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt; empty where edge is installed without its source."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    rows = (line.split("#")[0].strip().split("==") for line in lines)
    return {row[0].lower(): row[1] for row in rows if len(row) == 2}


def _packages(gpus: list[hardware.GPU]) -> Iterator[Item]:
    try:
        requirements = metadata.requires("edge") or []
    except metadata.PackageNotFoundError:
        yield Item("packages", "edge", "not installed", "make install")
        return
    tested = pins()
    for extra in EXTRAS:
        wanted = [row for row in requirements if re.search(rf"extra == ['\"]{extra}['\"]", row)]
        names = [re.split(r"[ ;<>=!~\[]", row)[0] for row in wanted]
        installed = manifest.versions(*names)
        missing = [name for name in names if name not in installed]
        # A local part ("2.13.0+cpu") says how a package was built, not which version it is.
        other = [
            f"{name} {version} (tested: {tested[name.lower()]})"
            for name, version in installed.items()
            if tested.get(name.lower(), version).split("+")[0] != version.split("+")[0]
        ]
        text = ", ".join(f"{name} {version}" for name, version in installed.items()) or "none"
        for title, names in (("missing", missing), ("other than tested", other)):
            text += f"; {title}: {', '.join(names)}" if names else ""
        todo = f"pip install -c constraints.txt -e '.[{extra}]'" if missing or other else ""
        yield Item("packages", extra, text, todo)
    if gpus and manifest.versions("torch").get("torch", "").endswith("+cpu"):
        text = "built for the CPU: training does not use the GPU"
        yield Item("packages", "torch", text, "install torch for CUDA")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(argv)
    rows = items()
    if options.json:
        data = {
            "machine": hardware.describe(),
            "llama_cpp": build_llamacpp.build_info(),
            "items": [asdict(item) for item in rows],
        }
        sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="edge doctor", show_lines=False)
    for column in ("", "what", "found", "to do"):
        table.add_column(column, overflow="fold")
    group = ""
    for item in rows:
        if group and item.group != group:
            table.add_section()
        head = item.group if item.group != group else ""
        todo = f"[yellow]{escape(item.todo)}[/yellow]" if item.todo else "[green]ok[/green]"
        table.add_row(head, escape(item.name), escape(item.found), todo)
        group = item.group
    Console().print(table)
    return 0
