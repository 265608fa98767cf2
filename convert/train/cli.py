"""`edge train CONFIG.yaml`: train a LoRA adapter, or all weights, as a LLaMA-Factory style YAML says.

The configuration is read and checked before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from convert.config import as_yaml, load_train_config
from convert.config_keys import FIELDS
from convert.config_schema import schema
from convert.config_unused import UNUSED
from convert.model.hf_folder import shell
from convert.train import torchrun
from edge.progress import add_progress_option, result


def command(argv: list[str], *more: str) -> str:
    """The command line `edge train ARGV MORE`, quoted for the shell."""
    words = [*(word for word in argv if word not in more), *more]
    return " ".join(["edge", "train", *(shell(word) for word in words)])


# Of a command that resumes what this one began.
_NOT_AGAIN = ("--overwrite", "--progress", "json", "--progress=json")


class _PrintSchema(argparse.Action):
    """As --version does: print and exit, whether or not a configuration was given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(json.dumps(schema(), ensure_ascii=False, indent=2) + "\n")
        parser.exit()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml key=value",
        help="keys as in LLaMA-Factory; key=value (or --key value) wins over the file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run made")
    parser.add_argument("--resume", action="store_true", help="resume from the last whole checkpoint")
    parser.add_argument("--print-config", action="store_true", help="show every key with its value, and stop")
    parser.add_argument("--plan", action="store_true", help="say steps, memory and time, and stop")
    parser.add_argument("--measure", action="store_true", help="with --plan: try a few steps for the time")
    parser.add_argument("--print-command", action="store_true", help="show this command, quoted, and stop")
    parser.add_argument(
        "--json-schema", action=_PrintSchema, nargs=0, help="show every key as a JSON Schema, and stop"
    )
    add_progress_option(parser)
    options = parser.parse_intermixed_args(_overrides(argv))
    words = options.words
    if not words:
        parser.error("the following arguments are required: CONFIG.yaml")
    config = load_train_config(*((None, words) if "=" in words[0] else (Path(words[0]), words[1:])))
    if options.resume:
        # What began from another run's checkpoint goes on from its own.
        first = None if any(Path(config.output_dir).glob("checkpoint-*")) else config.resume_from_checkpoint
        config = dataclasses.replace(config, resume_from_checkpoint=first or "auto")
    if options.print_config:
        sys.stdout.write(as_yaml(config))
    if options.print_command:
        sys.stdout.write(command([word for word in argv if not word.startswith("--print-")]) + "\n")
    if options.print_config or options.print_command:
        return 0
    if options.plan:
        from convert.train import finetune

        result(**finetune.plan(config, overwrite=options.overwrite, measure=options.measure))
        return 0
    if torchrun.is_asked():
        return torchrun.launch(argv)
    from convert.train import evaluate, finetune

    made = Path(config.output_dir)
    if config.trains:
        again = command([word for word in argv if word not in _NOT_AGAIN], "--resume")
        made = finetune.run(config, overwrite=options.overwrite, again=again)
    if config.do_predict and os.environ.get("RANK", "0") == "0":
        evaluate.predict(config, trained=config.trains)
    result(run=config.output_dir, path=str(made))
    return 0


def _overrides(argv: list[str]) -> list[str]:
    """`argv` with `--key value`, `--key=value` and `--flag` of LLaMA-Factory's keys as key=value."""
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, separator, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or key not in FIELDS | UNUSED:
            words.append(word)
        elif separator:
            words.append(f"{key}={value}")
        else:
            flag = not rest or rest[0].startswith("--") or rest[0].partition("=")[0] in FIELDS
            words.append(f"{key}={'true' if flag else rest.pop(0)}")
    return sorted(words, key=lambda word: "=" in word)
