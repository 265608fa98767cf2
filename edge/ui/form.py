"""The configuration that is being made in the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from edge.artefact import json_file
from edge.errors import InputError
from edge.jobs.job import read

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_START = {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "lora_rank": 16, "logging_steps": 1,
          "dataset_dir": "data"}  # fmt: skip


class Form:
    """The configuration as the page holds it: values that differ from their defaults, by key.

    What is typed is kept on disk, so that another page goes on with it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = read(path) or dict(_START)

    def set(self, key: str, value: Any) -> None:
        if value in (None, "", []):
            self.values.pop(key, None)
        else:
            self.values[key] = number(value) if isinstance(value, str) else value
        self.keep()

    def replace(self, values: dict[str, Any]) -> None:
        self.values = values
        self.keep()

    def keep(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        json_file.write(self._path, self.values)

    @property
    def name(self) -> str:
        """The run's name. Raises InputError for one that is no folder's."""
        name = Path(str(self.values.get("output_dir", ""))).name
        if not _NAME.fullmatch(name):
            raise InputError("no name")
        return name

    def draft(self, changes: dict[str, Any]) -> Path:
        """Write the configuration with `changes` for a look at it; its path."""
        values = {"output_dir": "runs/preview", **self.values, **changes}
        path = self._path.with_name("preview.yaml")
        path.write_text(dump({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
        return path

    def yaml(self) -> str:
        return dump(self.values)


def dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


def number(text: str) -> Any:
    """What was typed, as a number where it is one: 1e-4 too, which YAML reads as text."""
    for kind in (int, float):
        try:
            return kind(text.strip())
        except ValueError:
            continue
    return text
