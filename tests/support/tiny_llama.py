"""A real GGUF for llama.cpp: random weights, a byte vocabulary, a chat template. Loads in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from edge.artefact import manifest

WIDTH, HEADS, KV_HEADS, FEED, LAYERS, CONTEXT = 64, 4, 2, 128, 2, 512
BYTES_AT = 3
USER, END, SPACE = BYTES_AT + 256, BYTES_AT + 257, BYTES_AT + 258
VOCAB = BYTES_AT + 259
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


def ids(text: str) -> list[int]:
    """The tokens of `text`."""
    return [SPACE if b == ord(" ") else BYTES_AT + b for b in text.encode()]


def write(
    path: Path,
    *,
    seed: int = 0,
    template: str | None = TEMPLATE,
    part: int = 0,
    added: Sequence[tuple[str, bool]] = (),
) -> Path:
    """Write the model to `path`: token i + 3 is byte i; `<|user|>` and `<|end|>` are control tokens.

    part: tensors of each of several files, which are called after `path`; 0: one file. added: further tokens,
    each with whether it is a control token.
    """
    rng = np.random.default_rng(seed)
    tokens = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % i for i in range(256)] + [b"<|user|>", b"<|end|>"]
    # A SentencePiece vocabulary writes a space as this character.
    tokens.append("▁".encode())
    kinds = [
        gguf.TokenType.UNKNOWN,
        gguf.TokenType.CONTROL,
        gguf.TokenType.CONTROL,
        *[gguf.TokenType.BYTE] * 256,
        *[gguf.TokenType.CONTROL] * 2,
        gguf.TokenType.NORMAL,
    ]
    tokens += [text.encode() for text, _ in added]
    kinds += [gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED for _, control in added]
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=part)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    if template is not None:
        writer.add_chat_template(template)

    def add(name: str, *shape: int) -> None:
        # Larger than a trained model's, so that logits lie apart and greedy text varies.
        values = rng.normal(0, 2.0 / np.sqrt(shape[-1]), shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(name + ".weight", values.astype(np.float32))

    add("token_embd", len(tokens), WIDTH)
    add("output_norm", WIDTH)
    add("output", len(tokens), WIDTH)
    head = WIDTH // HEADS
    for i in range(LAYERS):
        block = f"blk.{i}."
        add(block + "attn_norm", WIDTH)
        add(block + "ffn_norm", WIDTH)
        add(block + "attn_q", WIDTH, WIDTH)
        add(block + "attn_k", KV_HEADS * head, WIDTH)
        add(block + "attn_v", KV_HEADS * head, WIDTH)
        add(block + "attn_output", WIDTH, WIDTH)
        add(block + "ffn_gate", FEED, WIDTH)
        add(block + "ffn_up", FEED, WIDTH)
        add(block + "ffn_down", WIDTH, FEED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_lora(path: Path, *, seed: int = 0, strength: float = 1.0) -> Path:
    """A LoRA adapter of rank 4 for it, as GGUF."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for i in range(LAYERS):
        for half, shape in (("a", (4, WIDTH)), ("b", (WIDTH, 4))):
            values = rng.normal(0, strength / 2, shape).astype(np.float32)
            writer.add_tensor(f"blk.{i}.attn_output.weight.lora_{half}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def publish(folder: Path, **given: object) -> Path:
    """A run whose gguf stage holds the tiny model."""
    with manifest.publish(folder / "gguf") as partial:
        write(partial / "微小.gguf")
        fields: dict[str, object] = {
            "stage": "gguf",
            "name": "微小",
            "stop_ids": [2, 7],
            "chat_template": manifest.text_digest(TEMPLATE),
        }
        manifest.write(partial, manifest.Manifest(**{**fields, **given}))  # type: ignore[arg-type]
    return folder
