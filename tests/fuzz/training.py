"""What training reads: data files, dataset_info.json and configurations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

from convert import config as configuration
from convert.config_keys import FIELDS
from convert.config_unused import UNUSED
from convert.data import dataset
from convert.model import chat_format, hf_folder
from tests.fuzz import mutate
from tests.fuzz.runner import sentences

Draw = Callable[[Random], Any]
Check = Callable[[Any], None]

ALPACA = {
    "instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]], "tools": "[]",
    "chosen": "c", "rejected": "r",
}  # fmt: skip
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"},
    ],
    "tools": '[{"name": "f", "parameters": {"type": "object", "properties": {}}}]', "system": "s",
    "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"},
}  # fmt: skip
OPENAI = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}  # fmt: skip
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
         "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}  # fmt: skip
FORMATS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"columns": {name: name for name in ("system", "history", "tools")}}, ALPACA),
    ({"ranking": True}, ALPACA),
    ({"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}, SHAREGPT),
    ({"formatting": "sharegpt", "ranking": True}, SHAREGPT),
    ({"formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}}, OPENAI),
    ({"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": _TAGS}, OPENAI),
]  # fmt: skip


@contextlib.contextmanager
def data(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """Rows as json, jsonl and csv, and the entry of dataset_info.json that describes them."""

    def draw(rng: Random) -> tuple[str, bytes, bytes]:
        entry, row = rng.choice(FORMATS)
        suffix = rng.choice(["json", "json", "jsonl", "csv"])
        rows = [mutate.inside(rng, row) if rng.random() < 0.6 else row for _ in range(rng.randrange(5))]
        if suffix == "csv":
            lines = [
                ",".join(row),
                *(",".join(map(_cell, one.values())) for one in rows if isinstance(one, dict)),
            ]
            text = "\n".join(lines).encode("utf-8", "surrogatepass")
            text = mutate.data(rng, text) if rng.random() < 0.5 else text
        elif suffix == "jsonl":
            text = b"\n".join(mutate.text_of(rng, one) for one in rows)
        else:
            text = mutate.text_of(rng, mutate.inside(rng, rows) if rng.random() < 0.2 else rows)
        info = {"d": {"file_name": f"d.{suffix}", **entry}}
        return suffix, text, mutate.text_of(rng, mutate.inside(rng, info) if rng.random() < 0.2 else info)

    def check(given: tuple[str, bytes, bytes]) -> None:
        suffix, text, info = given
        (folder / f"d.{suffix}").write_bytes(text)
        (folder / "dataset_info.json").write_bytes(info)
        with sentences():
            rows, report = dataset.load(("d",), folder)
            assert rows and len(rows) + len(report.bad) == report.rows
            assert all(source.startswith("d, row ") and reason for source, reason in report.bad)

    yield draw, check


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return '"' + text.replace('"', '""') + '"'


@contextlib.contextmanager
def base(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """A base as transformers saves one: its configurations, its tokenizer, the header of its weights."""
    from tests.support import toy

    toy.make_model(folder)
    texts = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    whole = {name: (folder / name).read_bytes() for name in (*texts, "model.safetensors")}
    wide = {"text_config": {}, "auto_map": {"AutoModel": "x"}, "num_key_value_heads": [1], "head_dim": 16}
    header = 8 + int.from_bytes(whole["model.safetensors"][:8], "little")

    def draw(rng: Random) -> tuple[str, bytes]:
        name = rng.choice(list(whole))
        if name == "model.safetensors":
            return name, mutate.data(rng, whole[name][:header])
        given = json.loads(whole[name])
        given |= wide if name == "config.json" and rng.random() < 0.5 else {}
        return name, mutate.text_of(rng, mutate.inside(rng, given))

    def check(given: tuple[str, bytes]) -> None:
        name, text = given
        (folder / name).write_bytes(text + (whole[name][header:] if name == "model.safetensors" else b""))
        with sentences():
            hf_folder.check_folder(folder)
            if name != "model.safetensors":
                chat_format.load(folder)
        (folder / name).write_bytes(whole[name])

    yield draw, check


GOOD = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}


@contextlib.contextmanager
def config(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """YAML files in which each key has any value, and files that are damaged."""
    keys = [*FIELDS, *UNUSED]
    path = folder / "c.yaml"

    def draw(rng: Random) -> bytes:
        given = dict(GOOD)
        for key in rng.sample(keys, rng.randint(1, 3)):
            field = FIELDS.get(key)
            near = [*(field.choices or ()), field.minimum, field.maximum, field.default] if field else []
            near = [one for one in near if isinstance(one, (int, float, str, bool))]
            given[key] = rng.choice(near) if near and rng.random() < 0.4 else mutate.value(rng, 2)
        text = yaml.safe_dump(given, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        return mutate.data(rng, text) if rng.random() < 0.3 else text

    def check(text: bytes) -> None:
        path.write_bytes(text)
        with sentences():
            made = configuration.load_train_config(path)
            path.write_text(configuration.as_yaml(made), encoding="utf-8")
            again = configuration.load_train_config(path)
            assert configuration.recorded(again) == configuration.recorded(made)

    yield draw, check
