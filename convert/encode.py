"""Rows to token ids with a loss mask: what serving would prompt with, then the answer and its end.

Loss is masked by position, never by token id: the end token of an answer is learnt even where it is also the
padding token.
"""

from __future__ import annotations

from dataclasses import dataclass

from convert.data import Message, Report, Row
from convert.template import ChatFormat, split_thought, thinking_mode, with_thought
from edge.errors import InputError, UsageError
from edge.thought import opens_thought

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Sample:
    """ids: token ids. labels: the same, IGNORED where there is no loss. Both of equal length."""

    source: str
    ids: list[int]
    labels: list[int]


def encode(
    rows: list[Row],
    form: ChatFormat,
    report: Report,
    *,
    cutoff_len: int = 2048,
    enable_thinking: bool | None = True,
    mask_history: bool = False,
    default_system: str | None = None,
) -> list[Sample]:
    """Token ids of `rows` with loss on the answers, each with the token that ends its turn.

    The ids before an answer are those that serving makes of the same messages. Where the template shows
    earlier turns as they were written, one sample holds all of a row's answers; else each answer has its own.
    An answer beyond `cutoff_len` tokens is cut at its end; a row whose prompt alone is that long is left out.
    Raises UsageError where enable_thinking null meets a template that opens thoughts and rows without any.
    """
    mode = thinking_mode(form, enable_thinking)
    # Per sample: its source and pieces (text, has loss); the pieces joined are prompt and answer.
    drafts: list[tuple[str, list[tuple[str, bool]]]] = []
    for row in rows:
        messages = row.messages
        if default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": default_system}, *messages]
        try:
            drafts += [(row.source, pieces) for pieces in _drafts(messages, form, mode, mask_history, report)]
        except InputError as error:
            report.bad.append((row.source, error.message))
    texts = [text for _, pieces in drafts for text, _ in pieces]
    ids = iter(form.encode(texts))
    samples = []
    for source, pieces in drafts:
        found = [(next(ids), loss) for _, loss in pieces]
        whole = [token for part, _ in found for token in part]
        labels = [token if loss else IGNORED for part, loss in found for token in part]
        if len(whole) > cutoff_len:
            if all(label == IGNORED for label in labels[:cutoff_len]):
                report.bad.append((source, f"its prompt alone has {cutoff_len} tokens or more (cutoff_len)"))
                continue
            report.cut.append(source)
        samples.append(Sample(source, whole[:cutoff_len], labels[:cutoff_len]))
    return samples


def _drafts(
    messages: list[Message], form: ChatFormat, mode: str | None, mask_history: bool, report: Report
) -> list[list[tuple[str, bool]]]:
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if mask_history:
        turns = turns[-1:]
    prompts = [form.prompt(messages[:at], mode) for at in turns]
    answers = [
        form.answer(_thoughtful(messages[at]["content"], prompt, mode, report))
        for at, prompt in zip(turns, prompts, strict=True)
    ]
    if len(turns) > 1:
        pieces, done = [], ""
        for prompt, answer in zip(prompts, answers, strict=True):
            pieces += [(prompt.removeprefix(done), False), (answer, True)]
            if not prompt.startswith(done):
                break
            done = prompt + answer
        else:
            # Pieces tokenised apart must give what serving gives for the prompt as one text.
            apart = form.encode([text for text, _ in pieces[:-1]])
            if [token for part in apart for token in part] == form.encode([prompts[-1]])[0]:
                return [pieces]
    return [[(prompt, False), (answer, True)] for prompt, answer in zip(prompts, answers, strict=True)]


def _thoughtful(content: str, prompt: str, mode: str | None, report: Report) -> str:
    """The answer as it goes on from `prompt` in the thinking mode `mode`."""
    if mode is None:
        return content
    thought, rest = split_thought(content)
    if mode == "off":
        report.thoughts_removed += thought is not None
        return rest
    if thought is not None:
        return with_thought(prompt, thought, rest)
    if mode == "on":
        report.thoughts_added += 1
        return with_thought(prompt, "", rest)
    if opens_thought(prompt):
        raise UsageError(
            "enable_thinking: null leaves answers without a thought alone, but this model's chat template "
            "opens a thought in every prompt",
            "give true (an empty thought is learnt) or false (the prompt closes it)",
        )
    return content
