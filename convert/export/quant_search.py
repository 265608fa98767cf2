"""`edge export gguf RUN --ladder`: several types measured on this machine, one recommended and exported.

Quality is the model's affair: the divergence from the merged model. Speed is the machine's: on one CPU Q4_0
decodes 1.6 times as fast as Q4_K_M of the same size, on another it may not. So both are measured, four-bit
types also with an importance matrix and with GPTQ; ladder.json and ladder.svg keep what was found.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convert import svg_charts
from convert.export import gguf, llamacpp_tools
from convert.export.source import Source, folders, open_source
from convert.verify import compare
from convert.verify.gguf_reader import GgufReader
from convert.verify.logits import Reference
from convert.verify.torch_reader import TorchReader
from edge.artefact import manifest
from edge.errors import EdgeError, InputError
from edge.machine import hardware

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0")
WITH_MATRIX = ("Q4_K_M", "IQ4_XS", "Q4_0")
# Of these the one that is quickest to answer: choosing codes takes longer than all else here.
WITH_GPTQ = ("Q4_K_M", "Q4_0")
_GPTQ_FILE = "gptq.gguf"
# A type that is this much slower to answer than the fastest is not preferred for its quality alone.
NEAR = 1.05


@dataclass(frozen=True)
class Rung:
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
        """A prompt of 256 tokens and an answer of 128, one reader."""
        return 256 / self.prompt + 128 / self.decode


def run(run_folder: Path, *, overwrite: bool = False, console: Console | None = None) -> Path:
    """Measure the types, export the recommended one to the run's `gguf` folder; its path.

    Raises as gguf.run.
    """
    console = console or Console(markup=False, highlight=False, soft_wrap=True)
    source, target = folders(run_folder)
    origin = open_source(source)
    target = target.absolute()
    manifest.check_target(target, overwrite)
    # The first file, the best so far and the one that is measured.
    manifest.check_free(target.parent, int(origin.weights * 2.3))
    with manifest.publish(target, overwrite=overwrite) as partial:
        first = partial / f"first-{origin.whole}.gguf"
        with console.status("converting"):
            gguf.convert(origin, first, origin.whole)
        found = gguf.check(gguf.read_header(first), origin)
        archive = _matrix(origin, first, partial / "imatrix.npz", console)
        rungs = _climb(origin, first, archive, partial, console)
        chosen, reason = recommend(rungs)
        final = partial / f"{origin.file_name}-{chosen.quant}.gguf"
        if chosen.rounding == "gptq":
            (partial / _GPTQ_FILE).replace(final)
        else:
            llamacpp_tools.quantize(first, final, chosen.quant, archive if chosen.rounding else None)
        for name in (first.name, "imatrix.npz", _GPTQ_FILE):
            (partial / name).unlink(missing_ok=True)
        record = {"machine": hardware.cpu_model(), "chosen": chosen.name, "reason": reason}
        record["rungs"] = [asdict(rung) for rung in rungs]
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        (partial / "ladder.json").write_text(text, encoding="utf-8")
        (partial / "ladder.svg").write_text(picture(rungs, chosen, origin.known.name), encoding="utf-8")
        made = origin.manifest(chosen.quant, final, rounding=chosen.rounding, ladder=record)
        made.verify = found
        made.stop_ids = made.stop_ids or found["ends"]
        manifest.write(partial, made)
        report = gguf.compare(origin, final, console)
    console.print(table(rungs, chosen))
    console.print(f"recommended: {chosen.name}: {reason}")
    console.print(f"{target / final.name}; the picture: {target / 'ladder.svg'}")
    compare.summary(report, console)
    return target / final.name


def _matrix(origin: Source, first: Path, archive: Path, console: Console) -> Path | None:
    try:
        with console.status("gathering the importance matrix"):
            gguf.gather(origin, first, archive)
    except InputError as error:
        console.print(f"note: without an importance matrix: {error.message}")
        return None
    return archive


def _climb(origin: Source, first: Path, archive: Path | None, folder: Path, console: Console) -> list[Rung]:
    """Each type in turn: quantised, compared, timed, removed; but for _GPTQ_FILE, which took long."""
    plan = [(quant, "") for quant in TYPES]
    if archive is not None:
        plan += [(quant, "matrix") for quant in WITH_MATRIX]
    rungs = []
    with contextlib.ExitStack() as stack:
        a = stack.enter_context(contextlib.closing(TorchReader(origin.path)))
        speaker = stack.enter_context(contextlib.closing(GgufReader(first)))
        speaker.thinking = origin.known.thinking
        with console.status("computing the merged model"):
            reference = stack.enter_context(contextlib.closing(Reference(a, speaker)))
        speaker.close()
        for number, (quant, rounding) in enumerate(plan, 1):
            path = folder / "rung.gguf"
            with console.status(f"{number} of {len(plan)}: {quant}{' + matrix' if rounding else ''}"):
                try:
                    llamacpp_tools.quantize(first, path, quant, archive if rounding else None)
                except EdgeError as error:
                    console.print(f"note: {quant} is left out: {error.message.splitlines()[0]}")
                    continue
                rungs.append(_measure(path, quant, rounding, reference))
            path.unlink()
        candidates = [rung for rung in rungs if rung.quant in WITH_GPTQ and not rung.rounding]
        if archive is not None and candidates:
            quant = min(candidates, key=lambda rung: rung.seconds).quant
            path = folder / _GPTQ_FILE
            llamacpp_tools.quantize(first, path, quant)
            try:
                gguf.choose_codes(origin, first, path, console)
            except InputError as error:
                console.print(f"note: without GPTQ: {error.message}")
            else:
                with console.status(f"{quant} + gptq"):
                    rungs.append(_measure(path, quant, "gptq", reference))
    if not rungs:
        raise EdgeError("no type could be measured", "export one by --quant")
    return rungs


def _measure(path: Path, quant: str, rounding: str, reference: Reference) -> Rung:
    with contextlib.closing(GgufReader(path)) as reader:
        numbers = reference.against(reader)
        prompt, decode = reader.speed()
    return Rung(
        quant,
        rounding,
        path.stat().st_size,
        round(prompt, 1),
        round(decode, 1),
        numbers["kl_mean"],
        numbers["kl_p99"],
        numbers["top1"],
    )


def recommend(rungs: list[Rung]) -> tuple[Rung, str]:
    """The quickest to answer of those that are as close as four good bits should be, and why.

    Within NEAR of the quickest the closest is taken. Where none is close enough: the closest.
    """
    bound = compare.BOUNDS["Q4_K_M"]
    close = [rung for rung in rungs if rung.kl <= bound.kl and rung.top1 >= bound.top1]
    limits = f"mean KL of {bound.kl:g} and {bound.top1:.0%} equal top tokens"
    if not close:
        best = min(rungs, key=lambda rung: rung.kl)
        return best, f"none keeps within a {limits}; this is the closest (KL {best.kl:.2g})"
    quickest = min(rung.seconds for rung in close)
    best = min((rung for rung in close if rung.seconds <= NEAR * quickest), key=lambda rung: rung.kl)
    reason = (
        f"{best.decode:.1f} tokens/s decoding and {best.prompt:.0f} reading here, KL {best.kl:.2g}: "
        f"the quickest that keeps within a {limits}"
    )
    faster = [rung for rung in rungs if rung.seconds < best.seconds / NEAR and rung not in close]
    if faster:
        other = min(faster, key=lambda rung: rung.seconds)
        reason += (
            f" ({other.name} would be {best.seconds / other.seconds:.2f} times as fast, KL {other.kl:.2g})"
        )
    return best, reason


def table(rungs: list[Rung], chosen: Rung) -> Table:
    made = Table(title=f"on {hardware.cpu_model()}", title_justify="left")
    for heading in ("type", "MiB", "decode tok/s", "prompt tok/s", "KL mean", "KL p99", "same top", ""):
        made.add_column(heading, justify="left" if heading in ("type", "") else "right")
    plain = {rung.quant: rung.kl for rung in rungs if not rung.rounding}
    for rung in sorted(rungs, key=lambda rung: (-rung.size, rung.rounding)):
        said = ["recommended"] if rung == chosen else []
        if rung.rounding and rung.kl and plain.get(rung.quant):
            factor = plain[rung.quant] / rung.kl
            said.append(f"KL {max(factor, 1 / factor):.2f} times {'smaller' if factor >= 1 else 'larger'}")
        made.add_row(
            rung.name,
            f"{rung.size / 2**20:,.0f}",
            f"{rung.decode:.1f}",
            f"{rung.prompt:.0f}",
            f"{rung.kl:.2e}",
            f"{rung.kl_p99:.2e}",
            f"{rung.top1:.3f}",
            "; ".join(said),
        )
    return made


def picture(rungs: list[Rung], chosen: Rung, name: str) -> str:
    """SVG: speed to the right, KL upwards (logarithmic), a circle's area for the file's size."""
    largest = max(rung.size for rung in rungs)
    points = [
        svg_charts.Point(
            rung.decode,
            max(rung.kl, 1e-9),
            f"{rung.name}, {rung.size / 2**20:,.0f} MiB",
            area=rung.size / largest,
            colour=1 if rung == chosen else 0 if rung.rounding else 6,
        )
        for rung in rungs
    ]
    across = "decode, tokens/s of one stream; a circle's area is the file's size"
    return svg_charts.scatter(
        name, "mean KL from the merged model, nats", across, points, log_x=True, log_y=True
    )
