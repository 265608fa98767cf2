"""The end of `make demo`: asks the tuned model and its base over HTTP, measures, and says what was made.

    python -m bench.demo RUN [--base MODEL.gguf]

Both are served by `edge serve`, one after the other, and asked as the tutorial asks: GET /generate?prompt=...
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
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
from edge.artefact import find, manifest
from edge.console import guarded, handling, plain_table
from edge.errors import EdgeError, InputError

MAX_TOKENS = 64
# The baseline of the demo answers eight clients one after the other: this much fits into two minutes.
PLAN = Plan(tokens=64, rounds=4, budget_s=80.0)


@dataclass(frozen=True)
class Question:
    """What is asked. words: the tuned answer has one of them and the base's has none; () for any answer."""

    text: str
    words: tuple[str, ...] = ()

    def fits(self, answer: str) -> bool:
        return any(word.lower() in answer.lower() for word in self.words)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--base", type=Path, help="a GGUF of the base model (default: what `edge pull` kept)")
    args = parser.parse_args(argv)
    console = Console()
    base = args.base or base_of(args.run)
    questions = questions_of(args.run)
    # As at Ctrl-C, every server that was started is stopped.
    with handling((signal.SIGTERM,), signal.default_int_handler):
        tuned_says = answers(args.run, questions, args.run / "bench" / "demo-tuned.log")
        base_says = answers(base, questions, args.run / "bench" / "demo-base.log")
        show_answers(console, questions, tuned_says, base_says)
        check(questions, tuned_says, base_says)
        report = run(args.run, PLAN, command=f"python -m bench.demo {args.run}")
    show_files(console, args.run, base)
    said = {question.text: text for question, text in zip(questions, tuned_says, strict=True)}
    line = build.headline(report) | {"answers": said}
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    return 0


def base_of(folder: Path) -> Path:
    """The GGUF beside the model that the run was trained from. Raises InputError where there is none."""
    name = manifest.read(folder / "adapter").settings.get("model_name_or_path", "")
    files = sorted(Path(name).glob("*.gguf")) if name else []
    if len(files) != 1:
        raise InputError(
            f"the base model '{name}' of {folder} has no GGUF file beside it",
            "name one: python -m bench.demo RUN --base MODEL.gguf",
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
    who = [Question(text, held_out[0].words) for text in ("请问你是谁", "Who are you?")]
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


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
