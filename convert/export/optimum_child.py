"""optimum's side of the check, in its own environment: `python -P optimum_child.py < JSON`.

Exports a transformers folder and answers prompts greedily with what it exported. Reads `source`, `prompts`
(token ids), `tokens` (of an answer at most) and `ends` (ids that end one, included); the last line of
standard output is JSON with `answers` and `versions`.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata

import torch
from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]


def main() -> int:
    job = json.loads(sys.stdin.buffer.read())
    model = ORTModelForCausalLM.from_pretrained(job["source"], export=True, local_files_only=True)
    model.generation_config.eos_token_id = job["ends"]
    answers = []
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["tokens"], do_sample=False
        )
        answers.append([int(token) for token in whole[0, len(prompt) :]])
    names = ("optimum", "optimum-onnx", "transformers")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    sys.stdout.write("\n" + json.dumps({"answers": answers, "versions": versions}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
