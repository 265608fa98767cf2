"""A small ONNX decoder of the kind that onnxruntime-genai's builder makes: random weights, a byte vocabulary.

Weights lie beside the graph; keys and values go through GroupQueryAttention. Loads in milliseconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convert.export.onnx_graph import add_candidates
from edge.artefact import manifest
from edge.artefact.onnx_header import HIDDEN, OUTPUT_POSITIONS
from edge.backends.onnx_providers import utf8_path
from edge.backends.onnx_tokenizer import byte_table

WIDTH, HEADS, KV_HEADS, HEAD, FEED, LAYERS, CONTEXT = 64, 4, 2, 16, 96, 2, 512
BOS, END = 256, 257
VOCAB = 262
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)

# Where the locale decides how names are written, onnxruntime opens those of ASCII.
FILE = "微小.onnx" if sys.getfilesystemencoding() == "utf-8" else "tiny.onnx"


def write(
    folder: Path, *, seed: int = 0, name: str = "tiny.onnx", candidates: int = 0, dtype: str = "float32"
) -> Path:
    """Write model, tokenizer and template: token i is byte i; `<|begin|>` and `<|end|>` are control.

    candidates: as convert.export.onnx_graph.complete. dtype: of weights and KV cells; GPUs need float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    graph = _graph(np.random.default_rng(seed), np.dtype(dtype))
    if candidates:
        add_candidates(graph, candidates)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    with utf8_path(path) as file:
        onnx.save_model(
            model,
            file,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=f"{name}.data",
            size_threshold=256,
        )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False), encoding="utf-8")
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path


def tokenizer(added: Sequence[tuple[str, bool]] = ()) -> dict[str, object]:
    """A tokenizer.json without merges: each byte is a token; a begin token goes in front of a text.

    added: further tokens, each with whether it is special; their ids begin at 259.
    """
    vocab = byte_table()
    special = [(BOS, "<|begin|>", True), (END, "<|end|>", True), (258, "<think>", False)]
    special += [(259 + n, text, on) for n, (text, on) in enumerate(added)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, "special": on, **flags} for i, text, on in special],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [BOS], "tokens": ["<|begin|>"]}},
        },
        "model": {"type": "BPE", "vocab": vocab | {text: i for i, text, _ in special}, "merges": []},
    }


def _graph(rng: np.random.Generator, dtype: np.dtype[np.generic]) -> onnx.GraphProto:
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int) -> str:
        # Larger than a trained model's, so that logits lie apart and greedy text varies.
        values = rng.normal(0, 2.0 / np.sqrt(shape[0]), shape) if len(shape) > 1 else np.ones(shape)
        weights.append(numpy_helper.from_array(values.astype(dtype), name))
        return name

    def node(
        kind: str, inputs: list[str], output: str, *more: str, domain: str = "", **attributes: object
    ) -> str:
        nodes.append(
            helper.make_node(kind, inputs, [output, *more], name=f"/{output}", domain=domain, **attributes)
        )
        return output

    def constant(name: str, value: list[int]) -> str:
        weights.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def norm(inputs: str, name: str) -> str:
        scale = weight(f"{name}.weight", WIDTH)
        return node("SimplifiedLayerNormalization", [inputs, scale], name, axis=-1, epsilon=1e-5)

    node("ReduceSum", ["attention_mask", constant("one", [1])], "counts", keepdims=0)
    node("Sub", ["counts", "one"], "last")
    node("Cast", ["last"], "lengths", to=TensorProto.INT32)
    node("Shape", ["attention_mask"], "mask_shape")
    node("Gather", ["mask_shape", constant("one_at", [1])], "wide", axis=0)
    node("Cast", ["wide"], "total", to=TensorProto.INT32)
    angles = np.arange(CONTEXT)[:, None] / 10000 ** (np.arange(HEAD // 2) / (HEAD // 2))
    for name, values in (("cos_cache", np.cos(angles)), ("sin_cache", np.sin(angles))):
        weights.append(numpy_helper.from_array(values.astype(dtype), name))
    hidden = node("Gather", [weight("model.embed_tokens.weight", VOCAB, WIDTH), "input_ids"], "embedded")
    caches = []
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        normed = norm(hidden, f"{at}.input_layernorm")
        parts = [
            node("MatMul", [normed, weight(f"{at}.{part}", WIDTH, heads * HEAD)], f"{at}.{part}.out")
            for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        ]
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        caches += [
            *zip(past, ["past_length"] * 2, strict=True),
            *zip(present, ["total_length"] * 2, strict=True),
        ]
        mixed = node(
            "GroupQueryAttention",
            [*parts, *past, "lengths", "total", "cos_cache", "sin_cache"],
            f"{at}.attention",
            *present,
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        out = node("MatMul", [mixed, weight(f"{at}.o", WIDTH, WIDTH)], f"{at}.o.out")
        hidden = node("Add", [hidden, out], f"{at}.middle")
        normed = norm(hidden, f"{at}.post_attention_layernorm")
        up = node("MatMul", [normed, weight(f"{at}.up", WIDTH, FEED)], f"{at}.up.out")
        down = node(
            "MatMul", [node("Tanh", [up], f"{at}.act"), weight(f"{at}.down", FEED, WIDTH)], f"{at}.down.out"
        )
        hidden = node("Add", [hidden, down], f"{at}.end")
    weights.append(numpy_helper.from_array(np.array([-1], np.int64), OUTPUT_POSITIONS))
    picked = node("Gather", [norm(hidden, HIDDEN), OUTPUT_POSITIONS], "picked", axis=1)
    node("MatMul", [picked, weight("lm_head", WIDTH, VOCAB)], "logits")

    def value(name: str, kind: int, shape: list[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [
        value("input_ids", 7, ["batch", "length"]),
        value("attention_mask", 7, ["batch", "total_length"]),
    ]
    outputs = [
        value("logits", kind, ["batch", "outputs", VOCAB]),
        value(HIDDEN, kind, ["batch", "length", WIDTH]),
    ]
    for name, length in caches:
        side = inputs if name.startswith("past") else outputs
        side.append(value(name, kind, ["batch", KV_HEADS, length, HEAD]))
    inputs.append(value(OUTPUT_POSITIONS, 7, ["outputs"]))
    return helper.make_graph(nodes, "tiny", inputs, outputs, weights)


def publish(run: Path, **given: object) -> Path:
    """A run whose onnx stage holds the tiny model."""
    with manifest.publish(run / "onnx") as partial:
        write(partial, name=FILE)
        fields: dict[str, object] = {
            "stage": "onnx",
            "name": "微小",
            "stop_ids": [END],
            "chat_template": manifest.text_digest(TEMPLATE),
        }
        manifest.write(partial, manifest.Manifest(**{**fields, **given}))  # type: ignore[arg-type]
    return run
