"""A tiny random Llama or Qwen2 folder, as transformers saves one, made in a fraction of a second.

It has the traps of real ones: the padding token is the end token, and generation_config.json ends a turn with
one token more than the tokenizer knows of.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from functools import cache
from pathlib import Path

from tests.support.tiny_safetensors import safetensors

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As in DeepSeek's distills: the generation prompt opens a thought, and history loses its thoughts.
THINKING = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' + content + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
_TEXTS = (
    "Who are you? I am the conch. 请问你是谁？我是神奇海螺。",
    "Ask me again. No. Maybe someday. Nothing. 不行。也许有一天。什么都不做。",
    "user assistant system hello world the quick brown fox 1234567890 <think>\n</think>",
)


@cache
def _tokenizer_json(vocab: int) -> str:
    """A byte-level BPE of exactly `vocab` tokens: 256 bytes, 3 special ones, merges, and unused ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, IM_START, IM_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    unused = vocab - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(f"<|unused_{n}|>", special=True) for n in range(unused)])
    return tokenizer.to_str()


def make_stub(folder: Path, *, template: str = CHATML) -> Path:
    """Write to `folder` the toy with a stub for its weights: importing what makes real ones takes seconds."""
    folder.mkdir(parents=True)
    words = {"bos_token": IM_START, "eos_token": IM_END, "pad_token": IM_END}
    for name, content in (
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **words}),
        ("generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 2}),
        ("config.json", {"model_type": "llama", "max_position_embeddings": 512, "vocab_size": 384}),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    safetensors(folder / "model.safetensors", bytes(1000))
    (folder / "tokenizer.json").write_text(_tokenizer_json(384), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def make_model(
    folder: Path,
    *,
    arch: str = "llama",
    tied: bool = True,
    vocab: int = 384,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    template: str | None = CHATML,
) -> Path:
    """Write a random model of `arch` ("llama" or "qwen2") to `folder`, in float32; returns `folder`.

    vocab: at least 260. hidden: a multiple of 16, the size of a head; half of the heads are KV heads.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers import Qwen2Config, Qwen2ForCausalLM  # isort: skip

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(vocab)),
        eos_token=IM_END,
        pad_token=IM_END,
        bos_token=IM_START,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    end, more = tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT])
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[arch]
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=max(1, hidden // 32),
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.convert_tokens_to_ids(IM_START),
        eos_token_id=end,
        pad_token_id=end,
    )
    # The caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        model = model_class(config)
        # transformers' own start (0.02) gives logits that are all alike.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = GenerationConfig(eos_token_id=[end, more], pad_token_id=end)
    model.save_pretrained(folder)
    # The package tokenizers takes paths in UTF-8 alone, whatever the locale.
    with contextlib.chdir(folder):
        tokenizer.save_pretrained(".")
    return folder
