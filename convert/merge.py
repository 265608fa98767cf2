"""Adapter and base -> one 16-bit model: the model that was trained.

    RUN/adapter + base -> RUN/merged

Training saw the base through 4 bits, so the adapter is added to the dequantised 4-bit weights (--into nf4),
in float32, and the sum is rounded once: to float16, which loses an eighth of what bfloat16 does, and what
does not fit into it is said. Tensors are mapped from their files, changed and written some rows at a time.
Before the folder is published it is compared with the adapter over its base.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open

from convert.model import chat_format, safetensors_io
from convert.model.dequantized_base import DTYPES, DequantizedBase, Rows, spans
from convert.model.hf_folder import Folder, check_folder
from convert.model.lora_adapter import (
    EMBEDDINGS,
    HEAD,
    Adapter,
    find_base,
    known_adapter,
    read_adapter,
)
from convert.model.safetensors_io import Part
from convert.verify import compare
from convert.verify.torch_reader import TorchReader
from edge.artefact import manifest
from edge.errors import EdgeError, InputError, UsageError

INTO = ("nf4", "original")
_PACKAGES = ("torch", "bitsandbytes", "safetensors")


@dataclass
class Drift:
    """Squared norms over all changed layers: of their weights, of the updates, of what rounding took."""

    weight: float = 0.0
    update: float = 0.0
    lost: float = 0.0

    def numbers(self) -> dict[str, float]:
        """update: relative to the weights. rounding: what the output type lost, relative to the update."""
        return {
            "update": math.sqrt(self.update / self.weight) if self.weight else 0.0,
            "rounding": math.sqrt(self.lost / self.update) if self.update else 0.0,
        }


@dataclass(frozen=True)
class Plan:
    """parts: the tensors to write. sources: name -> the base's file that it comes from, its name there."""

    parts: list[Part]
    sources: dict[str, tuple[Path, str]]


def run(
    run_folder: Path,
    *,
    dtype: str = "float16",
    into: str = "nf4",
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Merge run_folder/adapter with its base into run_folder/merged, whose path is returned.

    An adapter's own folder, as other trainers leave it, is taken as well; `merged` then lies inside it.
    into: "nf4" adds to the dequantised weights that training saw, "original" to the base as it is. An adapter
    that was trained over 16-bit weights is added to these either way.
    Raises UsageError for an unknown dtype or into, InputError for an adapter or base that cannot be used,
    ExistsError without `overwrite`.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    if dtype not in DTYPES or into not in INTO:
        raise UsageError(
            f"--dtype {dtype} --into {into}: no such choice", f"{', '.join(DTYPES)}; {', '.join(INTO)}"
        )
    foreign = (run_folder / "adapter_config.json").is_file()
    adapter, target = run_folder if foreign else run_folder / "adapter", run_folder / "merged"
    if run_folder.is_dir() and not adapter.is_dir():
        raise InputError(f"{run_folder} has no adapter", "make it: edge train CONFIG.yaml")
    known = known_adapter(adapter)
    manifest.check_target(target, overwrite)
    found = read_adapter(adapter)
    base = check_folder(find_base(known, adapter))
    chat_template = _chat_template(adapter, base.path, known)
    seen = DequantizedBase(known.settings) if into == "nf4" else None
    into = into if known.settings.get("quantized") else "original"
    config = dict(base.config)
    plan = _plan(base, found, config, DTYPES[dtype])
    # Everything else stays as the base has it: other readers know these keys.
    config["dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"] = dtype
    manifest.check_free(target, sum(part.bytes for part in plan.parts))
    drift = Drift()
    with manifest.publish(target, overwrite=overwrite) as partial:
        with console.status(f"merging into {target}"):
            safetensors_io.write(partial, plan.parts, lambda part: _rows(part, plan, found, seen, drift))
        _dump(partial / "config.json", config)
        generation = _load(base.path / "generation_config.json")
        _dump(partial / "generation_config.json", {**generation, "eos_token_id": known.stop_ids})
        words = adapter if (adapter / "tokenizer.json").is_file() else base.path
        for name in chat_format.FILES:
            if (words / name).is_file():
                shutil.copyfile(words / name, partial / name)
        (partial / "chat_template.jinja").write_bytes(chat_template)
        settings = {"dtype": dtype, "into": into, "drift": drift.numbers()}
        manifest.write(partial, known.child("merged", adapter, settings=settings, packages=_PACKAGES))
        report = _compare(adapter, partial, console)
    numbers = drift.numbers()
    kind = "dequantised NF4" if into == "nf4" else "original"
    console.print(
        f"{target}: {len(found.updates)} layers changed by {numbers['update']:.2%} of their weights, "
        f"added to the {kind} base; {dtype} rounds off {numbers['rounding']:.1%} of that"
    )
    if found.whole:
        console.print(f"  taken whole from the adapter: {', '.join(sorted(found.whole)[:4])}")
    compare.summary(report, console)
    return target


def _compare(adapter: Path, merged: Path, console: Console) -> compare.Report:
    """Compare with what was trained; the report is kept in the merged folder, a difference refuses it."""
    with contextlib.closing(TorchReader(adapter)) as a, contextlib.closing(TorchReader(merged)) as b:
        report = compare.compare(a, b, console=console)
    report.refuse()
    compare.keep(report)
    return report


def _plan(base: Folder, adapter: Adapter, config: dict[str, Any], dtype: torch.dtype) -> Plan:
    """What is to be written; `config` is brought up to date.

    An output head that was trained apart from the embeddings it was tied to is written, and the tie undone.
    Added tokens need both tables whole in the adapter, or a tie. Raises InputError where something lacks.
    """
    where: dict[str, Part] = {}
    sources: dict[str, tuple[Path, str]] = {}
    for path in base.weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                kind = safetensors_io.TYPES.get(part.get_dtype())
                if kind is None:
                    raise InputError(
                        f"{path}: {name} is of the type {part.get_dtype()}, which cannot be merged",
                        "give the 16-bit model",
                    )
                where[name] = Part(name, tuple(part.get_shape()), dtype if kind.is_floating_point else kind)
                sources[name] = (path, name)
    tied = bool(config.get("tie_word_embeddings"))
    if tied:
        # A copy of the embeddings: readers tie it, and some refuse a second one.
        where.pop(HEAD, None)
        # peft trains a copy of a table that is named alone, and leaves its twin as it was.
        apart = (set(adapter.updates) | set(adapter.whole)) & {EMBEDDINGS, HEAD}
        if apart and not adapter.config.get("ensure_weight_tying") and not _same_tables(adapter):
            where[HEAD] = dataclasses.replace(where[EMBEDDINGS], name=HEAD)
            sources[HEAD] = sources[EMBEDDINGS]
            config["tie_word_embeddings"] = tied = False
    rows = adapter.rows()
    tables = [EMBEDDINGS] if tied else [EMBEDDINGS, HEAD]
    if rows and rows != where[EMBEDDINGS].shape[0]:
        lacking = [name for name in tables if name not in adapter.whole]
        if lacking:
            raise InputError(
                f"{adapter.folder} has {rows} tokens, {base.path} has {where[EMBEDDINGS].shape[0]}, and the "
                f"adapter does not hold {lacking[0]} with the added ones",
                "train again with modules_to_save: embed_tokens, lm_head",
            )
        config["vocab_size"] = rows
    missing = sorted(adapter.names - set(where) - ({HEAD} if tied else set()))
    if missing:
        raise InputError(f"{base.path} has no {missing[0]}, which the adapter changes", "train again")
    for name in tables:
        if rows and name in adapter.whole:
            where[name] = dataclasses.replace(where[name], shape=(rows, *where[name].shape[1:]))
    return Plan(list(where.values()), sources)


def _same_tables(adapter: Adapter) -> bool:
    """Whether the adapter holds embeddings and head whole, and they are one table."""
    if not {EMBEDDINGS, HEAD} <= set(adapter.whole):
        return False
    return set(adapter.tokens) != {HEAD} and torch.equal(adapter.read(EMBEDDINGS), adapter.read(HEAD))


def _rows(
    part: Part, plan: Plan, adapter: Adapter, seen: DequantizedBase | None, drift: Drift
) -> Iterator[torch.Tensor]:
    """The rows of a merged tensor, some at a time; `drift` is told of them."""
    name = part.name
    if name in adapter.whole:
        weight = adapter.read(name)
        rows: Rows = lambda start, stop: weight[start:stop]  # noqa: E731
    else:
        path, base_name = plan.sources[name]
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(base_name)
        rows = seen.rows(base_name, weight) if seen else lambda start, stop: weight[start:stop]
    rows = adapter.with_tokens(name, rows)
    lora = adapter.updates.get(name)
    if tuple(weight.shape) != part.shape or (lora is not None and lora.shape != part.shape):
        have = tuple(weight.shape) if lora is None else lora.shape
        raise InputError(
            f"{adapter.folder}: {name} has the shape {have} there, {part.shape} in the base",
            "the adapter belongs to another model",
        )
    change = lora.onto(rows) if lora is not None else None
    for start, stop in spans(part.shape):
        found = rows(start, stop)
        if change is not None:
            old = found.float()
            found = change(old, start)
        if part.dtype.is_floating_point:
            exact, found = found, found.to(part.dtype)
            if not torch.isfinite(found).all():
                raise EdgeError(
                    f"{name} does not fit into {part.dtype}, or holds no numbers", "--dtype bfloat16"
                )
            if change is not None:
                drift.weight += _square(old)
                drift.update += _square(exact - old)
                drift.lost += _square(exact - found.float())
        yield found


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _chat_template(adapter: Path, base: Path, known: manifest.Manifest) -> bytes:
    """The template's bytes, from the adapter or, where it is gone there, from the base.

    Raises InputError where neither has the template that the adapter was trained with.
    """
    path = adapter / "chat_template.jinja"
    source = path.read_bytes() if path.is_file() else chat_format.load(base).source.encode("utf-8")
    if manifest.text_digest(source.decode("utf-8", "replace")) != known.chat_template:
        raise InputError(
            f"{adapter}: the chat template is not the one it was trained with", "train again, or put it back"
        )
    return source


def _load(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return data if isinstance(data, dict) else {}


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge merge", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, with adapter/ in it")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="of the merged weights")
    parser.add_argument(
        "--into", choices=INTO, default="nf4", help="the weights that training saw, or the base's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    options = parser.parse_args(argv)
    run(options.run, dtype=options.dtype, into=options.into, overwrite=options.overwrite)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
