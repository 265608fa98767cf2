"""Rows to token ids with a loss mask: what serving would prompt with, then the answer and its end.

Loss is masked by position, never by token id: the end token of an answer is learnt even where it is also the
padding token.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from convert.data.dataset import Report
from convert.data.dataset_info import Message, Row
from convert.model.chat_format import ChatFormat, split_thought, thinking_mode, with_thought
from edge.errors import InputError, UsageError
from edge.prompt import Prompt
from edge.reasoning import EMPTY, opens_reasoning

IGNORED = -100
_BATCH = 512

# (text, has loss) of the parts of a sample: prompts and answers in turn.
Pieces = list[tuple[Prompt, bool]]


class _Sequences:
    """What an item of training has by its sequences."""

    __slots__ = ()

    @property
    def parts(self) -> tuple[Sample, ...]:
        """The sequences that it is made of."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(part.ids) for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(part.ids) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Sample(_Sequences):
    """One sequence to train on.

    ids: token ids. spans: [start, end) of what is learnt, never a row's first token, for nothing predicts it.
    starts: where rows begin, more than one where several are packed. row: number of its row, from 0.
    """

    source: str
    ids: array[int]
    spans: tuple[tuple[int, int], ...]
    starts: tuple[int, ...] = (0,)
    row: int = 0

    @property
    def labels(self) -> list[int]:
        """The ids, IGNORED where there is no loss."""
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels

    @property
    def learnt(self) -> int:
        """Tokens with loss."""
        return sum(end - start for start, end in self.spans)

    @property
    def parts(self) -> tuple[Sample, ...]:
        return (self,)


@dataclass(frozen=True, slots=True)
class Pair(_Sequences):
    """One question with the answer that is preferred and the one that is not."""

    source: str
    chosen: Sample
    rejected: Sample
    row: int = 0

    @property
    def learnt(self) -> int:
        return self.chosen.learnt + self.rejected.learnt

    @property
    def parts(self) -> tuple[Sample, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True, slots=True)
class Judged(_Sequences):
    """A question with an answer that is good or not. other: the same question with another row's answer."""

    source: str
    answer: Sample
    other: Sample
    good: bool
    row: int = 0

    @property
    def learnt(self) -> int:
        return self.answer.learnt

    @property
    def parts(self) -> tuple[Sample, ...]:
        return (self.answer, self.other)


Item = Sample | Pair | Judged


@dataclass(frozen=True)
class Rules:
    """How rows become samples: the keys of a configuration that decide it."""

    cutoff_len: int = 2048
    enable_thinking: bool | None = True
    mask_history: bool = False
    train_on_prompt: bool = False
    default_system: str | None = None


def encode(
    rows: Iterable[Row],
    chat: ChatFormat,
    report: Report,
    rules: Rules = Rules(),
) -> list[Sample]:
    """Token ids of `rows` with loss on the answers, each with the token that ends its turn.

    The ids before an answer are those that serving makes of the same messages. Where the template shows
    earlier turns as they were written, one sample holds all of a row's answers; else each answer has its own.
    An answer beyond `cutoff_len` tokens is cut at its end; a row whose prompt alone is that long is left out.
    Raises UsageError where enable_thinking null meets a template that opens reasoning and rows without any.
    """
    return list(samples(rows, chat, report, rules))


def samples(
    rows: Iterable[Row], chat: ChatFormat, report: Report, rules: Rules, first: int = 0
) -> Iterator[Sample]:
    """As `encode`, a few hundred rows at a time. first: the number of the first row."""
    mode = thinking_mode(chat, rules.enable_thinking)
    for numbered in _batches(rows, first):
        drafts: list[tuple[int, str, Pieces]] = []
        for number, row in numbered:
            try:
                parts = _drafts(_messages(row, rules), row.tools, chat, mode, rules.mask_history, report)
            except InputError as error:
                report.bad.append((row.source, error.message))
                continue
            _note_marks(row, parts, report)
            drafts += [(number, row.source, pieces) for pieces in parts]
        tokens = _tokens(drafts, chat, rules)
        # A row may have several samples, and is left out where none of them has an answer left.
        for (number, source), group in itertools.groupby(drafts, lambda draft: draft[:2]):
            whole = list(itertools.islice(tokens, sum(1 for _ in group)))
            cut = [sample for sample in (_cut(one, rules.cutoff_len) for one in whole) if sample.spans]
            if not cut:
                reason = f"its prompt alone has {rules.cutoff_len} tokens or more (cutoff_len)"
                report.bad.append((source, reason))
            elif any(len(one.ids) > rules.cutoff_len for one in whole):
                report.cut.append(source)
            yield from (replace(sample, row=number) for sample in cut)


def pairs(
    rows: Iterable[Row], chat: ChatFormat, report: Report, rules: Rules, first: int = 0
) -> Iterator[Pair]:
    """Preference rows as pairs of samples with loss on the last answer alone."""
    mode = thinking_mode(chat, rules.enable_thinking)
    for numbered in _batches(rows, first):
        drafts: list[tuple[int, str, Pieces]] = []
        for number, row in numbered:
            messages = _messages(row, rules)
            try:
                for answer in (row.chosen, row.rejected):
                    talk = [*messages, {"role": "assistant", "content": answer}]
                    (pieces,) = _drafts(talk, row.tools, chat, mode, True, report)
                    _note_marks(row, [pieces], report)
                    drafts.append((number, row.source, pieces))
            except InputError as error:
                report.bad.append((row.source, error.message))
                drafts = drafts[: len(drafts) // 2 * 2]
        tokenised = _tokens(drafts, chat, replace(rules, train_on_prompt=False))
        for (number, source, _), two in zip(drafts[::2], zip(tokenised, tokenised, strict=True), strict=True):
            cut = [_cut(one, rules.cutoff_len) for one in two]
            if not all(one.spans for one in cut):
                reason = f"its prompt alone has {rules.cutoff_len} tokens or more (cutoff_len)"
                report.bad.append((source, reason))
                continue
            if any(len(one.ids) > rules.cutoff_len for one in two):
                report.cut.append(source)
            yield Pair(source, cut[0], cut[1], number)


def judged(
    rows: Iterable[Row], chat: ChatFormat, report: Report, rules: Rules, first: int = 0
) -> Iterator[Judged]:
    """Rows with an answer that is good or not, each also with the answer of the row before it.

    The first row has the last one's, so that each answer stands in for others once.
    """
    good: dict[str, bool] = {}

    def noted() -> Iterator[Row]:
        for row in rows:
            good[row.source] = row.good
            yield row

    rules = replace(rules, mask_history=True, train_on_prompt=False)
    answers = list(samples(noted(), chat, report, rules, first))
    for before, sample in zip([*answers[-1:], *answers[:-1]], answers, strict=True):
        start = sample.spans[0][0]
        ids = (sample.ids[:start] + before.ids[before.spans[0][0] :])[: rules.cutoff_len]
        other = Sample(f"{sample.source} with another answer", ids, ((start, len(ids)),))
        yield Judged(sample.source, sample, other, good[sample.source], sample.row)


def texts(
    rows: Iterable[Row], chat: ChatFormat, report: Report, rules: Rules, first: int = 0
) -> Iterator[Sample]:
    """Plain texts, each with the tokenizer's end token, with loss on all but the first token; not cut."""
    if chat.eos not in chat.special:
        raise InputError(f"{chat.folder}: its tokenizer names no end token", "get the model again")
    for numbered in _batches(rows, first):
        written = [chat.chat.answer(str(row.messages[0]["content"]), chat.eos) for _, row in numbered]
        report.marked += [row.source for (_, row), text in zip(numbered, written, strict=True) if text.cuts]
        for (number, row), ids in zip(numbered, chat.encode(written), strict=True):
            whole = array("i", ids)
            yield Sample(row.source, whole, ((1, len(whole)),), row=number)


def pages(given: list[Sample], chat: ChatFormat, report: Report, longest: int) -> list[Sample]:
    """Each text by itself, cut at `longest` tokens, behind the begin token where the tokenizer has one."""
    cut = []
    for text in given:
        whole = array("i", [*chat.begins, *text.ids])
        sample = _cut(replace(text, ids=whole, spans=((1, len(whole)),)), longest)
        if sample.size < len(whole):
            report.cut.append(text.source)
        cut.append(sample)
    return cut


def blocks(given: list[Sample], chat: ChatFormat, longest: int) -> list[Sample]:
    """All texts one after the other, in sequences of `longest` tokens; the last one may be shorter.

    As in LLaMA-Factory a text sees the end of the one before, and where the tokenizer has a begin token it
    takes the place of a sequence's first.
    """
    ids: array[int] = array("i")
    sources: list[tuple[int, str]] = []
    for text in given:
        sources.append((len(ids), text.source))
        ids += text.ids
    made = []
    for start in range(0, len(ids), longest):
        block = ids[start : start + longest]
        if len(block) < 2:
            break
        begin = max(0, bisect.bisect_right(sources, (start, "\U0010ffff")) - 1)
        block[0] = chat.begins[0] if chat.begins else block[0]
        made.append(Sample(f"{sources[begin][1]} and on", block, ((1, len(block)),), row=given[begin].row))
    return made


def pack(given: list[Sample], longest: int) -> list[Sample]:
    """`given` in sequences of at most `longest` tokens, whole rows only: best fit, the longest rows first."""
    bins: list[list[Sample]] = []
    # (tokens left, minus the step it was filled at, bin): a row goes to the fullest bin that can take it.
    room: list[tuple[int, int, int]] = []
    for step, sample in enumerate(sorted(given, key=lambda sample: -sample.size)):
        index = bisect.bisect_left(room, (sample.size,))
        if index < len(room):
            left, _, number = room.pop(index)
        else:
            left, number = longest, len(bins)
            bins.append([])
        bins[number].append(sample)
        bisect.insort(room, (left - sample.size, -step, number))
    return [_joined(parts) if len(parts) > 1 else parts[0] for parts in bins]


def _joined(parts: list[Sample]) -> Sample:
    ids: array[int] = array("i")
    spans, starts = [], []
    for part in parts:
        offset = len(ids)
        starts.append(offset)
        spans += [(offset + start, offset + end) for start, end in part.spans]
        ids += part.ids
    return Sample(" + ".join(part.source for part in parts), ids, tuple(spans), tuple(starts), parts[0].row)


def _batches(rows: Iterable[Row], first: int) -> Iterator[list[tuple[int, Row]]]:
    numbered = enumerate(rows, first)
    while batch := list(itertools.islice(numbered, _BATCH)):
        yield batch


def _messages(row: Row, rules: Rules) -> list[Message]:
    if rules.default_system is not None and row.messages[0]["role"] != "system":
        return [{"role": "system", "content": rules.default_system}, *row.messages]
    return row.messages


def _note_marks(row: Row, parts: list[Pieces], report: Report) -> None:
    if any(piece.cuts for pieces in parts for piece, _ in pieces) and report.marked[-1:] != [row.source]:
        report.marked.append(row.source)


def _tokens(drafts: list[tuple[int, str, Pieces]], chat: ChatFormat, rules: Rules) -> Iterator[Sample]:
    ids = iter(chat.encode([text for _, _, pieces in drafts for text, _ in pieces]))
    for _, source, pieces in drafts:
        whole: array[int] = array("i")
        spans = []
        for _, loss in pieces:
            start = len(whole)
            whole.extend(next(ids))
            if (loss or rules.train_on_prompt) and len(whole) > max(start, 1):
                spans.append((max(start, 1), len(whole)))
        yield Sample(source, whole, tuple(spans))


def _cut(sample: Sample, longest: int) -> Sample:
    spans = tuple((start, min(end, longest)) for start, end in sample.spans if start < longest)
    return replace(sample, ids=sample.ids[:longest], spans=spans)


def _drafts(
    messages: list[Message],
    tools: list[dict[str, object]] | None,
    chat: ChatFormat,
    mode: str | None,
    mask_history: bool,
    report: Report,
) -> list[Pieces]:
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if mask_history:
        turns = turns[-1:]
    prompts = [chat.prompt(messages[:at], mode, tools) for at in turns]
    answers = []
    for at, prompt in zip(turns, prompts, strict=True):
        if "tool_calls" in messages[at]:
            answers.append(_called(messages[: at + 1], prompt, chat, mode, tools, report=report))
        else:
            answers.append(chat.answer(_thoughtful(messages[at]["content"], prompt, mode, report)))
    if len(turns) > 1:
        pieces, done = [], Prompt("")
        for prompt, answer in zip(prompts, answers, strict=True):
            if not prompt.text.startswith(done.text):
                break
            pieces += [(prompt.between(len(done.text), len(prompt.text)), False), (answer, True)]
            done = prompt + answer
        else:
            # Pieces tokenised apart must give what serving gives for the prompt as one text.
            apart = chat.encode([text for text, _ in pieces[:-1]])
            if [token for part in apart for token in part] == chat.encode([prompts[-1]])[0]:
                return [pieces]
    return [[(prompt, False), (answer, True)] for prompt, answer in zip(prompts, answers, strict=True)]


def _called(
    messages: list[Message],
    prompt: Prompt,
    chat: ChatFormat,
    mode: str | None,
    tools: list[dict[str, object]] | None,
    *,
    report: Report,
) -> Prompt:
    """The tool calls of the last of `messages` as they go on from `prompt`, behind the thought of `mode`."""
    if mode is None:
        return chat.call(messages, prompt, mode, tools)
    content = messages[-1]["content"]
    _, rest = split_thought(content)
    call = chat.call([*messages[:-1], {**messages[-1], "content": rest}], prompt, mode, tools)
    thought = _thoughtful(content.removesuffix(rest), prompt, mode, report)
    if thought:
        # Some templates write an empty one by themselves.
        call = call.between(len(call.text) - len(call.text.removeprefix(EMPTY)), len(call.text))
    return Prompt(thought) + call


def _thoughtful(content: str, prompt: Prompt, mode: str | None, report: Report) -> str:
    """The answer as it goes on from `prompt` in the thinking mode `mode`."""
    if mode is None:
        return content
    thought, rest = split_thought(content)
    if mode == "off":
        report.thoughts_removed += thought is not None
        return rest
    if thought is not None or mode == "on":
        return with_thought(prompt.text, thought or "", rest)
    if opens_reasoning(prompt.text):
        raise UsageError(
            "enable_thinking: null leaves answers without reasoning alone, but this model's chat template "
            "opens it in every prompt",
            "give true (empty reasoning is learnt) or false (the prompt closes it)",
        )
    return content
