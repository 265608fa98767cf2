"""`edge doctor`: what this machine has, what of it is used, and the command for what is missing."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge.artefact import manifest
from edge.errors import UnavailableError
from edge.machine import build_llamacpp, hardware, report
from edge.machine.cuda_libraries import gpu_remedy, missing_library
from edge.machine.llamacpp_source import BUILD, PACKAGE, STOCK
from edge.setup import (
    EXTRAS,
    PINS,
    install_command,
    pip_command,
    python_of,
    requirements,
    shell,
    source_tree,
    this_python,
    torch_kind,
)

_READ_ONLY = "this environment cannot be written by this user: in a container, take the image that has them"


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
    groups = (_machine(hardware.describe()), _gpus(gpus), _llamacpp(gpus), _onnx(gpus), _packages(gpus))
    # This environment's Python, which need not be the one that is called `python`.
    own = BUILD.replace("python", shell([this_python()]), 1)
    return [replace(item, todo=item.todo.replace(BUILD, own)) for group in groups for item in group]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _machine(machine: dict[str, Any]) -> Iterator[Item]:
    yield Item("machine", "system", machine["os"])
    yield _python(machine["python"])
    flags = " ".join(machine["flags"]) or "features unknown"
    yield Item("machine", "CPU", f"{machine['cpu']} ({flags})")
    cores = f"{machine['physical_cores'] or '?'} cores, {machine['logical_cpus']} logical"
    yield Item("machine", "threads used", f"{machine['threads']} ({cores})")
    total, available = _gib(machine["memory_total"]), _gib(machine["memory_available"])
    unified = ", unified: the GPU uses it too" if hardware.apple_gpu() else ""
    yield Item("machine", "memory", f"{total}, {available} available{unified}")
    quota, limit = hardware.cpu_quota(), hardware.memory().limit
    limits = [f"{quota:g} CPUs"] if quota is not None else []
    limits += [f"{manifest.in_units(limit)} of memory"] if limit else []
    yield Item("machine", "container's limits", ", ".join(limits) or "none")
    free = shutil.disk_usage(".").free
    todo = "" if free > 10 * 2**30 else "free some disk space: a run takes up to 10 GiB"
    yield Item("machine", "disk here", f"{_gib(free)} free", todo)
    try:
        yield Item("machine", "cache", f"{hardware.writable_cache('').absolute()} can be written")
    except UnavailableError as error:
        yield Item("machine", "cache", f"{error.message}: nothing is tuned or built", error.hint)


def _python(version: str) -> Item:
    """Which Python runs, and which one the source tree's edge belongs to."""
    tree = source_tree()
    own = python_of(tree / ".venv") if tree else None
    todo = ""
    if own and own.is_file() and not own.parent.parent.samefile(sys.prefix):
        todo = (
            f"the environment of this folder is another one: {shell([str(own), '-m', 'edge.cli', 'doctor'])}"
        )
    return Item("machine", "Python", f"{version}, {sys.executable}", todo)


def _gpus(gpus: list[hardware.GPU]) -> Iterator[Item]:
    if chip := hardware.apple_gpu():
        yield Item("gpu", "Metal", f"{chip}, in the system's memory")
    elif not gpus:
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
        if build_llamacpp.build_info():
            yield Item(group, "compiler", "none, and none is needed: llama.cpp is installed")
        else:
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
    moved = info["cpu_key"] not in ("", build_llamacpp.cpu_key())  # "": for more than one CPU
    todo = f"{BUILD}  (it was made or checked on another CPU)" if moved else ""
    text = info.get("stock") or f"built for {info['cpu']} ({' '.join(flags)})"
    yield Item(group, PACKAGE, f"{installed}, {text}", todo)
    checks = ", ".join(f"{mode} {result}" for mode, result in info["check"].items())
    yield Item(group, "checked by decoding", checks, "; ".join(info["notes"]))
    if hardware.apple_gpu():
        problem = outcome.no_gpu or f"its check: {info['check'].get('gpu', 'not made')}"
        used = info["gpu"] and not outcome.no_gpu
        yield Item(group, "GPU", "used" if used else problem, "" if used else f"{BUILD} --force")
    elif gpus and not (info["gpu"] or info.get("cuda")):
        yield Item(group, "GPU", "not used by this build", f"{BUILD} --cuda")
    elif gpus:
        remedy = gpu_remedy(outcome.no_gpu, gpus) or f"{BUILD} --cuda --force"
        yield Item(group, "GPU", outcome.no_gpu or "used", remedy if outcome.no_gpu else "")


def _onnx(gpus: list[hardware.GPU]) -> Iterator[Item]:
    """The packages of ONNX Runtime: one of them, and the one that fits."""
    have = manifest.versions("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnx")
    text = ", ".join(f"{name} {version}" for name, version in have.items()) or "not installed"
    todo = ""
    if "onnxruntime" not in have and "onnxruntime-gpu" not in have:
        todo = install_command("serve", "onnx")
    elif "onnxruntime" in have and "onnxruntime-gpu" in have:
        text += ": two packages in one folder, the later one hides the other"
        wrong = "onnxruntime" if gpus else "onnxruntime-gpu"
        right = "onnxruntime-gpu" if gpus else "onnxruntime"
        again = pip_command("install", "--force-reinstall", "--no-deps", right)
        todo = f"{pip_command('uninstall', wrong)}, then {again}"
    elif gpus and "onnxruntime-gpu" not in have:
        text += ": for the CPU, the GPU is not used"
        todo = f"{install_command('onnx')} --cuda"
    yield Item("onnx", "ONNX Runtime", text, todo)


def pins() -> dict[str, str]:
    """Package -> version that was tested."""
    lines = PINS.read_text(encoding="utf-8").splitlines()
    rows = (line.split("#")[0].strip().split("==") for line in lines)
    return {row[0].lower(): row[1] for row in rows if len(row) == 2}


def _packages(gpus: list[hardware.GPU]) -> Iterator[Item]:
    tested = pins()
    # What edge is developed with is of no use without its sources.
    extras = [extra for extra in EXTRAS if extra != "dev" or source_tree()]
    for extra in extras:
        try:
            wanted = requirements(extra, own=True)
        except UnavailableError as error:
            yield Item("packages", "edge", error.message, install_command("serve"))
            return
        names = [re.split(r"[ ;<>=!~\[]", row)[0] for row in wanted]
        if manifest.versions("onnxruntime-gpu"):
            names = ["onnxruntime-gpu" if name == "onnxruntime" else name for name in names]
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
        todo = install_command(extra) if os.access(sysconfig.get_path("purelib"), os.W_OK) else _READ_ONLY
        yield Item("packages", extra, text, todo if missing or other else "")
    if gpus and torch_kind(Path(sysconfig.get_path("purelib"))) == "cpu":
        yield Item("packages", "torch", "built for the CPU: training does not use the GPU", _cuda_torch())


def _cuda_torch() -> str:
    if sys.platform == "win32":
        return f"{install_command('train')} --cuda  (the package index has only the CPU's for Windows)"
    return pip_command("install", "--force-reinstall", "--no-deps", f"torch=={pins()['torch']}")


def _report(rows: list[Item]) -> int:
    sys.stderr.write("testing the verbs on a toy, about a minute:\n")
    outcomes = report.self_test()
    text = report.text([(row.group, row.name, row.found, row.todo) for row in rows], outcomes)
    Path(report.FILE).write_text(text, encoding="utf-8")
    failed = [row["stage"] for row in outcomes if row["problem"]]
    sys.stdout.write(f"{report.FILE}: {len(rows)} lines on this machine; of {len(outcomes)} stages ")
    sys.stdout.write(f"{len(failed)} failed: {', '.join(failed)}\n" if failed else "none failed\n")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--report",
        action="store_true",
        help=f"write {report.FILE}, with nothing personal in it: this, and the verbs on a toy (a minute)",
    )
    options = parser.parse_args(argv)
    rows = items()
    if options.report:
        return _report(rows)
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
