"""What one can talk to in the folder of the page: what it takes to serve it, and what is served now."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil

from edge.artefact import manifest
from edge.errors import EdgeError
from edge.jobs.job import Job, read
from edge.ui.workspace import Workspace

_ADAPTER = "adapter_config.json"
# Two answers at once, loaded at once.
_OPTIONS = ("--slots", "2", "--no-tune", "--port", "0")


@dataclass(frozen=True)
class Server:
    """A model that is loaded, or being loaded. name: its path in the workspace. url: "" until it is ready."""

    name: str
    job: Job

    @property
    def url(self) -> str:
        line = self.job.last_line
        return str(line["url"]) if line.get("stage") == "ready" else ""

    @property
    def memory(self) -> int:
        """Bytes that its processes hold."""
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            verb = psutil.Process(self.job.record["verb"]["pid"])
            for process in (verb, *verb.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total


def names(workspace: Workspace) -> list[str]:
    """Paths of everything that can be talked to: models, then of each run its stages and checkpoints."""
    found = [workspace.short(path) for path in workspace.models()]
    for run in workspace.runs():
        folder = workspace.short(run.folder)
        parts = [name for name in reversed(run.checkpoints) if (run.folder / name / _ADAPTER).is_file()]
        found += [f"{folder}/{part}" for part in (*run.stages, *parts)]
    return found


def servers(workspace: Workspace) -> dict[str, Server]:
    """By name what the chat has loaded, the loading ones too."""
    states = ("waiting", "running")
    jobs = [job for job in workspace.jobs() if job.argv[:2] == ["edge", "serve"] and job.state in states]
    return {name: Server(name, job) for job in jobs if (name := _name(job.argv))}


def needed(workspace: Workspace, name: str) -> tuple[list[list[str]], str, str]:
    """(what makes the files that `name` lacks, the path to load, the adapter on it or "")

    An adapter is put on its base at run time, so nothing is merged. Raises EdgeError where `name` or the
    adapter's base is gone.
    """
    path = workspace.root / name
    if not path.is_dir():
        raise EdgeError(f"no such folder: {name}")
    if not (path / _ADAPTER).is_file():
        return *_whole(path, workspace), ""
    missing, base = _whole(_base(path, workspace), workspace)
    folder = path.parent if path.name == "adapter" else path
    target = folder / "lora"
    if not _made(target, path):
        replace = ["--overwrite"] if target.exists() else []
        missing = [*missing, ["export", "lora", workspace.short(folder), *replace]]
    return missing, base, workspace.short(next(target.glob("*.gguf"), target))


def commands(workspace: Workspace, name: str) -> list[list[str]]:
    """What makes the files that serving `name` needs; last the serving itself. Raises as `needed`."""
    missing, path, lora = needed(workspace, name)
    return [
        *missing,
        ["serve", path, *(["--lora", f"{name}={lora}"] if lora else ["--name", name]), *_OPTIONS],
    ]


def trained(workspace: Workspace, name: str) -> dict[str, str]:
    """The keys of a configuration that trains `name` further; of a checkpoint its run, as that ended.

    Raises EdgeError for a checkpoint of a run that has not.
    """
    if name.startswith("models/"):
        return {"model_name_or_path": name}
    run = (workspace.root / name).parent
    if (run / "adapter" / _ADAPTER).is_file():
        base = workspace.short(_base(run / "adapter", workspace))
        return {"model_name_or_path": base, "adapter_name_or_path": workspace.short(run)}
    if not (run / "merged").is_dir():
        raise EdgeError(f"the training of {workspace.short(run)} has not ended", "resume it first")
    return {"model_name_or_path": workspace.short(run / "merged")}  # all weights were trained


def _whole(path: Path, workspace: Workspace) -> tuple[list[list[str]], str]:
    """(what makes the GGUF, the path to serve) of a folder with whole weights, or with a GGUF or ONNX."""
    kind = path.name if path.name in ("gguf", "onnx") else ""
    if kind or any(path.glob("*.gguf")):
        return [], workspace.short(path)
    folder = path.parent if path.name == "merged" else path
    target = folder / "gguf"
    served = workspace.short(target)
    if _made(target, path):
        return [], served
    return [
        ["export", "gguf", workspace.short(folder), *(["--overwrite"] if target.exists() else [])]
    ], served


def _made(target: Path, source: Path) -> bool:
    """Whether `target` was made of `source` as that is now."""
    about, origin = read(target / manifest.FILE), read(source / manifest.FILE)
    if about is None:
        return False
    return origin is None or origin["digest"] in [parent["digest"] for parent in about["parents"]]


def _base(adapter: Path, workspace: Workspace) -> Path:
    """The folder of the model under an adapter."""
    about, config = read(adapter / manifest.FILE) or {}, read(adapter / _ADAPTER) or {}
    name = (about.get("settings") or {}).get("model_name_or_path") or config.get("base_model_name_or_path")
    # A path of the workspace, or one from anywhere.
    folder = workspace.root / str(name or "")
    if not name or not folder.is_dir():
        raise EdgeError(
            f"the base of {workspace.short(adapter)} is {name}, which is no folder here",
            "export the run as GGUF in the Export tab, or get its base in the Model tab",
        )
    return folder


def _name(argv: list[str]) -> str:
    """Of a command that `commands` made the name of what it serves; "" for another one."""
    if "--lora" in argv:
        return argv[argv.index("--lora") + 1].partition("=")[0]
    return argv[argv.index("--name") + 1] if "--name" in argv else ""
