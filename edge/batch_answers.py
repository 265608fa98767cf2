"""A model's answers to a file of questions, on the same engine as the server's, without HTTP."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TextIO

import msgspec

from edge.artefact import find, json_file
from edge.console import plain_console
from edge.engine.client import EngineProcess
from edge.engine.sampling import Params
from edge.engine.worker import Load
from edge.errors import InputError, RequestError
from edge.loading import load_plan
from edge.progress import report, result
from edge.questions import Question, read
from edge.server.conversation import Conversation, collect, prepared
from edge.server.served_model import ServedModel

FILE = "generated_predictions.jsonl"


def run(args: argparse.Namespace) -> int:
    """Answer the questions that the arguments name. Raises EdgeError for a file or model that cannot be used.

    What is answered when it ends early is kept in the folder, and the same command goes on behind it.
    """
    questions = read(args.questions, args.system)
    options = load_plan.Options(slots=args.slots, threads=args.threads, device=args.device)
    artefact, _ = load_plan.pick(args.path, "llamacpp" if args.lora else args.backend, options)
    if artefact.chat_template is None:
        raise InputError(f"{artefact.path} has no chat template", "serve it, and ask /v1/completions")
    if args.lora:
        artefact = find.with_lora(artefact, args.lora)
    load = Load.of(artefact, load_plan.plan(artefact, options).settings)
    params = Params(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    files = [(path, Path(path).stat().st_mtime_ns) for path in filter(None, (load.path, load.lora))]
    asked = [files, msgspec.to_builtins(params), [(one.messages, one.label) for one in questions]]
    known = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / f".{FILE}.{known}"
    console = plain_console()
    model = ServedModel(artefact, EngineProcess(load), artefact.name)
    missing = answer(model, questions, params, partial)
    target = args.out / FILE
    partial.replace(target)
    for line in missing:
        console.print(f"note: no answer to {line}")
    console.print(f"{len(questions) - len(missing)} of {len(questions)} questions are answered: {target}")
    result(path=str(target), answered=len(questions) - len(missing), without_answer=missing)
    return 0


def answer(model: ServedModel, questions: list[Question], params: Params, partial: Path) -> list[str]:
    """Append a line for each question to `partial`, behind those of an earlier try; what has no answer."""
    done = json_file.lines(partial.read_text(encoding="utf-8")) if partial.is_file() else []
    json_file.write_lines(partial, done)  # without what was written in part
    report("loading the model")
    with partial.open("a", encoding="utf-8") as file:
        asyncio.run(_append(model, questions, params, done, file))
    return [f"{question.source}: {line['error']}" for question, line in zip(questions, done, strict=True)
            if "error" in line]  # fmt: skip


async def _append(
    model: ServedModel, questions: list[Question], params: Params, done: list[dict[str, Any]], file: TextIO
) -> None:
    model.engine.start()
    try:
        await model.engine.wait_ready()
        report("answering", len(done), len(questions), unit="questions")
        async for line in answers(model, questions[len(done) :], params):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            done.append(line)
            report("answering", len(done), len(questions), unit="questions")
    finally:
        await model.engine.stop(0.0)


async def answers(
    model: ServedModel, questions: list[Question], params: Params
) -> AsyncIterator[dict[str, Any]]:
    """A line of the file for each question, in their order: prompt, predict, label; reasoning or error.

    As many are answered at once as the engine has slots. An error stands for a question that the model cannot
    be asked, such as one longer than its context.
    """
    free = asyncio.Semaphore(model.ready.slots)

    async def one(question: Question) -> dict[str, Any]:
        async with free:
            line = {"prompt": "", "predict": "", "label": question.label}
            try:
                chat = await prepared(model, Conversation(list(question.messages)))
                line["prompt"] = chat.prompt.text
                [stream] = chat.start(params)
                answer = await collect(stream, chat.reader())
            except RequestError as error:
                if error.status >= 500:
                    raise
                return line | {"error": error.message}
            line["predict"] = answer.text
            return line | ({"reasoning": answer.reasoning} if answer.reasoning else {})

    tasks = [asyncio.create_task(one(question)) for question in questions]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
