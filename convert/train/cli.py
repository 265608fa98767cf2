"""`edge train CONFIG.yaml`: train a LoRA adapter, or all weights, as a LLaMA-Factory style YAML says.

The configuration is read and checked before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from convert.config import as_yaml, load_train_config
from convert.config_schema import schema
from convert.model.hf_folder import shell
from edge.console import add_progress_option, result


def command(argv: list[str], *more: str) -> str:
    """The command line `edge train ARGV MORE`, quoted for the shell."""
    words = [*(word for word in argv if word not in more), *more]
    return " ".join(["edge", "train", *(shell(word) for word in words)])


class _PrintSchema(argparse.Action):
    """As --version does: print and exit, whether or not a configuration was given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(json.dumps(schema(), ensure_ascii=False, indent=2) + "\n")
        parser.exit()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge train", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="keys as in LLaMA-Factory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run made")
    parser.add_argument("--resume", action="store_true", help="resume from the last whole checkpoint")
    parser.add_argument("--print-config", action="store_true", help="show every key with its value, and stop")
    parser.add_argument("--print-command", action="store_true", help="show this command, quoted, and stop")
    parser.add_argument(
        "--json-schema", action=_PrintSchema, nargs=0, help="show every key as a JSON Schema, and stop"
    )
    add_progress_option(parser)
    options = parser.parse_intermixed_args(argv)
    config = load_train_config(options.config, options.overrides)
    if options.resume:
        config = dataclasses.replace(config, resume_from_checkpoint=config.resume_from_checkpoint or "auto")
    if options.print_config:
        sys.stdout.write(as_yaml(config))
    if options.print_command:
        sys.stdout.write(command([word for word in argv if not word.startswith("--print-")]) + "\n")
    if options.print_config or options.print_command:
        return 0
    from convert.train import finetune

    again = command([word for word in argv if word != "--overwrite"], "--resume")
    made = finetune.run(config, overwrite=options.overwrite, again=again)
    result(run=config.output_dir, path=str(made))
    return 0
