"""What is run in containers, with and without a Docker daemon: a run to be trained, a job, questions."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.support.runs import ROWS

# Run by Python in a container of the page.
START_A_JOB = """
import pathlib, time
from edge.jobs import job
started = job.start(pathlib.Path("jobs"), ["sleep", "1000"])
while started.state != "running":
    time.sleep(0.1)
"""
CONFIG = {
    "model_name_or_path": "models/smollm2-135m-instruct",
    "dataset": "rows",
    "output_dir": "runs/run",
    "finetuning_type": "lora",
    "quantization_bit": 4,
    "max_steps": 1,
}
QUESTION = {"model": "run", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def write_run(folder: Path) -> None:
    """models, data and runs in `folder`, with what `edge train runs/run.yaml` needs for one step."""
    for name in ("models", "runs", "data/datasets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "data" / "datasets" / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    info = '{"rows": {"file_name": "datasets/rows.json"}}'
    (folder / "data" / "dataset_info.json").write_text(info, encoding="utf-8")
    (folder / "runs" / "run.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    # llama.cpp's converter knows the tokenizers of real models alone.
    subprocess.run([sys.executable, "-m", "edge.cli", "pull"], cwd=folder, check=True)


def train_and_export(edge: Callable[..., object]) -> None:
    """Do so with what `write_run` wrote; `edge` runs the command of its words in a container."""
    for words in (("train", "runs/run.yaml"), ("merge", "runs/run"), ("export", "gguf", "runs/run")):
        start = time.monotonic()
        edge(*words)
        say(f"   edge {' '.join(words)}: {time.monotonic() - start:.0f} s")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def ask(port: int, path: str, body: object = None, *, key: str = "") -> tuple[int, str]:
    """Status and text of an answer; status 0 where nothing listens."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
