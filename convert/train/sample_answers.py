"""Answers of a model in memory, greedy and in batches: for a look during training, and for `edge eval`."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from convert.data.dataset_info import Row
from convert.data.encode import Rules
from convert.model.chat_format import ChatFormat, split_thought, thinking_mode


def question(row: Row, form: ChatFormat, rules: Rules) -> str:
    """The prompt that serving would render for the last question of `row`."""
    messages = row.messages if row.messages[-1]["role"] != "assistant" else row.messages[:-1]
    if rules.default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": rules.default_system}, *messages]
    return form.prompt(messages, thinking_mode(form, rules.enable_thinking), row.tools)


def reference(row: Row) -> str:
    """The answer that `row` has, without its thought."""
    answer = row.chosen or str(row.messages[-1]["content"])
    return split_thought(answer)[1].strip()


def generate(
    model: Any,
    form: ChatFormat,
    prompts: list[str],
    *,
    device: str,
    max_new_tokens: int,
    size: int,
    together: bool = False,
) -> list[str]:
    """The greedy answer to each prompt, without special tokens, in the order of `prompts`.

    together: all processes of a world ask the same, and go on until the last one has ended.
    """
    from transformers import GenerationConfig

    ids = form.encode(prompts)
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    found = [""] * len(ids)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=form.stop_ids,
        pad_token_id=form.stop_ids[0],
    )
    plain = getattr(model, "get_base_model", lambda: model)()
    before, was_training = plain.generation_config, model.training
    # The model's own file may ask for sampling, which would be mixed in.
    plain.generation_config = greedy
    model.eval()
    try:
        for at in range(0, len(order), size):
            chosen = order[at : at + size]
            longest = max(len(ids[one]) for one in chosen)
            rows = torch.zeros(len(chosen), longest, dtype=torch.long)
            mask = torch.zeros_like(rows)
            for line, one in enumerate(chosen):
                rows[line, longest - len(ids[one]) :] = torch.tensor(ids[one])
                mask[line, longest - len(ids[one]) :] = 1
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = model.generate(
                    input_ids=rows.to(device),
                    attention_mask=mask.to(device),
                    generation_config=greedy,
                    synced_gpus=together,
                )
            for one, tokens in zip(chosen, made[:, longest:].tolist(), strict=True):
                end = next((n for n, token in enumerate(tokens) if token in form.stop_ids), len(tokens))
                found[one] = form.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    finally:
        plain.generation_config = before
        model.train(was_training)
    return found
