"""What a model says as soon as it is trained: `python -m bench.first_answer RUN QUESTION...`, of `edge demo`.

The adapter is computed over the base that it was trained on, so nothing has to be merged or exported before.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from edge.console import guarded, plain_console, plain_table

MAX_TOKENS = 48


def main(argv: list[str]) -> int:
    """Print the greedy answers of argv[0]/adapter to the questions that follow."""
    # With torch it takes seconds, in which Ctrl-C is a message too.
    from convert.verify.torch_reader import TorchReader

    folder, questions = Path(argv[0]) / "adapter", argv[1:]
    with contextlib.closing(TorchReader(folder)) as reader:
        prompts = reader.prompt_ids([{"role": "user", "content": text}] for text in questions)
        answers = reader.decode([ids or [] for ids in reader.greedy_of_all(prompts, MAX_TOKENS)])
    rows = [[question, answer.strip()] for question, answer in zip(questions, answers, strict=True)]
    title = "what it says now, before merge and export"
    plain_console().print(plain_table(["asked", "tuned"], rows, title=title, left=2))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
