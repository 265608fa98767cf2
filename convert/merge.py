"""`edge merge RUN`: adapter and base -> one 16-bit model, the model that was trained.

    RUN/adapter + base -> RUN/merged

Training saw the base through 4 bits, so the adapter is added to the dequantised 4-bit weights (--into nf4),
in float32, and the sum is rounded once: to float16, which loses an eighth of what bfloat16 does; a value that
does not fit into it is an error. Before the folder is published it is compared with the adapter over its
base.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from convert.model.hf_folder import check_folder, stage_folder
from edge.artefact import json_file, manifest
from edge.console import add_progress_option, phase, plain_console, result
from edge.errors import InputError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = ("bfloat16", "float16", "float32")
INTO = ("nf4", "original")
_PACKAGES = ("torch", "bitsandbytes", "safetensors")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="edge merge", description="Adapter and base -> one 16-bit model: the model that was trained."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, with adapter/ in it")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the merged weights")
    parser.add_argument(
        "--into", choices=INTO, default="nf4", help="the weights that training saw, or the base's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    add_progress_option(parser)
    options = parser.parse_args(argv)
    merged = run(options.run, dtype=options.dtype, into=options.into, overwrite=options.overwrite)
    result(path=str(merged))
    return 0


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
    console = console or plain_console()
    if dtype not in DTYPES or into not in INTO:
        raise UsageError(
            f"--dtype {dtype} --into {into}: no such choice", f"{', '.join(DTYPES)}; {', '.join(INTO)}"
        )
    folder, target = stage_folder(run_folder, "adapter"), run_folder / "merged"
    # Imported late: with torch they take seconds, and a wrong option or path is refused before.
    from convert.model.dequantized_base import DequantizedBase
    from convert.model.lora_adapter import find_base, known_adapter, read_adapter
    from convert.model.merged_weights import MergedWeights
    from convert.verify import compare
    from convert.verify.torch_reader import TorchReader

    record = known_adapter(folder)
    manifest.check_target(target, overwrite)
    adapter = read_adapter(folder)
    base = check_folder(find_base(record, folder))
    # Without settings: as it is.
    dequantised = DequantizedBase(record.settings if into == "nf4" else {})
    into = into if record.settings.get("quantized") else "original"
    weights = MergedWeights(base, adapter, dtype, dequantised)
    manifest.check_free(target, weights.bytes)
    with manifest.publish(target, overwrite=overwrite) as partial:
        _write_others(partial, folder, base.path, record)
        with phase(console, f"merging into {target}"):
            weights.write(partial)
        json_file.write(partial / "config.json", weights.config)
        drift = weights.drift()
        settings = {"dtype": dtype, "into": into, "drift": drift}
        manifest.write(partial, record.child("merged", folder, settings=settings, packages=_PACKAGES))
        report = compare.prove(TorchReader(folder), TorchReader(partial), console)
    kind = "dequantised NF4" if into == "nf4" else "original"
    console.print(
        f"{target}: {len(adapter.updates)} layers changed by {drift['update']:.2%} of their weights, "
        f"added to the {kind} base; {dtype} rounds off {drift['rounding']:.1%} of that"
    )
    if adapter.whole:
        console.print(f"  taken whole from the adapter: {', '.join(sorted(adapter.whole)[:4])}")
    compare.summary(report, console)
    return target


def _write_others(target: Path, adapter: Path, base: Path, record: manifest.Manifest) -> None:
    """Write generation config, tokenizer and chat template of the merged model.

    Raises InputError where neither adapter nor base has the template that the adapter was trained with.
    """
    from convert.model import chat_format
    from convert.model.lora_adapter import load_format

    chat_format.write_generation_config(base, target, record.stop_ids)
    template = load_format(adapter, base).source
    if manifest.text_digest(template) != record.chat_template:
        raise InputError(
            f"{adapter}: the chat template is not the one it was trained with", "train again, or put it back"
        )
    source = adapter if (adapter / "tokenizer.json").is_file() else base
    chat_format.copy_tokenizer(source, target, template)
