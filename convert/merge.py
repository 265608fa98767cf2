"""Adapter and base -> one 16-bit model: the model that was trained.

    RUN/adapter + base -> RUN/merged

Training saw the base through 4 bits, so the adapter is added to the dequantised 4-bit weights (--into nf4),
in float32, and the sum is rounded once: to float16, which loses an eighth of what bfloat16 does, and what
does not fit into it is said. Tensors are read, changed and written one shard at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from convert import template
from convert.folder import check_folder
from edge import manifest
from edge.errors import EdgeError, InputError, UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INTO = ("nf4", "original")
SHARD = 2 * 2**30
_PACKAGES = ("torch", "bitsandbytes", "safetensors")


@dataclass(frozen=True)
class Lora:
    """One layer's update: scaling * b @ a. a: (rank, inputs), b: (outputs, rank)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def delta(self) -> torch.Tensor:
        """The update in float32, (outputs, inputs)."""
        return self.scaling * (self.b.float() @ self.a.float())


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


def scaling(config: dict[str, Any], layer: str) -> float:
    """alpha/r, or alpha/sqrt(r) for a rank-stabilised adapter (arXiv:2312.03732), by adapter_config.json."""

    def of(pattern: str, default: str) -> float:
        # As peft does it: the first pattern that matches the end of a layer's name.
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", layer):
                return float(value)
        return float(config[default])

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def read_adapter(folder: Path) -> dict[str, Lora]:
    """Updates by the name of the layer's weight in the base. Raises InputError for what is no plain LoRA."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not path.is_file() or not weights.is_file():
        raise InputError(f"{folder} lacks {path.name} or {weights.name}", "train again: edge train")
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("use_dora", "modules_to_save", "fan_in_fan_out"):
        if config.get(key):
            raise InputError(f"{path}: {key} is {config[key]!r}, which cannot be merged yet")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise InputError(f"{path}: only plain LoRA adapters can be merged")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(weights, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", key)
            if found is None:
                raise InputError(f"{weights}: {key} is no LoRA weight of a linear layer")
            halves.setdefault(found[1], {})[found[2]] = file.get_tensor(key)
    return {
        f"{layer}.weight": Lora(two["A"], two["B"], scaling(config, layer)) for layer, two in halves.items()
    }


def find_base(known: manifest.Manifest, adapter: Path) -> Path:
    """The base's folder by the adapter's manifest. Raises InputError where it is gone or was changed."""
    parent = known.parents[0] if known.parents else {"path": "", "digest": ""}
    name = str(known.settings.get("model_name_or_path", ""))
    folder = next((Path(one) for one in (parent["path"], name) if one and Path(one).is_dir()), None)
    if folder is None and name:
        from convert.pull import resolve

        folder = resolve(name, known.settings.get("model_revision"))
    if folder is None:
        raise InputError(f"{adapter / manifest.FILE} does not say which base it was trained on")
    if parent["digest"]:
        now = manifest.read(folder).digest
        if now != parent["digest"]:
            raise InputError(
                f"{folder} is not the base that {adapter} was trained on: its digest is {now[:19]}..., "
                f"not {parent['digest'][:19]}...",
                "put that base back, or train again",
            )
    return folder


def run(
    run_folder: Path,
    *,
    dtype: str = "float16",
    into: str = "nf4",
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Merge run_folder/adapter with its base into run_folder/merged, whose path is returned.

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
    adapter, target = run_folder / "adapter", run_folder / "merged"
    if run_folder.is_dir() and not adapter.is_dir():
        raise InputError(f"{run_folder} has no adapter", "make it: edge train CONFIG.yaml")
    known = manifest.read(adapter)
    if known.stage != "adapter":
        raise InputError(f"{adapter} is a {known.stage}, not an adapter", "give the run folder of edge train")
    manifest.check_target(target, overwrite)
    loras = read_adapter(adapter)
    base = check_folder(find_base(known, adapter))
    chat_template = _chat_template(adapter, base.path, known)
    quantized = known.settings.get("quantized") or []
    into = into if quantized else "original"
    tied = bool(base.config.get("tie_word_embeddings"))
    shards = _plan(base.weights, DTYPES[dtype], tied)
    missing = sorted(set(loras) - {name for shard in shards for name, _ in shard})
    if missing:
        tie = " (it is tied to the embeddings)" if tied and missing[0].startswith("lm_head") else ""
        raise InputError(f"{base.path} has no {missing[0]}{tie}, which the adapter changes", "train again")
    manifest.check_free(target, sum(_size(path) for path in base.weights))
    quantize = _Quantize(known.settings, set(quantized)) if into == "nf4" else None
    drift = Drift()
    with manifest.publish(target, overwrite=overwrite) as partial, console.status(f"merging into {target}"):
        _write(shards, partial, loras, quantize, DTYPES[dtype], drift)
        config = dict(base.config)
        # Everything else stays as the base has it: other readers know these keys.
        config["dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"] = dtype
        _dump(partial / "config.json", config)
        generation = _load(base.path / "generation_config.json")
        _dump(partial / "generation_config.json", {**generation, "eos_token_id": known.stop_ids})
        for name in template.FILES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, partial / name)
        (partial / "chat_template.jinja").write_bytes(chat_template)
        manifest.write(
            partial,
            manifest.Manifest(
                stage="merged",
                name=known.name,
                base_model=known.base_model,
                parents=[known.parent(adapter.absolute()), *known.parents],
                settings={"dtype": dtype, "into": into, "drift": drift.numbers()},
                chat_template=known.chat_template,
                stop_ids=known.stop_ids,
                thinking=known.thinking,
                versions=manifest.versions(*_PACKAGES),
            ),
        )
    numbers = drift.numbers()
    kind = "dequantised NF4" if into == "nf4" else "original"
    console.print(
        f"{target}: {len(loras)} layers changed by {numbers['update']:.2%} of their weights, added to the "
        f"{kind} base; {dtype} rounds off {numbers['rounding']:.1%} of that"
    )
    return target


class _Quantize:
    """Sends a weight through 4 bits as training did: same type, blocks, scales and device."""

    def __init__(self, settings: dict[str, Any], layers: set[str]) -> None:
        # It would advise to install a kernel that only serves inference.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        self._layers = layers
        self._dtype = DTYPES[settings["compute_dtype"]]
        self._how = {
            "blocksize": settings["quant_block"],
            "compress_statistics": settings["double_quantization"],
        }
        self._device = "cuda" if settings["device"] == "cuda" and torch.cuda.is_available() else "cpu"

    def holds(self, name: str) -> bool:
        return name.endswith(".weight") and re.sub(r"\.\d+\.", ".*.", name[: -len(".weight")]) in self._layers

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        data = weight.to(self._device, self._dtype).contiguous()
        packed, state = quantize_4bit(data, quant_type="nf4", **self._how)
        return dequantize_4bit(packed, state).cpu()


def _plan(weights: tuple[Path, ...], dtype: torch.dtype, tied: bool) -> list[list[tuple[str, Path]]]:
    """(tensor, file it is in) for each shard to write, of at most SHARD bytes or one tensor."""
    shards: list[list[tuple[str, Path]]] = [[]]
    size = 0
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if tied and name == "lm_head.weight":
                    # A copy of the embeddings: readers tie it, and some refuse a second one.
                    continue
                bytes_ = math.prod(file.get_slice(name).get_shape()) * dtype.itemsize
                if shards[-1] and size + bytes_ > SHARD:
                    shards.append([])
                    size = 0
                shards[-1].append((name, path))
                size += bytes_
    return shards


def _write(
    shards: list[list[tuple[str, Path]]],
    folder: Path,
    loras: dict[str, Lora],
    quantize: _Quantize | None,
    dtype: torch.dtype,
    drift: Drift,
) -> None:
    where = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = dict(_tensors(shard, loras, quantize, dtype, drift))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _dump(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": where},
        )


def _tensors(
    shard: list[tuple[str, Path]],
    loras: dict[str, Lora],
    quantize: _Quantize | None,
    dtype: torch.dtype,
    drift: Drift,
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, path in shard:
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(name)
        if quantize is not None and quantize.holds(name):
            weight = quantize(weight)
        lora = loras.get(name)
        if lora is not None:
            old, update = weight.float(), lora.delta()
            if old.shape != update.shape:
                raise InputError(
                    f"{path}: {name} has the shape {tuple(old.shape)}, the adapter's {tuple(update.shape)}",
                    "the adapter belongs to another model",
                )
            weight = old + update
            drift.weight += float(old.square().sum())
            drift.update += float(update.square().sum())
            drift.lost += float((weight - weight.to(dtype).float()).square().sum())
        if weight.is_floating_point():
            weight = weight.to(dtype)
            if not torch.isfinite(weight).all():
                raise EdgeError(f"{name} does not fit into {dtype}, or holds no numbers", "--dtype bfloat16")
        yield name, weight.contiguous()


def _chat_template(adapter: Path, base: Path, known: manifest.Manifest) -> bytes:
    """The template's bytes, from the adapter or, where it is gone there, from the base.

    Raises InputError where neither has the template that the adapter was trained with.
    """
    path = adapter / "chat_template.jinja"
    source = path.read_bytes() if path.is_file() else template.load(base).source.encode("utf-8")
    if manifest.text_digest(source.decode("utf-8", "replace")) != known.chat_template:
        raise InputError(
            f"{adapter}: the chat template is not the one it was trained with", "train again, or put it back"
        )
    return source


def _size(path: Path) -> int:
    return path.stat().st_size


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
