"""LLaMA-Factory's own training, from a YAML's keys. Run as a program, with a YAML's path or without.

    python -m bench.training.whole CONFIG.yaml --peer "python -m tests.support.llamafactory_train"

Without a path it reads {"keys": the YAML, "alike": bool} from stdin. It trains into output_dir. alike: what
differs from training here is taken out: the line end behind an answer's end token is not learnt, and the
first step's rate is the first part of the ramp. The versions that it declares lie in
.peers/llamafactory-train; torch and what else it needs is .venv's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

PEERS = Path(__file__).parents[2] / ".peers"
OWN = PEERS / "llamafactory-train"


def _take_out_line_ends(processor: Any) -> None:
    encode = processor._encode_data_example

    def without(self: Any, *words: Any, **more: Any) -> Any:
        ids, labels = encode(self, *words, **more)
        line_end = self.tokenizer.encode("\n", add_special_tokens=False)
        assert ids[-len(line_end) :] == line_end == labels[-len(line_end) :]
        labels[-len(line_end) :] = [-100] * len(line_end)
        return ids, labels

    processor._encode_data_example = without


def _take_out_zero_rate(optimization: Any) -> None:
    cosine = optimization._get_cosine_schedule_with_warmup_lr_lambda

    def ramp(step: int, *, num_warmup_steps: int, **more: Any) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        share: float = cosine(step, num_warmup_steps=num_warmup_steps, **more)
        return share

    optimization._get_cosine_schedule_with_warmup_lr_lambda = ramp


def main() -> None:
    if sys.argv[1:]:
        asked = {"keys": yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8")), "alike": False}
    else:
        asked = json.loads(sys.stdin.read())
    sys.path.insert(0, str(OWN))
    sys.path.append(str(PEERS))
    os.environ |= {"DISABLE_VERSION_CHECK": "1", "HF_HOME": asked["keys"]["output_dir"]}
    from tests.support.llamafactory_rows import without

    without("torchaudio")
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.train.tuner import run_exp
    from transformers import optimization

    if asked["alike"]:
        _take_out_line_ends(SupervisedDatasetProcessor)
        _take_out_zero_rate(optimization)
    run_exp(asked["keys"])


if __name__ == "__main__":
    main()
