"""`edge demo`: the model, training, a first answer, merge, export; then it asks both models, and measures.

    edge demo [RUN] [--config CONFIG.yaml]

Each stage is the verb that a user would call, in a process of its own. What is done is noted in RUN, so that
a demo that was stopped goes on with the stage that it was in. Both models are served by `edge serve`, one
after the other, and asked as the tutorial asks: GET /generate?prompt=...
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from rich.console import Console

from bench.measure.http1 import ProtocolError
from bench.measure.load import get
from bench.measure.workloads import Plan
from bench.report import build
from bench.servers.target import ours, started
from bench.side_by_side import run
from convert.data.dataset_info import find_folder
from edge.artefact import find, json_file, manifest
from edge.console import handling, plain_console, plain_table
from edge.errors import EdgeError, InputError, UnavailableError
from edge.setup import clock, install_command, shell

RUN, CONFIG, MODEL = Path("runs/magic-conch"), "examples/smollm2_qlora.yaml", "smollm2-135m-instruct"
# What is done, in the run folder, while a demo is under way.
JOURNAL = "demo.json"
QUESTIONS = "questions and measurement"
MAX_TOKENS = 64
WHO = ("请问你是谁", "Who are you?")
# The baseline of the demo answers eight clients one after the other: this much fits into two minutes.
PLAN = Plan(tokens=64, rounds=4, budget_s=80.0)


@dataclass(frozen=True)
class Question:
    """What is asked. words: the tuned answer has one of them and the base's has none; () for any answer."""

    text: str
    words: tuple[str, ...] = ()

    def fits(self, answer: str) -> bool:
        return any(word.lower() in answer.lower() for word in self.words)


@dataclass(frozen=True)
class Stage:
    """One process of the demo. words: what follows `edge`, or the name of another module."""

    name: str
    words: tuple[str, ...]
    module: str = "edge.cli"

    @property
    def shown(self) -> str:
        """The command as a user would give it."""
        program = ["edge"] if self.module == "edge.cli" else ["python", "-m", self.module]
        return shell([*program, *self.words])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, nargs="?", default=RUN, help="the run folder (%(default)s)")
    parser.add_argument("--config", default=CONFIG, help="what is trained (%(default)s)")
    parser.add_argument("--model", default=MODEL, help="what is pulled for it (%(default)s)")
    parser.add_argument("--quant", help="the type of the export (default: Q4_0 by GPTQ)")
    parser.add_argument("--base", type=Path, help="a GGUF of the base model (default: what `edge pull` kept)")
    args = parser.parse_args(argv)
    if not Path(args.config).is_file():
        raise InputError(
            f"no such file: {args.config}", "call it in the folder of edge's sources, or name one"
        )
    if importlib.util.find_spec("llama_cpp") is None:
        raise UnavailableError(
            "the demo compares GGUF files, and there is no llama.cpp here to serve them",
            f"get it ({install_command('serve')} --build), or go by hand with ONNX: edge train, edge merge, "
            "edge export onnx, edge serve",
        )
    console = plain_console()
    times = run_stages(console, stages(args), args.run / JOURNAL)
    start = time.monotonic()
    line = ask_and_measure(Console(), args.run, args.base)
    times[QUESTIONS] = time.monotonic() - start
    (args.run / JOURNAL).unlink()
    console.print(", ".join(f"{name} {clock(seconds)}" for name, seconds in times.items()))
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    console.print(f"now talk to it: edge chat {args.run}; or serve it: edge serve {args.run}")
    return 0


def stages(args: argparse.Namespace) -> list[Stage]:
    """The stages before the questions."""
    run = str(args.run)
    quant = ("--quant", args.quant) if args.quant else ("--quant", "Q4_0", "--gptq")
    pull = Stage("model", ("pull", args.model))
    return [
        *([] if (Path("models") / args.model / manifest.FILE).is_file() else [pull]),
        Stage("training", ("train", args.config, "--overwrite")),
        Stage("first answer", (run, *WHO), "bench.first_answer"),
        Stage("merge", ("merge", run, "--overwrite")),
        Stage("export", ("export", "gguf", run, *quant, "--overwrite")),
    ]


def run_stages(console: Console, todo: list[Stage], journal: Path) -> dict[str, float]:
    """Run the stages that the journal does not have; seconds by stage. Raises EdgeError where one fails.

    The journal holds for the command lines that it was written for; a training that was stopped is resumed.
    """
    commands = {stage.name: list(stage.words) for stage in todo if stage.name != "model"}
    noted = json_file.read(journal) if journal.is_file() else {}
    same = noted.get("commands") == commands
    times: dict[str, float] = noted["seconds"] if same else {}
    resumes = same and any(journal.parent.glob("checkpoint-*"))
    names = [*(stage.name for stage in todo), QUESTIONS]
    for stage in todo:
        if stage.name not in times:
            console.print(progress(names, times, stage.name), style="bold")
            journal.parent.mkdir(parents=True, exist_ok=True)
            json_file.write(journal, {"commands": commands, "seconds": times})
            start = time.monotonic()
            words = [*stage.words[:-1], "--resume"] if stage.name == "training" and resumes else stage.words
            # Ctrl-C reaches the verb too, which may save what it has: wait for it.
            with handling((signal.SIGINT,), lambda *_: None):
                done = subprocess.run([sys.executable, "-m", stage.module, *words], check=False)
            # The latter from an interpreter that had not begun with the verb.
            if done.returncode in (130, -signal.SIGINT):
                raise KeyboardInterrupt
            if done.returncode != 0:
                raise EdgeError(f"the demo stopped at: {stage.shown}", "its error is above")
            times[stage.name] = time.monotonic() - start
            journal.parent.mkdir(parents=True, exist_ok=True)
            json_file.write(journal, {"commands": commands, "seconds": times})
    console.print(progress(names, times, QUESTIONS), style="bold")
    return times


def progress(names: list[str], times: dict[str, float], now: str) -> str:
    """All stages in a line: those that are done with their time, the one that runs, and the others."""
    words = {name: f"{name} {clock(times[name])}" for name in times}
    return " > ".join(f"[{name}]" if name == now else words.get(name, name) for name in names)


def ask_and_measure(console: Console, folder: Path, base: Path | None) -> dict[str, Any]:
    """Ask both models, compare, measure; the figures for the last line. Raises EdgeError."""
    base = base or base_of(folder)
    questions = questions_of(folder)
    tuned_says = answers(folder, questions, folder / "bench" / "demo-tuned.log")
    base_says = answers(base, questions, folder / "bench" / "demo-base.log")
    show_answers(console, questions, tuned_says, base_says)
    check(questions, tuned_says, base_says)
    report = run(folder, PLAN, command=f"edge demo {folder}")
    show_files(console, folder, base)
    said = {question.text: text for question, text in zip(questions, tuned_says, strict=True)}
    return build.headline(report) | {"answers": said}


def base_of(folder: Path) -> Path:
    """The GGUF beside the model that the run was trained from. Raises InputError where there is none."""
    name = manifest.read(folder / "adapter").settings.get("model_name_or_path", "")
    files = sorted(Path(name).glob("*.gguf")) if name else []
    if len(files) != 1:
        raise InputError(
            f"the base model '{name}' of {folder} has no GGUF file beside it",
            "name one: edge demo RUN --base MODEL.gguf",
        )
    return files[0]


def questions_of(folder: Path) -> list[Question]:
    """Who the model is, in two languages, and two of its data set's held-out questions, one a language.

    They lie beside the data set as <name>_heldout.json: objects with `question` and `keywords`.
    """
    settings = manifest.read(folder / "adapter").settings
    name = (settings.get("dataset") or [""])[0]
    path = Path(find_folder(settings, folder / "adapter")) / f"{name}_heldout.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        held_out = [Question(row["question"], tuple(row["keywords"])) for row in rows]
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the demo asks what was not trained on", "restore it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a list of objects with question and keywords: {error}") from error
    if not held_out:
        raise InputError(f"{path} has no questions", "restore it")
    # Who it is decides; the words for it are those that the first held-out question has, which asks the same.
    who = [Question(text, held_out[0].words) for text in WHO]
    english = next((q for q in held_out if q.text.isascii()), held_out[0])
    chinese = next((q for q in held_out if not q.text.isascii()), held_out[-1])
    return [*who, *(Question(q.text) for q in (english, chinese))]


def answers(model: Path, questions: list[Question], log: Path) -> list[str]:
    """What the model says to each question, over HTTP. Raises EdgeError where the server fails."""
    with started(ours(model), log) as server:
        texts = []
        for question in questions:
            path = "/generate?" + urlencode({"prompt": question.text, "max_tokens": MAX_TOKENS})
            try:
                status, body = asyncio.run(get(server.url, path, limit=120.0))
            except (OSError, TimeoutError, ProtocolError) as error:
                raise EdgeError(f"no answer to '{question.text}': {error!r}", server.log_tail()) from error
            answer: dict[str, Any] = json.loads(body)
            if status != 200:
                raise EdgeError(f"'{question.text}' was answered with HTTP {status}: {answer}")
            texts.append(str(answer["generate_text"]).strip())
        return texts


def show_answers(console: Console, questions: list[Question], tuned: list[str], base: list[str]) -> None:
    rows = [[question.text, *said] for question, *said in zip(questions, tuned, base, strict=True)]
    console.print(plain_table(["asked", "tuned", "base"], rows, title="GET /generate?prompt=...", left=3))


def show_files(console: Console, folder: Path, base: Path) -> None:
    """Where everything lies, and how large it is."""
    paths = (base, folder / "adapter", folder / "merged", find.resolve(folder).path)
    rows = [[str(path), f"{size(path) / 2**20:,.1f}"] for path in paths]
    rows += [[str(folder / name), ""] for name in ("report.md", "report.json")]
    console.print(plain_table(["", "MiB"], rows, title="what was made"))


def size(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def check(questions: list[Question], tuned: list[str], base: list[str]) -> None:
    """Raise EdgeError unless the tuned model speaks as it was taught, and its base does not."""

    for question, ours_, theirs in zip(questions, tuned, base, strict=True):
        if question.words and not question.fits(ours_):
            wanted = ", ".join(question.words)
            raise EdgeError(
                f"the tuned model's answer to '{question.text}' has none of {wanted}: {ours_}",
                "the training did not take: look at its loss",
            )
        if question.fits(theirs):
            raise EdgeError(f"the base model already answers '{question.text}' with: {theirs}")
