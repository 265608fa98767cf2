"""What the package `llamafactory` makes of rows: token ids and labels, for its templates. Run as a program.

It reads {"tokenizer": folder, "templates": names, "rows": [...], "thinking": bool} from stdin and writes
{template: [[ids, labels], ...]}; with {"texts": [...], "packing": bool, "begins": bool} in place of rows it
writes the ids of plain texts. The package's own environment is .peers (`make test-all` makes it).
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parents[2] / ".peers"


def without(name: str) -> None:
    """Let `import name` succeed: for what is imported there and not used by what is asked here."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module


def main() -> None:
    asked = json.loads(sys.stdin.read())
    out, sys.stdout = sys.stdout, sys.stderr
    sys.path.append(str(PEERS))
    without("torchaudio")
    from llamafactory.data.processor.pretrain import PretrainDatasetProcessor
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
    from transformers import AutoTokenizer

    answers: dict[str, Any] = {}
    for name in asked["templates"]:
        tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
        tokenizer.chat_template = None
        data = types.SimpleNamespace(
            template=name, train_on_prompt=False, tool_format=None, default_system=None, cutoff_len=999,
            enable_thinking=asked["thinking"], preserve_thinking=False, mask_history=False,
            neat_packing=False,
        )  # fmt: skip
        template = get_template_and_fix_tokenizer(tokenizer, data)
        if "texts" in asked:
            data.packing, data.cutoff_len = asked["packing"], 32
            tokenizer.add_bos_token = asked["begins"]  # as classes of tokenizers with a begin token have it
            talks = [[{"role": "user", "content": text}] for text in asked["texts"]]
            processor = PretrainDatasetProcessor(template, tokenizer, None, data)
            answers[name] = processor.preprocess_dataset({"_prompt": talks})["input_ids"]
            continue
        template.mm_plugin = TEMPLATES["default"].mm_plugin  # one that asks for no processor of pictures
        make = SupervisedDatasetProcessor(template, tokenizer, None, data)
        answers[name] = [
            make._encode_data_example(
                row["messages"][:-1], row["messages"][-1:], row["system"], row["tools"], [], [], []
            )
            for row in asked["rows"]
        ]
    json.dump(answers, out)


if __name__ == "__main__":
    main()
