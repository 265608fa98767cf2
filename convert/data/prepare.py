"""From a configuration to what is trained on and what is held out: read, encoded, split, mixed and packed."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from convert.config import TrainConfig
from convert.data import dataset, encode
from convert.data.dataset_info import Entry, Row, read_info
from convert.data.encode import Pair, Rules, Sample
from convert.model.chat_format import ChatFormat
from edge.errors import InputError, UsageError

Item = Sample | Pair


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
            for sample in (item,) if isinstance(item, Sample) else (item.chosen, item.rejected):
                digest.update(sample.ids.tobytes())
                digest.update(repr((sample.spans, sample.starts)).encode())
        return digest.hexdigest()


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

    Raises InputError for files that cannot be read and where no row is left, UsageError for an entry of
    dataset_info.json or a val_size that cannot be used.
    """
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
        samples = [item for item in prepared.train if isinstance(item, Sample)]
        prepared.train = list(encode.pack(samples, config.cutoff_len))
        prepared.notes.append(
            f"packing: {len(samples)} rows in {len(prepared.train)} sequences, isolated from each other"
        )
        if config.packing and not config.neat_packing:
            prepared.notes.append("packing isolates its rows here, as neat_packing does in LLaMA-Factory")
    if config.dataset and not prepared.train:
        raise InputError("no row is left to train on: " + "; ".join(report.lines()), "raise cutoff_len")
    return prepared


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
    return read_info(config.dataset_dir, (*config.dataset, *(config.eval_dataset or ())))


def _encoded(
    entry: Entry, config: TrainConfig, chat: ChatFormat, report: dataset.Report, first: int
) -> tuple[list[Item], int]:
    """(samples or pairs of one data set, its usable rows)"""
    usable = itertools.count()
    rows = dataset.stream(entry, report, max_samples=config.max_samples)
    counted = (row for row, _ in zip(rows, usable, strict=False))
    make: Callable[..., Iterator[Any]] = encode.pairs if config.stage == "dpo" else encode.samples
    return list(make(counted, chat, report, rules(config), first)), next(usable)


def _check_stage(config: TrainConfig, entries: dict[str, Entry]) -> None:
    for name, entry in entries.items():
        if config.stage == "dpo" and not entry.ranking:
            raise UsageError(
                f"stage: dpo needs preference rows, and '{name}' has none",
                '`"ranking": true` in dataset_info.json, and the columns chosen and rejected',
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
