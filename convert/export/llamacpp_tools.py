"""llama.cpp's converter and quantiser, each in a process of its own, and the types that they know.

The converter comes out of the pinned sdist with its matching gguf-py. Native code may abort: its process ends,
and ours says what happened.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from edge.artefact.gguf_header import FILE_TYPES
from edge.errors import EdgeError, InputError, UnavailableError
from edge.machine import hardware
from edge.machine.llamacpp_source import sdist

# All that the quantiser knows, best quality first within a size (MXFP4 is for mixtures of experts).
QUANTS = (
    "F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0",
    "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0", "MXFP4_MOE",
    "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS",
    "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q2_0", "TQ2_0", "TQ1_0",
    "IQ1_M", "IQ1_S", "Q1_0",
)  # fmt: skip
# Below three bits rounding is blind without one: the quantiser refuses.
NEED_MATRIX = ("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
# Those whose tensors are mostly of types that convert.export.gptq knows.
GPTQ = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")
WHOLE = {"F32": "f32", "BF16": "bf16", "F16": "f16"}


def run_converter(script_name: str, source: Path, target: Path, options: list[str]) -> None:
    """Run one of llama.cpp's converters. Raises EdgeError that says what it could not do."""
    script = sdist() / "vendor" / "llama.cpp" / script_name
    command = [sys.executable, str(script), str(source), "--outfile", str(target), *options]
    env = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("NO_LOCAL_GGUF", None)
    done = subprocess.run(command, capture_output=True, env=env, cwd=target.parent, check=False)
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode == 0 and target.is_file():
        return
    if "BPE pre-tokenizer was not recognized" in log:
        raise InputError(
            f"llama.cpp does not know the pre-tokenizer of {source / 'tokenizer.json'}",
            "use the base model's own tokenizer files, unchanged: with a guess the tokens would be wrong",
        )
    if unknown := re.search(r"Model (\S+) is not supported", log):
        raise InputError(
            f"llama.cpp's converter does not know the architecture {unknown[1]}", "use another base"
        )
    if missing := re.search(r"No module named '([\w.]+)'", log):
        raise UnavailableError(
            f"llama.cpp's converter needs the package '{missing[1]}', which is not installed",
            "pip install -c constraints.txt -e '.[train]'",
        )
    raise EdgeError(f"llama.cpp's converter failed on {source}:\n{tail(log)}", "its last lines are above")


def quantize(source: Path, target: Path, quant: str, matrix: Path | None = None) -> list[str]:
    """Quantise; returns a line for each tensor that took another type than the recipe's."""
    ftype = next(number for number, name in FILE_TYPES.items() if name == quant)
    job = {"source": str(source), "target": str(target), "ftype": ftype, "imatrix": str(matrix or "")}
    answer, log = run_child("quantize", job, target)
    if answer["code"] != 0:
        raise EdgeError(f"llama.cpp could not quantise to {quant}:\n{tail(log)}", "try another --quant")
    found = re.findall(r"ncols\s+(\d+) not divisible by\s+(\d+).*?-> falling back to\s+(\S+)", log)
    return [f"rows of {columns} are no multiple of {block}, so {kind}" for columns, block, kind in found]


def run_child(mode: str, job: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Run llamacpp_child.py; its answer and log. Raises EdgeError where it dies or refuses."""
    script = str(Path(__file__).with_name("llamacpp_child.py"))
    job = job | {"threads": hardware.cpu_threads()}
    done = subprocess.run(
        [sys.executable, "-P", script, mode],
        input=json.dumps(job).encode("utf-8"),
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1"},
        check=False,
    )
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode != 0:
        raise EdgeError(
            f"llama.cpp could not {mode} {path.name} (exit code {done.returncode}):\n{tail(log)}",
            "if it is not installed or does not load: python -m edge.machine.build_llamacpp",
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer, log


def tail(log: str, lines: int = 12) -> str:
    return "\n".join(line[:200] for line in log.replace("\r", "\n").strip().splitlines()[-lines:])
