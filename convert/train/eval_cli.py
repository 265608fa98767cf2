"""`edge eval RUN`: its arguments, apart from convert.train.evaluate, which takes seconds to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge.errors import UsageError
from edge.progress import add_progress_option, result


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="edge eval", description="A run on rows it was not trained on, beside its base."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("--dataset", default="", help="its names (default: the rows that were held out)")
    parser.add_argument("--dataset-dir", help="the folder with dataset_info.json (default: the run's)")
    parser.add_argument("--max-samples", type=int, help="at most so many rows of each --dataset")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (%(default)s)")
    parser.add_argument("--no-base", action="store_true", help="the tuned model alone: half the time")
    add_progress_option(parser)
    options = parser.parse_args(argv)
    if options.run.suffix in (".yaml", ".yml"):
        raise UsageError(
            f"{options.run} is a configuration, and edge eval takes a run",
            "edge eval OUTPUT_DIR; answers to eval_dataset: edge train CONFIG.yaml with do_predict: true",
        )
    from convert.train import evaluate

    figures = evaluate.run(
        options.run,
        dataset=tuple(name.strip() for name in options.dataset.split(",") if name.strip()),
        dataset_dir=options.dataset_dir,
        max_samples=options.max_samples,
        max_new_tokens=max(1, options.max_new_tokens),
        size=max(1, options.batch_size),
        with_base=not options.no_base,
    )
    result(**figures)
    return 0
