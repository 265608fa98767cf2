"""`edge verify A URL`: proof that what answers at a URL is the model that stage A is.

    edge verify runs/magic-conch/merged http://127.0.0.1:8000
    edge verify runs/magic-conch http://gpu:8000/v1 --model magic-conch --api-key KEY

What the server shows is compared as between two stages: chat template, token ids, stop tokens. It then
answers conversations greedily with log-probabilities, and A computes the same tokens. A server names the most
probable tokens alone, so the divergence is that of these and of all others together, which is at most that of
the whole vocabulary (data processing inequality). What cannot be seen is said.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from convert.verify import compare, probes
from convert.verify.compare import BOUNDS, Report, open_reader, show
from convert.verify.divergence import Divergence, log_softmax
from convert.verify.http_json import Refused
from convert.verify.logits import GREEDY, LONGEST_PROMPT
from convert.verify.reader import Reader
from convert.verify.url_reader import Answer, Edge, Token, UrlReader, open_url
from edge.errors import InputError
from edge.progress import counted, phase

# The probability of all tokens together that a server does not name is at least this: it rounds.
_REST = 1e-7
# Beyond this no weights of four bits and more are still those of A. The demo's model in Q2_K: 0.29 and 83 %,
# the model that it was tuned from: 1.2 and 44 %.
_OTHER = compare.Bound(0.6, 0.7)
_HINT = (
    "serve the files of this run: edge serve RUN, edge export gguf or ollama or deploy; or give the right URL"
)


@dataclass
class _Row:
    """ids: a prompt and its answer. tops: (ids of one text, log-probability) of each token that the server
    names, for each token of the answer; empty without log-probabilities. ended: at a stop token.
    """

    ids: list[int]
    answer: list[int]
    tops: list[list[tuple[tuple[int, ...], float]]]
    ended: bool


@dataclass
class _Answers:
    """What was added. ends: answers that A ends within the limit. missed: those that go on at the server."""

    divergence: Divergence = field(default_factory=Divergence)
    ends: int = 0
    missed: int = 0

    def add(self, row: _Row, ours: NDArray[np.float64], stop_ids: frozenset[int]) -> None:
        """ours: A's log-probabilities at each token of the answer and behind it, (tokens + 1, vocabulary)."""
        equal, ends = True, False
        best = ours.argmax(axis=1).tolist()
        for position, token in enumerate(row.answer):
            self.divergence.same += best[position] == token
            if equal and not ends and best[position] in stop_ids:
                ends = True
                # Some name the token at which they end.
                self.missed += token not in stop_ids or position + 1 < len(row.answer)
            equal = equal and best[position] == token
            self.divergence.equal_greedy += equal
            if row.tops and row.tops[position]:
                self.divergence.kl.append(_coarse_kl(ours[position], row.tops[position]))
        self.ends += ends or (equal and row.ended and best[-1] in stop_ids)
        self.divergence.greedy += len(row.answer)


def compare_served(a: Reader, b: UrlReader, *, console: Console | None = None) -> Report:
    """Compare what answers at a URL with stage `a`. Raises EdgeError where one of them cannot answer."""
    began = time.monotonic()
    report = Report(a, b)
    with phase(console, f"asking {b.stage} at {b.path}"):
        b.find_stops()
        compare.compare_template(report)
        if b.shows_ids:
            compare.compare_tokenizers(report)
        else:
            report.facts["token_ids"] = "unseen"
            report.unseen.append(
                "token ids: the server tokenizes for nobody; the lengths of prompts are compared"
            )
        compare.compare_stops(report)
        rows = list(_rows(report, b))
    if rows and report.facts.get("token_ids") != "unequal":
        with phase(console, f"computing the same answers: {a.path}"):
            _compare_answers(report, b, rows)
    if isinstance(b, Edge) and a.manifest is not None and b.digest == a.manifest.digest:
        report.notes.append(f"the server's file is A's own, by its digest {b.digest}")
    report.seconds = time.monotonic() - began
    return report


def _rows(report: Report, b: UrlReader) -> Iterator[_Row]:
    """What the server answers to the fixed conversations and to the data set's questions."""
    a = report.a
    data = probes.from_data(a.manifest)
    if data.note:
        report.notes.append(f"only the fixed prompts are compared: {data.note}")
    conversations = [probe.messages for probe in [*probes.fixed(), *data.probes]]
    prompts = a.prompt_ids(conversations)
    vocabulary = _Vocabulary(a)
    counts: list[tuple[int | None, int]] = []
    cut = 0
    for messages, prompt in zip(conversations, prompts, strict=True):
        try:
            answer = b.answer(messages, GREEDY)
        except Refused as error:
            if not counts:
                raise
            # As a template that takes no system message.
            report.notes.append(f"a conversation is refused: {error.message}")
            continue
        counts.append((answer.prompt_tokens, len(prompt)))
        if len(prompt) > LONGEST_PROMPT:
            continue
        row = vocabulary.row(prompt, answer)
        cut += len(row.answer) < len(answer.tokens)
        if row.answer:
            yield row
    if cut:
        report.unseen.append(
            f"the rest of {cut} answers: from a token on that the server names by a part of a character"
        )
    _compare_lengths(report, counts)


def _compare_lengths(report: Report, counts: list[tuple[int | None, int]]) -> None:
    """Whether the server read prompts of the same lengths as `a` renders."""
    counted = [(theirs, ours) for theirs, ours in counts if theirs is not None]
    different = [pair for pair in counted if pair[0] != pair[1]]
    report.facts["prompts"] = len(counted)
    report.facts["prompt_lengths"] = "unequal" if different else "equal" if counted else "unseen"
    if different:
        theirs, ours = different[0]
        report.unequal.append(
            f"prompts: {len(different)} of {len(counted)} have another length, the first {ours} tokens in A, "
            f"{theirs} on the server: its template, or what it puts before a conversation, is another"
        )
    elif not counted:
        report.unseen.append("the lengths of prompts: the server counts no tokens")


class _Vocabulary:
    """The ids of what a server names: by id, or by the text, which several ids may share."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._texts: dict[str, tuple[int, ...]] = {}

    def row(self, prompt: list[int], answer: Answer) -> _Row:
        """The answer as ids, up to a token that cannot be told from others (a part of a character)."""
        if not answer.tokens:
            [whole] = self._reader.encode([answer.text])
            # The text may have been cut within its last token.
            whole = whole if answer.ended else whole[:-1]
            return _Row(prompt + whole, whole, [], answer.ended)
        row = _Row([], [], [], answer.ended)
        for token in answer.tokens:
            if not (ids := self._ids(token)):
                row.ended = False
                break
            row.answer.append(ids[0])
            pairs = ((self._ids(top), top.logprob) for top in token.top_logprobs or [token])
            row.tops.append([(ids, logprob) for ids, logprob in pairs if ids and logprob is not None])
        row.ids = prompt + row.answer
        return row

    def _ids(self, token: Token) -> tuple[int, ...]:
        number = token.token.removeprefix("token_id:")
        if token.id is None and number != token.token and number.isdecimal():
            token.id = int(number)
        if token.id is not None:
            return (token.id,) if 0 <= token.id < self._reader.vocab else ()
        if not self._texts:
            self._read()
        try:
            text = token.token if token.bytes is None else bytes(token.bytes).decode("utf-8")
        except ValueError:
            return ()
        return self._texts.get(text, ())

    def _read(self) -> None:
        """The text of each token, behind another one: alone it may lose the blank that it begins with."""
        reader = self._reader
        [before] = reader.encode(["a"])
        [lead] = reader.decode([before])
        texts = reader.decode([[*before, token] for token in range(reader.vocab)])
        for token, text in enumerate(texts):
            if (piece := text.removeprefix(lead)) and "\ufffd" not in piece:
                self._texts[piece] = (*self._texts.get(piece, ()), token)
        special = reader.special_tokens()
        for piece, ids in zip(special, reader.encode(special), strict=True):
            if len(ids) == 1:
                self._texts.setdefault(piece, (ids[0],))


def _compare_answers(report: Report, b: UrlReader, rows: list[_Row]) -> None:
    answers = _Answers()
    try:
        every = report.a.all_logits([row.ids for row in rows], [len(row.answer) + 1 for row in rows])
        for row, logits in zip(counted(rows, "answers"), every, strict=True):
            answers.add(row, log_softmax(logits), report.a.stop_ids)
    except InputError as error:
        report.notes.append(f"answers are not compared: {error.message}")
        return
    divergence = answers.divergence
    report.logits = divergence.numbers() | {
        "positions": divergence.greedy,
        "top1": divergence.same / divergence.greedy,
        "greedy_equal": divergence.equal_greedy,
        "greedy_tokens": divergence.greedy,
    }
    if divergence.kl:
        report.notes.append(
            f"the divergence is over the {b.top} tokens that the server names and all others together: at "
            "most that of the whole vocabulary"
        )
    else:
        report.unseen.append("log-probabilities: the server gives none; whole answers alone are compared")
    # One that quantisation moved is no lost stop token.
    if answers.missed > 1 and 2 * answers.missed > answers.ends:
        report.facts["stops"] = "unequal"
        report.unequal.append(
            f"stop tokens: of {answers.ends} answers that end in A, {answers.missed} go on at the server"
        )
    _judge(report, b.kind)


def _coarse_kl(ours: NDArray[np.float64], named: list[tuple[tuple[int, ...], float]]) -> float:
    """KL(A || server) in nats over the named texts and all other tokens together."""
    theirs: dict[tuple[int, ...], float] = {}
    for ids, logprob in named:
        theirs[ids] = theirs.get(ids, 0.0) + float(np.exp(min(logprob, 0.0)))
    p = np.array([np.exp(ours[list(ids)]).sum() for ids in theirs])
    q = np.array([*theirs.values()])
    p, q = (np.maximum(np.append(part, 1 - part.sum()), _REST) for part in (p, q))
    return max(0.0, float((p * np.log(p / q)).sum()))


def _judge(report: Report, kind: str) -> None:
    """Whether answers differ more than weights of `kind` may, and more than those of any type."""
    logits = report.logits
    if not kind:
        report.unseen.append("the type of the weights: they are held to the bounds of 16 bits")
    if not (warning := compare.too_far(kind or "bfloat16", logits, known=bool(kind))):
        return
    few_bits = kind and compare.bound_of(kind) == compare.SMALL
    kl, far = logits.get("kl_mean"), logits["top1"] < _OTHER.top1
    if kl is not None:
        # The top token alone turns easily where a model is unsure of it.
        far = kl > compare.bound_of(kind or "bfloat16").kl and (far or kl > _OTHER.kl)
    if far and not few_bits:
        report.unequal.append(f"weights: {warning}; not even those of four bits should differ so much")
    elif kind:
        report.warnings.append(warning)
    else:
        types = (name for name in BOUNDS if name.isupper() and not compare.too_far(name, logits))
        report.warnings.append(f"{warning}; within the bounds of {next(types, 'three bits or fewer alone')}")


def run(given: Path, url: str, *, model: str = "", key: str = "", console: Console | None = None) -> Report:
    """Compare what answers at `url` with the stage at `given`, and show the table.

    Raises InputError where it is another model, EdgeError where nothing answers.
    """
    console = console or Console(highlight=False)
    with contextlib.closing(open_reader(given)) as a:
        report = compare_served(a, open_url(url, a, model=model, key=key), console=console)
        show(report, console)
        console.print(f"{report.seconds:.0f} s", style="dim", markup=False)
        report.refuse(_HINT)
    return report
