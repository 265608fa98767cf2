"""`edge export gguf RUN --ladder`: several types measured on this machine, one recommended and exported.

The divergence from the merged model depends on the model, the speed on the machine: on one CPU Q4_0 decodes
1.6 times as fast as Q4_K_M of the same size, on another it may not. So both are measured, four-bit types also
with an importance matrix and with GPTQ; ladder.json and ladder.svg keep the results.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from convert import svg_charts
from convert.export.gguf import check, converted, prove, reference_by
from convert.export.gptq import choose_codes
from convert.export.imatrix import gather
from convert.export.llamacpp_tools import quantize
from convert.export.source import Source, open_source
from convert.model.hf_folder import stage_folder
from convert.verify import compare
from convert.verify.gguf_reader import GgufReader
from convert.verify.logits import Reference
from edge.artefact import json_file, manifest
from edge.artefact.gguf_header import read_header
from edge.console import plain_console, plain_table
from edge.errors import EdgeError, InputError
from edge.machine import hardware
from edge.progress import phase

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0")
WITH_MATRIX = ("Q4_K_M", "IQ4_XS", "Q4_0")
# Of these the one that is quickest to answer: choosing codes takes longer than all else here.
WITH_GPTQ = ("Q4_K_M", "Q4_0")
# A type that is this much slower to answer than the fastest is not preferred for its quality alone.
NEAR = 1.05
_MATRIX_FILE, _GPTQ_FILE = "imatrix.safetensors", "gptq.gguf"


@dataclass(frozen=True)
class Candidate:
    """One measured file.

    rounding: "matrix", "gptq" or, to the nearest, "". size in bytes; prompt and decode in tokens a second; kl
    in nats.
    """

    quant: str
    rounding: str
    size: int
    prompt: float
    decode: float
    kl: float
    kl_p99: float
    top1: float

    @property
    def name(self) -> str:
        return f"{self.quant} + {self.rounding}" if self.rounding else self.quant

    @property
    def seconds(self) -> float:
        """A prompt of 256 tokens and an answer of 128, one stream."""
        return 256 / self.prompt + 128 / self.decode


def run(run_folder: Path, *, overwrite: bool = False, console: Console | None = None) -> Path:
    """Measure the types, export the recommended one to the run's `gguf` folder; its path.

    Raises as gguf.run.
    """
    console = console or plain_console()
    origin = open_source(stage_folder(run_folder, "merged"))
    target = run_folder.absolute() / "gguf"
    manifest.check_target(target, overwrite)
    # The unquantised file, that with GPTQ and the one that is measured.
    manifest.check_free(target.parent, int(origin.weights * 2.3))
    with manifest.publish(target, overwrite=overwrite) as partial:
        with converted(origin, target, console) as first:
            check(read_header(first), origin)
            candidates = _measure_all(origin, first, partial, console)
            chosen, reason = recommend(candidates)
            file = partial / f"{origin.file_name}-{chosen.quant}.gguf"
            if chosen.rounding == "gptq":
                (partial / _GPTQ_FILE).replace(file)
            else:
                quantize(first, file, chosen.quant, partial / _MATRIX_FILE if chosen.rounding else None)
        for name in (_MATRIX_FILE, _GPTQ_FILE):
            (partial / name).unlink(missing_ok=True)
        record: dict[str, Any] = {"machine": hardware.cpu_model(), "chosen": chosen.name, "reason": reason}
        record["rungs"] = [asdict(candidate) for candidate in candidates]
        json_file.write(partial / "ladder.json", record)
        (partial / "ladder.svg").write_text(picture(candidates, chosen, origin.record.name), encoding="utf-8")
        settings = {"rounding": chosen.rounding, "ladder": record}
        _, report = prove(origin, read_header(file), chosen.quant, settings, console)
    console.print(table(candidates, chosen))
    console.print(f"recommended: {chosen.name}: {reason}")
    console.print(f"{target / file.name}; the picture: {target / 'ladder.svg'}")
    compare.summary(report, console)
    return target / file.name


def _measure_all(origin: Source, first: Path, folder: Path, console: Console) -> list[Candidate]:
    """Each type in turn: quantised from `first`, compared, timed, removed.

    What takes long is left in `folder`: _MATRIX_FILE and _GPTQ_FILE, where the data set is known. Raises
    EdgeError where no type could be measured.
    """
    plan = [(quant, "") for quant in TYPES]
    matrix = folder / _MATRIX_FILE
    try:
        with phase(console, "gathering the importance matrix"):
            gather(origin, first, matrix)
        plan += [(quant, "matrix") for quant in WITH_MATRIX]
    except InputError as error:
        console.print(f"note: without an importance matrix: {error.message}")
    candidates = []
    with contextlib.ExitStack() as stack:
        with phase(console, "computing the merged model"):
            reference = stack.enter_context(contextlib.closing(reference_by(origin, first)))
        path = folder / "candidate.gguf"
        for number, (quant, rounding) in enumerate(plan, 1):
            with phase(console, f"{number} of {len(plan)}: {quant}{' + matrix' if rounding else ''}"):
                try:
                    quantize(first, path, quant, matrix if rounding else None)
                except EdgeError as error:
                    console.print(f"note: {quant} is left out: {error.message.splitlines()[0]}")
                    continue
                candidates.append(_measure(path, quant, rounding, reference))
            path.unlink()
        plain = [
            candidate for candidate in candidates if candidate.quant in WITH_GPTQ and not candidate.rounding
        ]
        if matrix.exists() and plain:
            quant, path = min(plain, key=lambda candidate: candidate.seconds).quant, folder / _GPTQ_FILE
            quantize(first, path, quant)
            try:
                choose_codes(origin, first, path, console)
            except InputError as error:
                console.print(f"note: without GPTQ: {error.message}")
            else:
                with phase(console, f"{quant} + gptq"):
                    candidates.append(_measure(path, quant, "gptq", reference))
    if not candidates:
        raise EdgeError("no type could be measured", "export one by --quant")
    return candidates


def _measure(path: Path, quant: str, rounding: str, reference: Reference) -> Candidate:
    with contextlib.closing(GgufReader(path)) as reader:
        numbers = reference.against(reader)
        prompt, decode = (round(speed, 1) for speed in reader.speed())
    kl, kl_p99, top1 = (numbers[key] for key in ("kl_mean", "kl_p99", "top1"))
    return Candidate(quant, rounding, path.stat().st_size, prompt, decode, kl, kl_p99, top1)


def recommend(candidates: list[Candidate]) -> tuple[Candidate, str]:
    """The quickest to answer of those that are as close as four good bits should be, and why.

    Within NEAR of the quickest the closest is taken. Where none is close enough: the closest.
    """
    bound = compare.BOUNDS["Q4_K_M"]
    close = [
        candidate for candidate in candidates if candidate.kl <= bound.kl and candidate.top1 >= bound.top1
    ]
    limits = f"mean KL of {bound.kl:g} and {bound.top1:.0%} equal top tokens"
    if not close:
        best = min(candidates, key=lambda candidate: candidate.kl)
        return best, f"none keeps within a {limits}; this is the closest (KL {best.kl:.2g})"
    quickest = min(candidate.seconds for candidate in close)
    best = min(
        (candidate for candidate in close if candidate.seconds <= NEAR * quickest),
        key=lambda candidate: candidate.kl,
    )
    reason = (
        f"{best.decode:.1f} tokens/s decoding and {best.prompt:.0f} reading here, KL {best.kl:.2g}: "
        f"the quickest that keeps within a {limits}"
    )
    faster = [
        candidate
        for candidate in candidates
        if candidate.seconds < best.seconds / NEAR and candidate not in close
    ]
    if faster:
        other = min(faster, key=lambda candidate: candidate.seconds)
        reason += (
            f" ({other.name} would be {best.seconds / other.seconds:.2f} times as fast, KL {other.kl:.2g})"
        )
    return best, reason


def table(candidates: list[Candidate], chosen: Candidate) -> Table:
    """The candidates, largest first, and how much nearer or further a rounding brought each type."""
    headings = ("type", "MiB", "decode tok/s", "prompt tok/s", "KL mean", "KL p99", "same top", "")
    rows = []
    nearest = {candidate.quant: candidate.kl for candidate in candidates if not candidate.rounding}
    for candidate in sorted(candidates, key=lambda candidate: (-candidate.size, candidate.rounding)):
        remarks = ["recommended"] if candidate == chosen else []
        if candidate.rounding and candidate.kl and nearest.get(candidate.quant):
            factor = nearest[candidate.quant] / candidate.kl
            change = "smaller" if factor >= 1 else "larger"
            remarks.append(f"KL {max(factor, 1 / factor):.2f} times {change}")
        rows.append(
            [
                candidate.name,
                f"{candidate.size / 2**20:,.0f}",
                f"{candidate.decode:.1f}",
                f"{candidate.prompt:.0f}",
                f"{candidate.kl:.2e}",
                f"{candidate.kl_p99:.2e}",
                f"{candidate.top1:.3f}",
                "; ".join(remarks),
            ]
        )
    return plain_table(headings, rows, title=f"on {hardware.cpu_model()}")


def picture(candidates: list[Candidate], chosen: Candidate, name: str) -> str:
    """SVG: speed to the right, KL upwards (logarithmic), a circle's area for the file's size."""
    largest = max(candidate.size for candidate in candidates)
    points = [
        svg_charts.Point(
            candidate.decode,
            max(candidate.kl, 1e-9),
            f"{candidate.name}, {candidate.size / 2**20:,.0f} MiB",
            area=candidate.size / largest,
            colour=1 if candidate == chosen else 0 if candidate.rounding else 6,
        )
        for candidate in candidates
    ]
    across = "decode, tokens/s of one stream; a circle's area is the file's size"
    return svg_charts.scatter(
        name, "mean KL from the merged model, nats", across, points, log_x=True, log_y=True
    )
