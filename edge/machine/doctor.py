"""`edge doctor`: what this machine has, what of it is used, and the command for what is missing."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge.errors import UnavailableError
from edge.machine import build_llamacpp, hardware
from edge.machine.llamacpp_source import CONSTRAINTS, PACKAGE

EXTRAS = ("serve", "onnx", "train", "export-onnx", "bench", "dev")
BUILD = "python -m edge.machine.build_llamacpp"

# CUDA library -> package, and what to add to its file's number for the CUDA major (None: not derivable).
_LIBRARIES: dict[str, tuple[str, int | None]] = {
    "cudart": ("nvidia-cuda-runtime", 0),
    "cublas": ("nvidia-cublas", 0),
    "cublaslt": ("nvidia-cublas", 0),
    "nvrtc": ("nvidia-cuda-nvrtc", 0),
    "nvjitlink": ("nvidia-nvjitlink", 0),
    "cufft": ("nvidia-cufft", 1),
    "cusparse": ("nvidia-cusparse", None),
    "cusolver": ("nvidia-cusolver", None),
    "curand": ("nvidia-curand", None),
    "cudnn": ("nvidia-cudnn", None),
    "nccl": ("nvidia-nccl", None),
}
_SUFFIX_FROM_13 = ("nvidia-cudnn", "nvidia-nccl")  # the others lost theirs with CUDA 13


@dataclass(frozen=True)
class Item:
    """One line: what was looked at, what is there, and what to do where something is missing."""

    group: str
    name: str
    found: str
    todo: str = ""


@dataclass(frozen=True)
class MissingLibrary:
    """A CUDA library that a loader did not find: its file, the CUDA major it belongs to, and its package."""

    file: str
    cuda: str
    package: str


def missing_library(error: str, driver_cuda: str = "") -> MissingLibrary | None:
    """The CUDA library that a loader's message is about; None where it names none.

    Understands `libcublas.so.13: cannot open shared object file` and `... cublas64_13.dll ...`. Where the
    file's number is not CUDA's, the major is that of `driver_cuda` (such as "12.9").
    """
    found = re.search(r"lib(\w+?)\.so\.(\d+)[\d.]*", error) or re.search(r"\b(\w+?)64_(\d+)\w*\.dll", error)
    if not found or found[1].lower() not in _LIBRARIES:
        return None
    package, add = _LIBRARIES[found[1].lower()]
    cuda = driver_cuda.split(".")[0] if add is None else str(int(found[2]) + add)
    if cuda and (int(cuda) < 13 or package in _SUFFIX_FROM_13):
        package += f"-cu{cuda}"
    return MissingLibrary(found[0], cuda, package)


def card_todo(lacks: str, cards: list[hardware.GPU]) -> str:
    """What helps where a card cannot be used, by what CUDA says of it; "" where nothing is known."""
    card = cards[0] if cards else None
    if "driver version is insufficient" in lacks:
        knows = f" ({card.driver} knows CUDA up to {card.cuda or 'an unknown version'})" if card else ""
        return f"install a newer NVIDIA driver{knows}, or build for its CUDA: {BUILD} --cuda --force"
    if "busy or unavailable" in lacks:
        return "another process holds the card for itself: `nvidia-smi` names it"
    if "no CUDA-capable device" in lacks:
        return "CUDA_VISIBLE_DEVICES may hide the card: unset it"
    if library := missing_library(lacks, card.cuda if card else ""):
        return f"pip install {library.package}  (CUDA {library.cuda or 'major unknown'})"
    return ""


def old_driver(built_for: str, cards: list[hardware.GPU]) -> str:
    """What to say where the driver's CUDA is older than the major that a library is built for, or ""."""
    wanted, _, _ = built_for.partition(".")
    known, _, _ = cards[0].cuda.partition(".") if cards else ("", "", "")
    if not (wanted.isdigit() and known.isdigit()) or int(known) >= int(wanted):
        return ""
    return (
        f"it is built for CUDA {built_for}, and the driver {cards[0].driver} knows CUDA up to "
        f"{cards[0].cuda}: install a newer NVIDIA driver"
    )


def load_error() -> str:
    """What llama.cpp's loader says, asked in a child process; empty when it loads."""
    command = [sys.executable, "-c", "import llama_cpp.llama_cpp"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "no answer in 60 s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def items() -> list[Item]:
    """Everything that is looked at, in the order it is shown."""
    machine = hardware.describe()
    cards = hardware.gpus()
    return [*_machine(machine), *_gpu(cards), *_llama(cards), *_packages(cards)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _machine(machine: dict[str, Any]) -> list[Item]:
    cores = f"{machine['physical_cores'] or '?'} cores, {machine['logical_cpus']} logical"
    quota = hardware.cpu_quota()
    limit = f", the container allows {quota:g}" if quota is not None else ""
    free = shutil.disk_usage(".").free
    return [
        Item("machine", "system", f"{machine['os']}, Python {machine['python']}"),
        Item(
            "machine", "processor", f"{machine['cpu']} ({' '.join(machine['flags']) or 'features unknown'})"
        ),
        Item("machine", "threads used", f"{machine['threads']} ({cores}{limit})"),
        Item(
            "machine",
            "memory",
            f"{_gib(machine['memory_total'])}, {_gib(machine['memory_available'])} available",
        ),
        Item(
            "machine",
            "disk here",
            f"{_gib(free)} free",
            "" if free > 10 * 2**30 else "a run takes up to 10 GiB",
        ),
    ]


def _gpu(cards: list[hardware.GPU]) -> list[Item]:
    if not cards:
        return [Item("gpu", "NVIDIA", "none (nvidia-smi shows no card): everything runs on the processor")]
    return [
        Item(
            "gpu",
            f"card {card.index}",
            f"{card.name}, {_gib(card.memory_total)} ({_gib(card.memory_free)} free), driver {card.driver}, "
            f"CUDA up to {card.cuda or 'unknown'}",
        )
        for card in cards
    ]


def _llama(cards: list[hardware.GPU]) -> list[Item]:
    rows = []
    try:
        built_by = build_llamacpp.compiler()
        rows.append(Item("llama.cpp", "compiler", f"{built_by.kind}: {built_by.version or 'found'}"))
    except UnavailableError as error:
        rows.append(Item("llama.cpp", "compiler", "none", error.hint))
    installed = _version(PACKAGE)
    info = build_llamacpp.build_info()
    if not installed:
        return [*rows, Item("llama.cpp", PACKAGE, "not installed", BUILD)]
    if problem := load_error():
        library = missing_library(problem, cards[0].cuda if cards else "")
        if library:
            todo = f"pip install {library.package}  (CUDA {library.cuda or 'major unknown'}), or: {BUILD}"
            return [*rows, Item("llama.cpp", PACKAGE, f"{installed}: {library.file} is missing", todo)]
        return [
            *rows,
            Item("llama.cpp", PACKAGE, f"{installed} does not load: {problem}", f"{BUILD} --force"),
        ]
    if not info:
        text = f"{installed}, built by something else: flags unknown, not checked"
        return [*rows, Item("llama.cpp", PACKAGE, text, BUILD)]
    flags = " ".join(
        f"{name}={value}" for name, value in sorted(info["defines"].items()) if "LLAMA" not in name
    )
    moved = info["cpu_key"] != build_llamacpp.cpu_key()
    rows.append(
        Item(
            "llama.cpp",
            PACKAGE,
            f"{installed}, built for {info['cpu']} ({flags})",
            f"{BUILD}  (it was built on another processor)" if moved else "",
        )
    )
    checks = ", ".join(f"{mode} {outcome}" for mode, outcome in info["check"].items())
    rows.append(Item("llama.cpp", "checked by decoding", checks, "; ".join(info["notes"])))
    if cards and not info["gpu"]:
        todo = f"{BUILD} --cuda  (or: make install CUDA=1)"
        rows.append(Item("llama.cpp", "card", "not used by this build", todo))
    elif cards:
        lacks = build_llamacpp.no_card()
        todo = (card_todo(lacks, cards) or f"{BUILD} --cuda --force") if lacks else ""
        rows.append(Item("llama.cpp", "card", lacks or "used", todo))
    return rows


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt; empty where edge is installed without its source."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    rows = (line.split("#")[0].strip().split("==") for line in lines)
    return {row[0].lower(): row[1] for row in rows if len(row) == 2}


def _packages(cards: list[hardware.GPU]) -> list[Item]:
    try:
        requirements = metadata.requires("edge") or []
    except metadata.PackageNotFoundError:
        return [Item("packages", "edge", "not installed", "make install")]
    tested = pins()
    rows = []
    for extra in EXTRAS:
        wanted = [row for row in requirements if re.search(rf"extra == ['\"]{extra}['\"]", row)]
        names = [re.split(r"[ ;<>=!~\[]", row)[0] for row in wanted]
        have = {name: _version(name) for name in names}
        missing = [name for name, version in have.items() if not version]
        # A local part ("2.13.0+cpu") says how it was built, not which version it is.
        other = [
            f"{name} {version} (tested: {tested[name.lower()]})"
            for name, version in have.items()
            if version and tested.get(name.lower(), version).split("+")[0] != version.split("+")[0]
        ]
        found = ", ".join(f"{name} {version}" for name, version in have.items() if version) or "none"
        todo = f"pip install -c constraints.txt -e '.[{extra}]'" if missing or other else ""
        if missing:
            found += f"; missing: {', '.join(missing)}"
        if other:
            found += f"; other than tested: {', '.join(other)}"
        rows.append(Item("packages", extra, found, todo))
    if cards and _version("torch").endswith("+cpu"):
        rows.append(
            Item(
                "packages",
                "torch",
                "built for the processor: training does not use the card",
                "install torch for CUDA",
            )
        )
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(argv)
    found = items()
    if options.json:
        data = {
            "machine": hardware.describe(),
            "llama_cpp": build_llamacpp.build_info(),
            "items": [asdict(item) for item in found],
        }
        sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        return 0
    table = Table(title="edge doctor", show_lines=False)
    for column in ("", "what", "found", "to do"):
        table.add_column(column, overflow="fold")
    group = ""
    for item in found:
        if group and item.group != group:
            table.add_section()
        head = item.group if item.group != group else ""
        todo = f"[yellow]{escape(item.todo)}[/yellow]" if item.todo else "[green]ok[/green]"
        table.add_row(head, escape(item.name), escape(item.found), todo)
        group = item.group
    Console().print(table)
    return 0
