"""What the page shows of the folder that it was started in: models, runs and jobs, all of it on disk."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edge.artefact import json_file, manifest
from edge.errors import EdgeError, InputError
from edge.jobs import job as jobs
from edge.jobs.job import Job
from edge.machine import hardware

# Of these one at a time runs on a device.
_HEAVY = ("train", "merge", "export", "verify", "eval", "bench", "predict")
STAGES = ("adapter", "merged", "gguf", "onnx")


@dataclass(frozen=True)
class Run:
    """A training's folder. settings: its configuration; log: lines of trainer_log.jsonl."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def stages(self) -> list[str]:
        return [stage for stage in STAGES if (self.folder / stage / manifest.FILE).is_file()]

    @property
    def checkpoints(self) -> list[str]:
        found = self.folder.glob("checkpoint-*")
        return [path.name for path in sorted(found, key=lambda path: int(path.name[11:]))]

    @property
    def settings(self) -> dict[str, Any]:
        for stage in ("adapter", "merged"):
            if about := jobs.read(self.folder / stage / manifest.FILE):
                return dict(about.get("settings") or {})
        path = self.folder.with_name(f"{self.name}.yaml")
        return read_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def configuration(self) -> dict[str, Any]:
        """The keys that make the same training again: those of its YAML, or of its settings."""
        path = self.folder.with_name(f"{self.name}.yaml")
        if path.is_file():
            return read_yaml(path.read_text(encoding="utf-8"))
        keys, settings = schema()["properties"], self.settings
        return {
            key: value
            for key, value in settings.items()
            if key in keys and value not in (None, keys[key].get("default"))
        }

    @property
    def results(self) -> dict[str, Any]:
        """Figures of the training and of `edge eval`."""
        files = ("all_results.json", "predict_results.json")
        return {key: value for name in files for key, value in (jobs.read(self.folder / name) or {}).items()}

    @property
    def log(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "trainer_log.jsonl")

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Sample answers at the evaluations."""
        return read_lines(self.folder / "eval_answers.jsonl")


@dataclass(frozen=True)
class Workspace:
    root: Path

    @property
    def jobs_folder(self) -> Path:
        return self.root / "jobs"

    def jobs(self) -> list[Job]:
        return jobs.jobs(self.jobs_folder)

    def job(self, verb: str, target: str = "") -> Job | None:
        """The last job of a verb; target: among its arguments. A plan of a training is none."""
        found = [job for job in self.jobs() if job.argv[:2] == ["edge", verb] and target in (*job.argv, "")
                 and "--plan" not in job.argv]  # fmt: skip
        return found[-1] if found else None

    def start(self, argv: list[str]) -> Job:
        """Start `edge ARGV` as a job."""
        device = ("cuda" if hardware.gpus() else "cpu") if argv[0] in _HEAVY else ""
        return jobs.start(self.jobs_folder, ["edge", *argv], device=device, cwd=self.root)

    def models(self) -> list[Path]:
        """Folders in models/ that can be trained or served."""
        folders = (self.root / "models").glob("*")
        return sorted(path for path in folders if any((path / name).is_file() for name in _MODEL_FILES))

    def runs(self) -> list[Run]:
        """Trainings in runs/, the last changed first."""
        folders = [path for path in (self.root / "runs").glob("*") if path.is_dir() and path.name[0] != "."]
        order = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
        return [run for path in order if (run := Run(path)).log or run.stages or run.checkpoints]

    def free_name(self, name: str) -> str:
        """`name`, or it with a number behind it, that no run has yet."""
        runs = self.root / "runs"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(one for one in names if not any((runs / path).exists() for path in (one, f"{one}.yaml")))

    def short(self, path: Path) -> str:
        """A path as a command of this folder would have it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def working(self, run: Run) -> list[Job]:
        """Jobs on the run that have not ended; of the chat's servers those of its own files."""
        own = self.short(run.folder)
        config = f"{own}.yaml"
        return [
            job
            for job in self.jobs()
            if job.state in jobs.RUNNING
            and any(word in (own, config) or f"{own}/" in word for word in job.argv)
        ]

    def delete(self, run: Run) -> None:
        """Remove a run's folder and its configuration. Raises EdgeError while a job of it runs."""
        if self.working(run):
            raise EdgeError(f"a job of {run.name} runs", "stop it first")
        shutil.rmtree(run.folder)
        run.folder.with_name(f"{run.name}.yaml").unlink(missing_ok=True)

    def ask(self, *argv: str, timeout: float = 120) -> dict[str, Any]:
        """The result of `edge ARGV --progress json`. Raises EdgeError with the command's own message."""
        command = [sys.executable, "-m", "edge.cli", *argv, "--progress", "json"]
        done = subprocess.run(
            command, cwd=self.root, capture_output=True, encoding="utf-8", timeout=timeout, check=False
        )
        last = (json_file.lines(done.stdout) or [{}])[-1]
        if done.returncode:
            raise EdgeError(last.get("error") or done.stderr.strip(), last.get("hint", ""))
        return dict(last.get("result", {}))


_MODEL_FILES = (manifest.FILE, "config.json")


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a training's configuration."""
    command = [sys.executable, "-m", "edge.cli", "train", "--json-schema"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return dict(json.loads(done.stdout))


def read_yaml(text: str) -> dict[str, Any]:
    """A configuration's keys and values. Raises InputError for what is no mapping."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"no YAML: {error}") from error
    if not isinstance(value, dict):
        raise InputError("no configuration: it has no keys and values")
    return {str(key): one for key, one in value.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return json_file.lines(path.read_text(encoding="utf-8")) if path.is_file() else []
