"""`edge verify A B`: proof that stage B is still the model that stage A is.

    edge verify runs/magic-conch/adapter runs/magic-conch/merged
    edge verify runs/magic-conch/merged runs/magic-conch/gguf
    edge verify runs/magic-conch/merged runs/magic-conch/onnx

Chat template, prompt ids, tokenizer round trip and stop tokens must be equal; logits may differ as far as the
type of B's weights allows. The report goes to B's edge.json. Merge and export run the same by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from convert.verify import probes
from convert.verify.logits import Reference
from convert.verify.open_reader import open_reader
from convert.verify.reader import Reader
from edge.artefact import manifest
from edge.errors import InputError


@dataclass(frozen=True)
class Bound:
    """What weights of a type may cost: mean KL in nats, top-1 agreement. better: the type to take instead."""

    kl: float
    top1: float
    better: str = ""


# From the exports of a 135M model and what is published of larger ones, which suffer less.
_WHOLE = Bound(1e-4, 0.999, "float32")
BOUNDS = {
    "F32": Bound(1e-5, 0.999),
    "float32": Bound(1e-5, 0.999),
    "F16": Bound(1e-3, 0.995, "F32"),
    "BF16": Bound(1e-3, 0.995, "F16"),
    "float16": _WHOLE,
    "bfloat16": Bound(1e-3, 0.99, "float16"),
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
}
# ONNX, in blocks of 32.
BOUNDS |= {"int8": Bound(5e-3, 0.97, "fp32"), "int4": Bound(1e-1, 0.90, "int8")}
# Anything smaller: three bits and less.
_SMALL = Bound(2e-1, 0.80, "Q4_K_M")


@dataclass
class Report:
    """facts: (what, value of A and B or a verdict, is equal). unequal: what forbids publishing B."""

    a: Reader
    b: Reader
    unequal: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def numbers(self) -> dict[str, Any]:
        """As it goes into edge.json."""
        against = {"stage": self.a.stage, "path": str(self.a.path.absolute()), "kind": self.a.kind}
        if self.a.known is not None:
            against["digest"] = self.a.known.digest
        return {
            "against": against,
            "kind": self.b.kind,
            **self.facts,
            "logits": self.logits,
            "unequal": self.unequal,
            "warnings": self.warnings,
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
        }

    def refuse(self) -> None:
        """Raise InputError, naming each difference, unless B may be published."""
        if self.unequal:
            raise InputError(
                f"{self.b.path} is not the model that {self.a.path} is:\n  " + "\n  ".join(self.unequal),
                "take the tokenizer files and the chat template of the model it came from, and make it again",
            )


def compare(a: Reader, b: Reader, *, console: Console | None = None) -> Report:
    """Compare stage `b` with stage `a`, which it came from. Raises EdgeError where one cannot be computed.

    A memory that does not suffice for logits is a note in the report; all else is compared.
    """
    began = time.monotonic()
    report = Report(a, b)
    _compare_words(report)
    _compare_stops(report)
    if not report.unequal:
        with (
            console.status(f"comparing logits: {a.path} and {b.path}")
            if console
            else contextlib.nullcontext()
        ):
            _compare_logits(report)
    report.seconds = time.monotonic() - began
    return report


# Words: template, ids, round trip, stops


def _compare_words(report: Report) -> None:
    a, b = report.a, report.b
    if a.template != b.template:
        at = next((i for i, (x, y) in enumerate(zip(a.template, b.template, strict=False)) if x != y), None)
        at = min(len(a.template), len(b.template)) if at is None else at
        report.unequal.append(
            f"chat template: from character {at} on A has {a.template[at : at + 40]!r}, "
            f"B {b.template[at : at + 40]!r}"
        )
    report.facts["chat_template"] = "equal" if a.template == b.template else "unequal"
    conversations = [*probes.fixed(), *probes.from_data(a.known or b.known).probes]
    asked = [probe.messages for probe in conversations]
    special = _added_tokens(a)
    plain = [*probes.TEXTS, *probes.special_texts(special), a.template]
    texts = [[*map(reader.prompt, asked), *plain] for reader in (a, b)]
    ids = [reader.encode(part) for reader, part in zip((a, b), texts, strict=True)]
    different = [at for at, (x, y) in enumerate(zip(*ids, strict=True)) if x != y]
    report.facts["token_ids"] = "unequal" if different else "equal"
    report.facts["texts"] = len(ids[0])
    if different:
        at = different[0]
        report.unequal.append(
            f"token ids: {len(different)} of {len(ids[0])} texts, the first {texts[0][at][:60]!r}: "
            f"A {_around(ids[0][at], ids[1][at])}, B {_around(ids[1][at], ids[0][at])}"
        )
        return
    plain_ids = ids[0][len(asked) :]
    back = [reader.decode(plain_ids) for reader in (a, b)]
    # Some tokenizers take the space that they put before a text away again, others leave it.
    lost = [at for at, (x, y) in enumerate(zip(*back, strict=True)) if x.strip(" ") != y.strip(" ")]
    exact = sum(text == made for text, made in zip(probes.TEXTS, back[1], strict=False))
    report.facts["round_trip"] = "unequal" if lost else "equal"
    report.facts["round_trip_exact"] = f"{exact} of {len(probes.TEXTS)}"
    if lost:
        report.unequal.append(
            f"tokenizer round trip: {plain[lost[0]][:40]!r} comes back as {back[0][lost[0]][:40]!r} from A, "
            f"{back[1][lost[0]][:40]!r} from B"
        )


def _around(ids: list[int], others: list[int]) -> list[int]:
    at = next((i for i, (x, y) in enumerate(zip(ids, others, strict=False)) if x != y), 0)
    return ids[max(0, at - 2) : at + 8]


def _added_tokens(reader: Reader) -> list[str]:
    form = getattr(reader, "_form", None)
    if form is None:
        return []
    return [str(token.content) for token in form.tokenizer.get_added_tokens_decoder().values()]


def _compare_stops(report: Report) -> None:
    a, b = report.a, report.b
    report.facts["stop_ids"] = sorted(b.stop_ids)
    missing = sorted(a.stop_ids - b.stop_ids - b.more_ends)
    # A file made elsewhere names one end token, its runtime finds the others by itself.
    added = sorted(b.stop_ids - a.stop_ids - a.more_ends)
    if missing or added:
        report.facts["stops"] = "unequal"
        report.unequal.append(f"stop tokens: A ends at {sorted(a.stop_ids)}, B at {sorted(b.stop_ids)}")
        return
    report.facts["stops"] = "equal"
    more = sorted((b.more_ends - a.stop_ids) - a.more_ends)
    if more:
        report.notes.append(
            f"llama.cpp would also stop at {', '.join(map(str, more))}, which it knows by name; "
            f"the model's own files do not"
        )


# Logits


def _compare_logits(report: Report) -> None:
    try:
        reference = Reference(report.a, report.b)
    except InputError as error:
        report.notes.append(f"logits are not compared: {error.message}")
        return
    with contextlib.closing(reference):
        report.notes += reference.notes
        try:
            report.logits = reference.against(report.b)
        except InputError as error:
            report.notes.append(f"logits are not compared: {error.message}")
            return
    _judge(report)


def _judge(report: Report) -> None:
    found = report.logits
    if not found:
        return
    if found.get("not_numbers"):
        report.unequal.append(f"logits: {found['not_numbers']} positions are not finite numbers")
        return
    kind = report.b.kind
    bound = BOUNDS.get(kind.split(" ")[0], _SMALL)
    if found["kl_mean"] <= bound.kl and found["top1"] >= bound.top1:
        return
    better = f": {bound.better} would be closer" if bound.better else ""
    report.warnings.append(
        f"{kind} differs more than weights of this type should: mean KL {found['kl_mean']:.2g} "
        f"(at most {bound.kl:g}), same top token {found['top1']:.1%} (at least {bound.top1:.1%}){better}"
    )


# Showing and keeping


def show(report: Report, console: Console) -> None:
    """The report as a table, with its warnings and notes below."""
    a, b = report.a, report.b
    table = Table(title=f"{a.stage} and {b.stage}", title_justify="left", show_header=True)
    table.add_column("")
    table.add_column(f"{a.stage} ({a.kind})", overflow="fold")
    table.add_column(f"{b.stage} ({b.kind})", overflow="fold")
    table.add_column("", style="bold")

    def verdict(key: str) -> str:
        value = report.facts.get(key)
        return "" if value is None else "[green]equal[/]" if value == "equal" else "[red]unequal[/]"

    facts = report.facts
    table.add_row("chat template", f"{len(a.template):,} characters", f"{len(b.template):,} characters",
                  verdict("chat_template"))  # fmt: skip
    table.add_row("prompt ids", f"{facts['texts']} texts", "", verdict("token_ids"))
    if "round_trip" in facts:
        table.add_row("text -> ids -> text", f"exact: {facts['round_trip_exact']}", "", verdict("round_trip"))
    table.add_row("stop tokens", _ids(a), _ids(b), verdict("stops"))
    found = report.logits
    if found.get("positions"):
        table.add_section()
        table.add_row("KL divergence, mean", "", "", f"{found['kl_mean']:.2e}")
        table.add_row("KL divergence, p99", "", "", f"{found['kl_p99']:.2e}")
        table.add_row("same top token", "", f"{found['positions']:,} positions", f"{found['top1']:.3f}")
        if "greedy_tokens" in found:
            share = f"{found['greedy_equal']} of {found['greedy_tokens']} tokens"
            table.add_row(
                "equal greedy text", "", share, f"{found['greedy_equal'] / found['greedy_tokens']:.0%}"
            )
        if "perplexity" in found:
            one, other = found["perplexity"]
            table.add_row(
                f"perplexity, {found['rows']}", f"{one:.4f}", f"{other:.4f}", f"{other / one - 1:+.2%}"
            )
    console.print(table)
    _remarks(report, console)


def _remarks(report: Report, console: Console) -> None:
    for word, lines, style in (
        ("unequal", report.unequal, "red"),
        ("warning", report.warnings, "yellow"),
        ("note", report.notes, "dim"),
    ):
        for line in lines:
            console.print(f"  {word}: {line}", style=style, markup=False)


def summary(report: Report, console: Console) -> None:
    """The report in a few lines, for the end of a stage; the whole is in edge.json."""
    found = report.logits
    text = (
        f"  compared with the {report.a.stage}: template, {report.facts['texts']} prompts' ids, stops equal"
    )
    if found.get("positions"):
        text += f"; KL {found['kl_mean']:.1e} (p99 {found['kl_p99']:.1e}), top-1 {found['top1']:.3f}"
        if "greedy_tokens" in found:
            text += f", greedy text equal for {found['greedy_equal'] / found['greedy_tokens']:.0%}"
    console.print(text, markup=False)
    _remarks(report, console)


def _ids(reader: Reader) -> str:
    return ", ".join(map(str, sorted(reader.stop_ids)))


def keep(report: Report) -> bool:
    """Put the report into B's edge.json; False where B has none. Its digest stays: no file has changed."""
    known = report.b.known
    folder = report.b.path if report.b.path.is_dir() else report.b.path.parent
    if known is None:
        return False
    path = folder / manifest.FILE
    written = json.loads(path.read_text(encoding="utf-8"))
    written["verify"] = {**written.get("verify", {}), **report.numbers()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(written, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return True


def run(a: Path, b: Path, *, lora: Path | None = None, console: Console | None = None) -> Report:
    """Compare the stages at `a` and `b`, show the table and keep the report.

    lora: an adapter as GGUF that goes on top of B. Raises InputError where B must not stand for A.
    """
    console = console or Console(highlight=False)
    with contextlib.ExitStack() as stack:
        readers = []
        for path, more in ((a, None), (b, lora)):
            reader = open_reader(path, lora=more)
            stack.callback(reader.close)
            readers.append(reader)
        report = compare(readers[0], readers[1], console=console)
        show(report, console)
        if lora is None:
            kept = keep(report)
            console.print(
                f"{report.seconds:.0f} s; "
                + (f"kept in {b}'s {manifest.FILE}" if kept else f"{b} has no {manifest.FILE} to keep it in"),
                style="dim",
                markup=False,
            )
        report.refuse()
    return report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge verify", description=__doc__.split("\n")[0])
    parser.add_argument("a", type=Path, metavar="A", help="a stage's folder, or a .gguf file")
    parser.add_argument("b", type=Path, metavar="B", help="what was made from it")
    parser.add_argument("--lora", type=Path, metavar="ADAPTER.gguf", help="goes on top of B, a base as GGUF")
    options = parser.parse_args(argv)
    run(options.a, options.b, lora=options.lora)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
