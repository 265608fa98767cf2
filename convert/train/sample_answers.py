"""Answers of a model in memory, greedy and in batches: for a look during training, and for `edge eval`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from convert.data.dataset_info import Row
from convert.data.encode import Rules
from convert.model.chat_format import ChatFormat, split_thought, thinking_mode
from edge.progress import counted
from edge.prompt import Prompt


def question(row: Row, chat: ChatFormat, rules: Rules) -> Prompt:
    """The prompt that serving would render for the last question of `row`."""
    messages = row.messages if row.messages[-1]["role"] != "assistant" else row.messages[:-1]
    if rules.default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": rules.default_system}, *messages]
    return chat.prompt(messages, thinking_mode(chat, rules.enable_thinking), row.tools)


def reference(row: Row) -> str:
    """The answer that `row` has, without its reasoning."""
    answer = row.chosen or str(row.messages[-1]["content"])
    return split_thought(answer)[1].strip()


def generate(
    model: Any,
    chat: ChatFormat,
    prompts: list[Prompt],
    *,
    device: str,
    max_new_tokens: int,
    size: int,
    together: bool = False,
    sampling: dict[str, Any] | None = None,
) -> list[str]:
    """The answer to each prompt, without special tokens, in the order of `prompts`: greedy, or sampled.

    sampling: transformers' settings of it. size: prompts in a batch. together: all processes generate the
    same answers, each step at the same time.
    """
    from transformers import GenerationConfig

    ids = chat.encode(prompts)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    answers = [""] * len(ids)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        **{"do_sample": False, **(sampling or {})},
        eos_token_id=chat.stop_ids,
        pad_token_id=chat.stop_ids[0],
    )
    base = getattr(model, "get_base_model", lambda: model)()
    configured, was_training = base.generation_config, model.training
    # transformers would mix in the sampling settings of the model's own file.
    base.generation_config = settings
    model.eval()
    try:
        for start in counted(range(0, len(order), size), "batches of answers"):
            batch = order[start : start + size]
            sequences = [torch.tensor(ids[index], dtype=torch.long) for index in batch]
            rows, mask = (
                pad_sequence(parts, batch_first=True, padding_side="left")
                for parts in (sequences, [torch.ones_like(sequence) for sequence in sequences])
            )
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outputs = model.generate(
                    input_ids=rows.to(device),
                    attention_mask=mask.to(device),
                    generation_config=settings,
                    synced_gpus=together,
                )
            for index, tokens in zip(batch, outputs[:, rows.shape[1] :].tolist(), strict=True):
                end = next((n for n, token in enumerate(tokens) if token in chat.stop_ids), len(tokens))
                answers[index] = chat.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    finally:
        base.generation_config = configured
        model.train(was_training)
    return answers
