"""`edge verify A B`: proof that stage B is still the model that stage A is.

    edge verify runs/magic-conch/adapter runs/magic-conch/merged
    edge verify runs/magic-conch/merged runs/magic-conch/gguf
    edge verify runs/magic-conch/merged runs/magic-conch/onnx

Chat template, prompt ids, special tokens, tokenizer round trip and stop tokens must be equal; logits may
differ as far as the type of B's weights allows. The report goes to `verify` in B's edge.json. Merge and every
export run the same comparison before they publish.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from convert.verify import probes
from convert.verify.gguf_reader import GgufReader
from convert.verify.logits import Reference
from convert.verify.onnx_reader import OnnxReader
from convert.verify.reader import Reader, Side
from convert.verify.torch_reader import TorchReader
from edge.artefact import find, json_file, manifest
from edge.errors import InputError
from edge.progress import phase


@dataclass(frozen=True)
class Bound:
    """What weights of a type may cost: mean KL in nats, top-1 agreement. better: the type to take instead."""

    kl: float
    top1: float
    better: str = ""


# From the exports of a 135M model and what is published of larger ones, which suffer less.
BOUNDS = {
    # transformers folders
    "float32": Bound(1e-5, 0.999),
    "float16": Bound(1e-4, 0.999, "float32"),
    "bfloat16": Bound(1e-3, 0.99, "float16"),
    # GGUF
    "F32": Bound(1e-5, 0.999),
    "F16": Bound(1e-3, 0.995, "F32"),
    "BF16": Bound(1e-3, 0.995, "F16"),
    "Q8_0": Bound(5e-3, 0.97, "F16"),
    "Q6_K": Bound(1e-2, 0.96, "Q8_0"),
    "Q5_1": Bound(2e-2, 0.94, "Q6_K"),
    "Q5_K_M": Bound(2e-2, 0.94, "Q6_K"),
    "Q5_K_S": Bound(3e-2, 0.93, "Q5_K_M"),
    "Q5_0": Bound(3e-2, 0.93, "Q5_K_M"),
    "Q4_K_M": Bound(6e-2, 0.90, "Q5_K_M"),
    "Q4_K_S": Bound(8e-2, 0.89, "Q4_K_M"),
    "IQ4_NL": Bound(8e-2, 0.89, "Q4_K_M"),
    "IQ4_XS": Bound(8e-2, 0.89, "Q4_K_M"),
    "Q4_1": Bound(1e-1, 0.87, "Q4_K_M"),
    "Q4_0": Bound(1e-1, 0.87, "Q4_K_M"),
    # ONNX, in blocks of 32 or 64; mixed: the most sensitive matrices in 8 bits
    "fp32": Bound(1e-5, 0.999),
    "fp16": Bound(1e-3, 0.99, "--precision fp32 --ep cpu"),
    "int8": Bound(5e-3, 0.97, "--precision fp32 (fp16 with --ep cuda)"),
    "int4 mixed": Bound(1e-1, 0.90, "--precision int8"),
    "int4": Bound(1e-1, 0.90, "--precision int8, or --precision int4 --scheme mixed,"),
}
# Anything smaller: three bits and less.
SMALL = Bound(2e-1, 0.80, "Q4_K_M")


@dataclass
class Report:
    """The comparison of `b` with `a`, from which it was made.

    unequal: what forbids that `b` stands for `a`. warnings: where logits differ more than b's type allows.
    unseen: what a server does not show. facts: of the tokenizer and the template, "equal", "unequal" or
    "unseen", and counts. logits: as Divergence.numbers.
    """

    a: Reader
    b: Side
    unequal: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def numbers(self) -> dict[str, Any]:
        """As it goes into edge.json."""
        against = {"stage": self.a.stage, "path": str(self.a.path.absolute()), "kind": self.a.kind}
        if self.a.manifest is not None:
            against["digest"] = self.a.manifest.digest
        return {
            "against": against,
            "kind": self.b.kind,
            **self.facts,
            "logits": self.logits,
            "unequal": self.unequal,
            "warnings": self.warnings,
            "notes": self.notes,
            **({"unseen": self.unseen} if self.unseen else {}),
            "seconds": round(self.seconds, 1),
        }

    def refuse(self, hint: str = "") -> None:
        """Raise InputError, naming each difference and what to do, unless `b` may stand for `a`."""
        if self.unequal:
            raise InputError(
                f"{self.b.path} is not the model that {self.a.path} is:\n  " + "\n  ".join(self.unequal),
                hint or "take tokenizer files and chat template of the model it came from, and make it again",
            )


@dataclass(frozen=True)
class Measured:
    """What `Reference.against` gave for the same two stages before, and the reference's notes."""

    logits: dict[str, Any]
    notes: list[str]


def compare(
    a: Reader, b: Reader, *, console: Console | None = None, measured: Measured | None = None
) -> Report:
    """Compare stage `b` with stage `a`, which it came from. Raises EdgeError where one cannot be computed.

    measured: the logits' part, where that is known. A memory that does not suffice for logits is a note in
    the report; all else is compared.
    """
    began = time.monotonic()
    report = Report(a, b)
    compare_template(report)
    compare_tokenizers(report)
    compare_stops(report)
    if not report.unequal:
        with phase(console, f"comparing logits: {a.path} and {b.path}"):
            _compare_logits(report, b, measured)
    report.seconds = time.monotonic() - began
    return report


def prove(a: Reader, b: Reader, console: Console, *, measured: Measured | None = None) -> Report:
    """Compare `b`, which is about to be published, with `a`, and keep the report in b's folder; closes both.

    measured: as in `compare`. Raises InputError where `b` must not stand for `a`, else as `compare`.
    """
    with contextlib.closing(a), contextlib.closing(b):
        report = compare(a, b, console=console, measured=measured)
    report.refuse()
    keep(report)
    return report


# Template, token ids, round trip, stop tokens


def compare_template(report: Report) -> None:
    a, b = report.a.template, report.b.template
    if b is None:
        report.facts["chat_template"] = "unseen"
        report.unseen.append("the chat template's text; what it makes of a conversation is compared")
        return
    report.facts["chat_template"] = "equal" if a == b else "unequal"
    if a != b:
        pairs = enumerate(zip(a, b, strict=False))
        start = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
        report.unequal.append(
            f"chat template: from character {start} on A has {a[start : start + 40]!r}, "
            f"B {b[start : start + 40]!r}"
        )
    elif not a:
        report.notes.append(
            "the model has no chat template: it goes on with texts (/v1/completions, raw: true) and refuses "
            "messages"
        )


def compare_tokenizers(report: Report) -> None:
    """Ids of what is served (prompts) and of plain texts; whether ids become the same texts again."""
    a, b = report.a, report.b
    conversations = [*probes.fixed(), *probes.from_data(a.manifest or b.manifest).probes]
    plain = [*probes.TEXTS, *_special_texts(a, b), a.template]
    messages = [probe.messages for probe in conversations]
    ids = [reader.prompt_ids(messages) + reader.encode(plain) for reader in (a, b)]
    different = [index for index, (x, y) in enumerate(zip(*ids, strict=True)) if x != y]
    report.facts["token_ids"] = "unequal" if different else "equal"
    report.facts["texts"] = len(ids[0])
    if different:
        first = different[0]
        x, y = ids[0][first], ids[1][first]
        text = [*(a.prompt(part).text for part in messages), *plain][first]
        report.unequal.append(
            f"token ids: {len(different)} of {len(ids[0])} texts, the first {text[:60]!r}: "
            f"A {_around(x, y)}, B {_around(y, x)}"
        )
        return
    back = [reader.decode(ids[0][len(conversations) :]) for reader in (a, b)]
    # Some tokenizers strip the space that they put before a text, others leave it.
    lost = [index for index, (x, y) in enumerate(zip(*back, strict=True)) if x.strip(" ") != y.strip(" ")]
    exact = sum(text == again for text, again in zip(probes.TEXTS, back[1], strict=False))
    report.facts["round_trip"] = "unequal" if lost else "equal"
    report.facts["round_trip_exact"] = f"{exact} of {len(probes.TEXTS)}"
    if lost:
        first = lost[0]
        report.unequal.append(
            f"tokenizer round trip: {plain[first][:40]!r} comes back as {back[0][first][:40]!r} from A, "
            f"{back[1][first][:40]!r} from B"
        )


def _special_texts(a: Reader, b: Side) -> list[str]:
    """Texts around special tokens of A, and around those that only one of the two takes as special."""
    tokens = a.special_tokens()
    # llama.cpp holds tokens of spaces as such, transformers as SentencePiece's underscores.
    apart = [token for token in {*tokens} ^ {*b.special_tokens()} if token.strip() and "▁" not in token]
    return [*probes.special_texts(tokens), *probes.special_texts(sorted(apart))]


def _around(ids: list[int], others: list[int]) -> list[int]:
    """The ids from shortly before the first one that differs from `others`."""
    start = next((i for i, (x, y) in enumerate(zip(ids, others, strict=False)) if x != y), 0)
    return ids[max(0, start - 2) : start + 8]


def compare_stops(report: Report) -> None:
    a, b = report.a, report.b
    if b.stop_ids is None:
        report.facts["stops"] = "unseen"
        report.unseen.append("stop tokens: the server neither names them nor lets a token be forced")
        return
    report.facts["stop_ids"] = sorted(b.stop_ids)
    # A file made elsewhere names one end token, its runtime finds the others by itself.
    missing, added = a.stop_ids - b.stop_ids - b.more_ends, b.stop_ids - a.stop_ids - a.more_ends
    report.facts["stops"] = "unequal" if missing or added else "equal"
    if missing or added:
        report.unequal.append(f"stop tokens: A ends at {sorted(a.stop_ids)}, B at {sorted(b.stop_ids)}")
    elif more := sorted(b.more_ends - a.stop_ids - a.more_ends):
        report.notes.append(
            f"{b.runtime} would also stop at {', '.join(map(str, more))}, the model's own files do not"
        )


# Logits


def _compare_logits(report: Report, b: Reader, measured: Measured | None) -> None:
    try:
        measured = measured or _measure(report.a, b)
        report.notes += measured.notes
        report.logits = measured.logits
    except InputError as error:
        report.notes.append(f"logits are not compared: {error.message}")
        return
    if count := report.logits.get("not_numbers"):
        report.unequal.append(f"logits: {count} positions are not finite numbers")
    elif report.logits and (warning := too_far(report.b.kind, report.logits)):
        report.warnings.append(warning)


def _measure(a: Reader, b: Reader) -> Measured:
    with contextlib.closing(Reference(a, b)) as reference:
        return Measured(reference.against(b), reference.notes)


def bound_of(kind: str) -> Bound:
    """What weights of `kind` may cost."""
    return BOUNDS.get(kind) or BOUNDS.get(kind.split(" ")[0], SMALL)


def too_far(kind: str, logits: dict[str, Any], *, known: bool = True) -> str:
    """The warning where logits differ more than weights of `kind` should, and what to take instead; or "".

    known: `kind` is what the weights are, not what they are held to. The divergence counts where it is known.
    A single position is a tie that rounding turned, and no share.
    """
    bound = bound_of(kind)
    kl, positions = logits.get("kl_mean"), logits["positions"]
    turned = round((1 - logits["top1"]) * positions)
    if (kl is None or kl <= bound.kl) and turned <= max(1, round((1 - bound.top1) * positions, 6)):
        return ""
    who, better = f"{kind} differs more than weights of this type should", bound.better
    if not known:
        who, better = "it differs more than weights of 16 bits should", ""
    divergence = "" if kl is None else f"mean KL {kl:.2g} (at most {bound.kl:g}), "
    return (
        f"{who}: {divergence}same top token {logits['top1']:.2%} (at least {bound.top1:.1%})"
        f"{f': {better} would be closer' if better else ''}"
    )


# Showing and keeping


_COLOURS = {"equal": "green", "unequal": "red", "unseen": "yellow"}


def show(report: Report, console: Console) -> None:
    """The report as a table, with its warnings and notes below."""
    a, b, facts, logits = report.a, report.b, report.facts, report.logits
    table = Table(title=f"{a.stage} and {b.stage}", title_justify="left", show_header=True)
    table.add_column("")
    for side in (a, b):
        table.add_column(f"{side.stage} ({side.kind})" if side.kind else side.stage, overflow="fold")
    table.add_column("", style="bold")
    lengths = ["" if reader.template is None else f"{len(reader.template):,} characters" for reader in (a, b)]
    stops = [", ".join(map(str, sorted(reader.stop_ids or ()))) for reader in (a, b)]
    for label, left, right, key in (
        ("chat template", *lengths, "chat_template"),
        ("prompt ids", f"{facts.get('texts')} texts" if "texts" in facts else "", "", "token_ids"),
        ("prompt lengths", f"{facts.get('prompts')} conversations", "", "prompt_lengths"),
        ("text -> ids -> text", f"exact: {facts.get('round_trip_exact')}", "", "round_trip"),
        ("stop tokens", *stops, "stops"),
    ):
        if key in facts:
            table.add_row(label, left, right, f"[{_COLOURS[facts[key]]}]{facts[key]}[/]")
    if logits.get("positions"):
        table.add_section()
        if "kl_mean" in logits:
            table.add_row("KL divergence, mean", "", "", f"{logits['kl_mean']:.2e}")
            table.add_row("KL divergence, p99", "", "", f"{logits['kl_p99']:.2e}")
        table.add_row("same top token", "", f"{logits['positions']:,} positions", f"{logits['top1']:.3f}")
        if "greedy_tokens" in logits:
            share = f"{logits['greedy_equal']} of {logits['greedy_tokens']} tokens"
            table.add_row("equal greedy text", "", share, _greedy(logits))
        if "perplexity" in logits:
            ours, theirs = logits["perplexity"]
            label = f"perplexity, {logits['rows']}"
            table.add_row(label, f"{ours:.4f}", f"{theirs:.4f}", f"{theirs / ours - 1:+.2%}")
    console.print(table)
    _remarks(report, console)


def _greedy(logits: dict[str, Any]) -> str:
    return f"{logits['greedy_equal'] / logits['greedy_tokens']:.0%}"


def _remarks(report: Report, console: Console) -> None:
    for word, lines, style in (
        ("unequal", report.unequal, "red"),
        ("warning", report.warnings, "yellow"),
        ("unseen", report.unseen, "yellow"),
        ("note", report.notes, "dim"),
    ):
        for line in lines:
            console.print(f"  {word}: {line}", style=style, markup=False)


def summary(report: Report, console: Console) -> None:
    """The report in a few lines, for the end of a stage; the whole is in edge.json."""
    logits = report.logits
    text = (
        f"  compared with the {report.a.stage}: template, {report.facts['texts']} prompts' ids, stops equal"
    )
    if logits.get("positions"):
        text += f"; KL {logits['kl_mean']:.1e} (p99 {logits['kl_p99']:.1e}), top-1 {logits['top1']:.3f}"
        if "greedy_tokens" in logits:
            text += f", greedy text equal for {_greedy(logits)}"
    console.print(text, markup=False)
    _remarks(report, console)


def keep(report: Report) -> bool:
    """Put the report into B's edge.json; False where B has none. Its digest stays: no file has changed."""
    if report.b.manifest is None:
        return False
    given = Path(report.b.path)
    folder = given if given.is_dir() else given.parent
    path = folder / manifest.FILE
    data = json_file.read(path, required=True)
    data["verify"] = {**data.get("verify", {}), **report.numbers()}
    json_file.write(path, data)
    return True


def open_reader(given: Path, *, lora: Path | None = None) -> Reader:
    """The reader for an adapter's or a transformers folder, a folder with a GGUF or an ONNX file, a run, or
    such a file.

    Raises InputError where there is nothing of the kind.
    """
    if not given.exists():
        raise InputError(f"no such file or folder: {given}", "give a stage's folder, a run or a file")
    # The files of a run's own folder are links to those of its stage; what is served is compared.
    run = any((given / stage / manifest.FILE).is_file() for stage in ("adapter", "merged"))
    if not run and ((given / "adapter_config.json").is_file() or (given / "config.json").is_file()):
        return TorchReader(given)
    path = find.resolve(given).path
    if path.suffix == ".onnx":
        if lora is not None:
            raise InputError(f"{path} is no GGUF: an adapter goes on top of one", "edge export gguf RUN")
        return OnnxReader(path)
    return GgufReader(path, lora=lora)


def run(a: Path, b: Path, *, lora: Path | None = None, console: Console | None = None) -> Report:
    """Compare the stages at `a` and `b`, show the table and keep the report.

    lora: an adapter as GGUF that goes on top of B. Raises InputError where B must not stand for A.
    """
    console = console or Console(highlight=False)
    with contextlib.closing(open_reader(a)) as first, contextlib.closing(open_reader(b, lora=lora)) as second:
        report = compare(first, second, console=console)
        show(report, console)
        if lora is None:
            place = f"kept in {b}'s {manifest.FILE}"
            if not keep(report):
                place = f"{b} has no {manifest.FILE} to keep it in"
            console.print(f"{report.seconds:.0f} s; {place}", style="dim", markup=False)
        report.refuse()
    return report
