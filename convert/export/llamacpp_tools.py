"""llama.cpp's converter and quantiser, each in a process of its own, and the types that they write.

The converter comes out of the pinned sdist with its matching gguf-py. Native code may abort: then its process
ends, and the error gives the last lines of its log.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from edge.artefact.gguf_header import FILE_TYPES
from edge.errors import EdgeError, InputError, UnavailableError, UsageError
from edge.machine import hardware
from edge.machine.llamacpp_source import sdist
from edge.setup import install_command

# All that the quantiser knows, best quality first within a size (MXFP4 is for mixtures of experts).
QUANTS = (
    "F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0",
    "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0", "MXFP4_MOE",
    "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS",
    "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q2_0", "TQ2_0", "TQ1_0",
    "IQ1_M", "IQ1_S", "Q1_0",
)  # fmt: skip
# The quantiser refuses these without an importance matrix.
NEED_MATRIX = ("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
# Those whose tensors are mostly of types that convert.export.gptq knows.
GPTQ = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")
# Types that the converter writes itself, with its names for them.
WHOLE = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
DEFAULT, DEFAULT_SMALL = "Q4_K_M", "Q8_0"


def check_quantisation(quant: str | None, imatrix: bool, gptq: bool) -> str | None:
    """`quant` in capitals. Raises UsageError for an unknown type, or one that cannot be rounded so."""
    quant = quant and quant.upper()
    if quant and quant not in QUANTS:
        raise UsageError(f"--quant {quant}: no such type", f"types: {' '.join(QUANTS)}")
    if imatrix and quant in WHOLE:
        raise UsageError(f"--imatrix: {quant} is not quantised", "leave it out, or choose a smaller type")
    if gptq and quant and quant not in GPTQ:
        raise UsageError(f"--gptq cannot choose the codes of {quant}", f"types: {' '.join(GPTQ)}")
    if gptq and imatrix:
        raise UsageError(
            "--gptq and --imatrix are two ways to round", "leave one out; --ladder measures both"
        )
    return quant


def run_converter(script_name: str, source: Path, target: Path, options: list[str]) -> None:
    """Run one of llama.cpp's converters, from `source` to the file `target`; raises as `run_exporter`."""
    script = sdist() / "vendor" / "llama.cpp" / script_name
    run_exporter(
        "llama.cpp's converter",
        [str(script), str(source), "--outfile", str(target), *options],
        target,
        refusals={
            "BPE pre-tokenizer was not recognized": (
                f"llama.cpp does not know the pre-tokenizer of {source / 'tokenizer.json'}",
                "use the base model's own tokenizer files, unchanged: with a guess the tokens would be wrong",
            ),
            r"Model (\S+) is not supported": (
                "llama.cpp's converter does not know the architecture {}",
                "use another base",
            ),
        },
        extras="train",
    )


def run_exporter(
    name: str, arguments: list[str], target: Path, *, refusals: dict[str, tuple[str, str]], extras: str
) -> None:
    """Run another project's exporter, which writes `target`, in a process of its own in the target's folder.

    arguments: those of Python. refusals: message and hint by a pattern of its log; its groups go into the
    message. extras: ours that install what it needs. Raises InputError for a refusal, UnavailableError for a
    missing package, EdgeError with the end of the log for anything else.
    """
    env = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("NO_LOCAL_GGUF", None)
    process = subprocess.run(
        [sys.executable, *arguments], capture_output=True, env=env, cwd=target.parent, check=False
    )
    if process.returncode == 0 and target.is_file():
        return
    log = (process.stdout + process.stderr).decode("utf-8", "replace")
    for pattern, (message, hint) in refusals.items():
        if match := re.search(pattern, log):
            raise InputError(message.format(*match.groups()), hint)
    if missing := re.search(r"No module named '([\w.]+)'", log):
        raise UnavailableError(
            f"{name} needs the package '{missing[1]}', which is not installed",
            install_command(*extras.split(",")),
        )
    raise EdgeError(f"{name} failed to write {target.name}:\n{tail(log)}", "its last lines are above")


def quantize(source: Path, target: Path, quant: str, matrix: Path | None = None) -> list[str]:
    """Quantise the GGUF `source` to `target`; a line for each tensor that took a larger type.

    matrix: an importance matrix, as convert.export.imatrix saves it. Raises EdgeError with the end of
    llama.cpp's log.
    """
    job = {
        "source": str(source),
        "target": str(target),
        "ftype": next(number for number, name in FILE_TYPES.items() if name == quant),
        "threads": hardware.cpu_threads(),
        "imatrix": str(matrix or ""),
    }
    done = subprocess.run(
        # -P: the script's folder has modules of its own, some with the names of packages.
        [sys.executable, "-P", str(Path(__file__).with_name("llamacpp_child.py"))],
        input=json.dumps(job).encode("utf-8"),
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1"},
        check=False,
    )
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode != 0:
        raise EdgeError(
            f"llama.cpp could not quantise to {quant} (exit code {done.returncode}):\n{tail(log)}",
            "try another --quant; if llama.cpp is not installed or does not load: "
            "python -m edge.machine.build_llamacpp",
        )
    fallbacks = re.findall(r"ncols\s+(\d+) not divisible by\s+(\d+).*?-> falling back to\s+(\S+)", log)
    return [f"rows of {columns} are no multiple of {block}, so {kind}" for columns, block, kind in fallbacks]


def tail(log: str, lines: int = 12) -> str:
    """The last lines of a log, each cut to 200 characters."""
    return "\n".join(line[:200] for line in log.replace("\r", "\n").strip().splitlines()[-lines:])
