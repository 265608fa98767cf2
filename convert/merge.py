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

from convert.model.hf_folder import SHARD, stage_folder
from edge.artefact import manifest
from edge.console import plain_console
from edge.errors import UsageError
from edge.progress import add_progress_option, phase, result

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = ("bfloat16", "float16", "float32")
INTO = ("nf4", "original")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="edge merge", description="Adapter and base -> one 16-bit model: the model that was trained."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, with adapter/ in it")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the merged weights")
    parser.add_argument(
        "--into", choices=INTO, default="nf4", help="the weights that training saw, or the base's"
    )
    parser.add_argument("--base", type=Path, help="the model under the adapter (default: what it names)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    add_progress_option(parser)
    options = parser.parse_args(argv)
    merged = run(
        options.run, dtype=options.dtype, into=options.into, base=options.base, overwrite=options.overwrite
    )
    result(path=str(merged))
    return 0


def run(
    run_folder: Path | None,
    *,
    dtype: str = "float16",
    into: str = "nf4",
    target: Path | None = None,
    base: Path | None = None,
    shard: int = SHARD,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Merge run_folder/adapter with its base into `target` (run_folder/merged), whose path is returned.

    An adapter's own folder, as other trainers leave it, is taken as well; `merged` then lies inside it. None:
    `base` alone is written. base: in place of the model that the adapter names. shard: bytes of a file at
    most. into: "nf4" adds to the dequantised weights that training saw, "original" to the base as it is. An
    adapter that was trained over 16-bit weights is added to these either way.
    Raises UsageError for an unknown dtype or into, InputError for an adapter or base that cannot be used,
    ExistsError without `overwrite`.
    """
    console = console or plain_console()
    if dtype not in DTYPES or into not in INTO:
        raise UsageError(
            f"--dtype {dtype} --into {into}: no such choice", f"{', '.join(DTYPES)}; {', '.join(INTO)}"
        )
    folder = stage_folder(run_folder, "adapter") if run_folder else None
    if target is None:
        assert run_folder is not None
        target = run_folder / "merged"
    manifest.check_target(target, overwrite)
    # Imported late: with torch they take seconds, and a wrong option or path is refused before.
    from convert.model.merged_folder import MergedFolder
    from convert.verify import compare
    from convert.verify.torch_reader import TorchReader

    merged = MergedFolder(folder, base=base, dtype=dtype, into=into)
    manifest.check_free(target, merged.weights.bytes)
    with manifest.publish(target, overwrite=overwrite) as partial:
        with phase(console, f"merging into {target}"):
            drift = merged.write(partial, shard=shard)
        report = compare.prove(TorchReader(merged.folder, base), TorchReader(partial), console)
    bits = "8-bit" if merged.record.settings.get("quantization_bit") == 8 else "NF4"
    kind = f"dequantised {bits}" if merged.into == "nf4" else "original"
    console.print(
        f"{target}: {len(merged.adapter.updates)} layers changed by {drift['update']:.2%} of their weights, "
        f"added to the {kind} base; {dtype} rounds off {drift['rounding']:.1%} of that"
    )
    if merged.adapter.whole:
        console.print(f"  taken whole from the adapter: {', '.join(sorted(merged.adapter.whole)[:4])}")
    compare.summary(report, console)
    return target
