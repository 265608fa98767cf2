"""From a configuration to what is trained on and what is held out: read, encoded, split, mixed and packed."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.config import TrainConfig
from convert.data import dataset, encode, tokenized
from convert.data.dataset_info import Entry, Row, read_info
from convert.data.encode import Item, Judged, Rules, Sample
from convert.model import chat_format
from convert.model.chat_format import ChatFormat
from edge.errors import InputError, UsageError


@dataclass
class Prepared:
    """train: what one epoch goes over, in order, before shuffling. held: what is evaluated on.

    rows: training rows of which anything is left to train on, before packing. held_rows: held out, likewise.
    """

    train: list[Item]
    held: list[Item]
    report: dataset.Report
    rows: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def held_rows(self) -> int:
        return len({item.source for item in self.held})

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, training or held out."""
        return max(item.size for item in itertools.chain(self.train, self.held))

    def digest(self) -> str:
        """SHA-256 of the token ids and loss masks that are trained on, in their order."""
        digest = hashlib.sha256()
        for item in self.train:
            for sample in item.parts:
                digest.update(sample.ids.tobytes())
                digest.update(repr((sample.spans, sample.starts)).encode())
            digest.update(b"bad" if isinstance(item, Judged) and not item.good else b"")
        return digest.hexdigest()


def chat_of(config: TrainConfig, base: Path) -> ChatFormat:
    """Tokenizer and chat template that `config` trains the model in the folder `base` with.

    An adapter that is trained on keeps the template that it has. Raises as `chat_format.load`.
    """
    # Of several the last one is the nearest.
    adapter = Path(config.adapter_name_or_path[-1]) if config.adapter_name_or_path else None
    if adapter is not None and (adapter / "adapter").is_dir():
        adapter = adapter / "adapter"
    return chat_format.load(
        base,
        template=config.template,
        adapter=adapter,
        plain=config.stage == "pt",
        tokens=config.add_tokens or (),
        special_tokens=config.add_special_tokens or (),
        grow=config.grows,
        parse_control_tokens=config.parse_control_tokens,
    )


def rules(config: TrainConfig) -> Rules:
    return Rules(
        config.cutoff_len,
        config.enable_thinking,
        config.mask_history,
        config.train_on_prompt,
        config.default_system,
    )


def prepare(config: TrainConfig, chat: ChatFormat) -> Prepared:
    """Read and encode what `config` names; without `dataset` only what is held out.

    With tokenized_path encoded rows are taken from there, or kept there. Raises InputError for files that
    cannot be read and where no row is left, UsageError for an entry of dataset_info.json or a val_size that
    cannot be used.
    """
    if not config.tokenized_path:
        return _encode_all(config, chat)
    folder = Path(config.tokenized_path)
    kept = tokenized.read(folder, chat, config.stage)
    if kept is not None:
        train, held, rows = kept
        note = f"rows are those of {folder}: other keys of data change nothing"
        return Prepared(train, held, dataset.Report(), rows=rows, notes=[note])
    data = _encode_all(config, chat)
    tokenized.write(folder, chat, config.stage, train=data.train, held=data.held, rows=data.rows)
    return data


def _encode_all(config: TrainConfig, chat: ChatFormat) -> Prepared:
    report = dataset.Report()
    entries = _entries(config)
    _check_stage(config, entries)
    sets, count = [], 0
    for name in config.dataset:
        items, usable = _encoded(entries[name], config, chat, report, count)
        sets.append(items)
        count += usable
    if config.dataset:
        dataset.check(config.dataset, count, report, strict=config.strict)
    held: list[Item] = []
    if config.eval_dataset:
        for name in config.eval_dataset:
            held += _encoded(entries[name], config, chat, report, 0)[0]
        if report.bad and config.strict:
            dataset.check(config.eval_dataset, len(held), report, strict=True)
        if not held:
            raise InputError(f"eval_dataset: no usable row in {', '.join(config.eval_dataset)}")
    else:
        out = dataset.held_out(count, config.val_size, config.seed)
        held = [item for items in sets for item in items if item.row in out]
        sets = [[item for item in items if item.row not in out] for items in sets]
    # Rows whose prompt passes cutoff_len have no items.
    rows = len({item.row for items in sets for item in items})
    prepared = Prepared([], held, report, rows=rows)
    shuffle = random.Random(config.seed)
    for number, name in enumerate(config.dataset):
        wanted = entries[name].num_samples
        if wanted is not None and sets[number]:
            sets[number] = _drawn(sets[number], wanted, shuffle)
    prepared.train = _mixed(sets, config, shuffle)
    if config.packs:
        _pack(prepared, config, chat)
    elif config.stage == "pt":
        prepared.train = list(encode.pages(_samples(prepared.train), chat, report, config.cutoff_len))
    if config.stage == "pt":
        prepared.held = list(encode.pages(_samples(held), chat, dataset.Report(), config.cutoff_len))
    if config.dataset and not prepared.train:
        raise InputError("no row is left to train on: " + "; ".join(report.lines()), "raise cutoff_len")
    return prepared


def _samples(items: list[Item]) -> list[Sample]:
    return [item for item in items if isinstance(item, Sample)]


def _pack(prepared: Prepared, config: TrainConfig, chat: ChatFormat) -> None:
    samples = _samples(prepared.train)
    if config.stage == "pt":
        prepared.train = list(encode.blocks(samples, chat, config.cutoff_len))
        note = f"packing: {len(samples)} texts one after the other in {len(prepared.train)} sequences"
    else:
        prepared.train = list(encode.pack(samples, config.cutoff_len))
        note = f"packing: {len(samples)} rows in {len(prepared.train)} sequences, isolated from each other"
    prepared.notes.append(note)
    if config.packing and not config.neat_packing and config.stage != "pt":
        prepared.notes.append("packing isolates its rows here, as neat_packing does in LLaMA-Factory")


def held_rows(config: TrainConfig) -> list[Row]:
    """The rows that `prepare` holds out, as messages; empty where none are."""
    entries, report = _entries(config), dataset.Report()

    def of(names: tuple[str, ...]) -> Iterator[Row]:
        for name in names:
            yield from dataset.stream(entries[name], report, max_samples=config.max_samples)

    if config.eval_dataset:
        return list(of(config.eval_dataset))
    if not config.val_size:
        return []
    out = dataset.held_out(sum(1 for _ in of(config.dataset)), config.val_size, config.seed)
    return [row for number, row in enumerate(of(config.dataset)) if number in out]


def _entries(config: TrainConfig) -> dict[str, Entry]:
    names = (*config.dataset, *(config.eval_dataset or ()))
    return read_info(config.dataset_dir, names, plain=config.stage == "pt")


def _encoded(
    entry: Entry, config: TrainConfig, chat: ChatFormat, report: dataset.Report, first: int
) -> tuple[list[Item], int]:
    """(samples or pairs of one data set, its usable rows)"""
    usable = itertools.count()
    rows = dataset.stream(entry, report, max_samples=config.max_samples)
    counted = (row for row, _ in zip(rows, usable, strict=False))
    make: Callable[..., Iterator[Any]] = _ENCODED[config.stage]
    return list(make(counted, chat, report, rules(config), first)), next(usable)


# What the rows of each stage become.
_ENCODED = {"sft": encode.samples, "pt": encode.texts, "dpo": encode.pairs, "kto": encode.judged}


def _check_stage(config: TrainConfig, entries: dict[str, Entry]) -> None:
    for name, entry in entries.items():
        if config.stage == "dpo" and not entry.ranking:
            raise UsageError(
                f"stage: dpo needs preference rows, and '{name}' has none",
                '`"ranking": true` in dataset_info.json, and the columns chosen and rejected',
            )
        if config.stage == "kto" and not entry.tagged:
            raise UsageError(
                f"stage: kto needs answers marked good or bad, and '{name}' names no such column",
                '`"columns": {"kto_tag": ...}` in dataset_info.json, a column of true and false',
            )
        if config.stage == "sft" and entry.ranking:
            raise UsageError(f"'{name}' holds preference rows (ranking)", "train on it with stage: dpo")
        if config.stage == "sft" and entry.tagged:
            raise UsageError(
                f"'{name}' holds good and bad answers (kto_tag)",
                "train on it with stage: kto",
            )


def _drawn(items: list[Item], wanted: int, shuffle: random.Random) -> list[Item]:
    """`wanted` of `items` at random; each once before any comes again."""
    drawn: list[Item] = []
    while len(drawn) < wanted:
        drawn += shuffle.sample(items, min(len(items), wanted - len(drawn)))
    return drawn


def _mixed(sets: list[list[Item]], config: TrainConfig, shuffle: random.Random) -> list[Item]:
    """The data sets one after the other, or drawn in turn (by interleave_probs where they are given)."""
    if config.mix_strategy == "concat" or sum(map(bool, sets)) < 2:
        return list(itertools.chain(*sets))
    probs, turn = config.interleave_probs, itertools.count()
    enough = all if config.mix_strategy == "interleave_over" else any
    drawn = [0] * len(sets)
    mixed: list[Item] = []
    while not enough(count >= len(items) for count, items in zip(drawn, sets, strict=True) if items):
        number = shuffle.choices(range(len(sets)), probs)[0] if probs else next(turn) % len(sets)
        if items := sets[number]:
            mixed.append(items[drawn[number] % len(items)])
            drawn[number] += 1
    return mixed
