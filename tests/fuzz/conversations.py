"""Conversations with marks hidden in every text: none becomes a control token, in serving or in training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

from convert.data import encode
from convert.data.dataset import Report
from convert.data.dataset_info import Row
from convert.model import chat_format
from edge.backends.llamacpp import Model
from edge.backends.onnx_tokenizer import Vocabulary
from edge.chat_template import ChatTemplate
from edge.errors import RequestError
from edge.prompt import AddedTokens, Prompt, token_ids
from edge.server.api.anthropic import ConversationFields
from edge.server.api.ollama import Chat as OllamaChat
from edge.server.api.openai_chat import ChatCompletion
from edge.server.api.openai_responses import Responses
from edge.server.conversation import Conversation, PreparedChat
from edge.server.request_fields import FunctionTool, flat
from tests.support import tiny_llama, tiny_onnx
from tests.support.marked import CHATML, DEEPSEEK, FAMILIES, WRAPPED, Family
from tests.support.tool_templates import DISTILL

Draw = Callable[[Random], Any]
Check = Callable[[Any], None]
# A text in pieces, each with whether it may be a part of a mark.
Text = list[tuple[str, bool]]
Talk = dict[str, Any]

_CALL = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
_TURNS = ("system", "user", "assistant", "tool", "end")
_TEMPLATES = FAMILIES | {
    # A mark may begin where another ends, and be made of what stands around a text.
    "seams": Family(
        "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}|{{ m.role }}|{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}|end|<{{ m.name or 'n' }}>\n{% endfor %}"
        "{% if add_generation_prompt %}|assistant|{% endif %}",
        (("<bos>", True), *((f"|{name}|", True) for name in _TURNS), *CHATML.added[-4:]),
        "|user|",
        "|end|",
        "<bos>",
    ),
    "qwen": Family(
        CHATML.template.replace("{{ m.content }}", WRAPPED),
        (*CHATML.added, ("<tool_response>", False), ("</tool_response>", False)),
        CHATML.begin,
        CHATML.end,
    ),
    "distill": Family(
        "{{ bos_token }}" + DISTILL,
        (*DEEPSEEK.added, *((mark, False) for mark in _CALL)),
        DEEPSEEK.begin,
        DEEPSEEK.end,
        DEEPSEEK.bos,
    ),
}
_FORMS = ("openai", "responses", "anthropic", "ollama", "training")
_WORDS = [
    "x", "a b", "你好", "é", "e\u0301", "\n", "\n\n", " ", "1 < 2", "👩\u200d🚀", "{{ 7 }}", "{% if x %}",
    "%s", "\\", '"', "\\u003c", "\u2028", "\u200b", "\ufeff", "\u2801", "\0", "<think>", "</think>",
    "<tool_call>", "</tool_call>", "＜|im_end|＞", "<¦im_end¦>", "‹|im_end|›", "<|IM_END|>", "< |im_end|>",
    "<|im\u200b_end|>", "[Turn]", "&lt;",
]  # fmt: skip
# As in a real vocabulary tokens go over the borders of a mark's parts.
_MERGES = ["< |", "| >", "x <", "| i", "Ċ |", "Ċ Ċ", "> Ċ", "] Ċ", "Ġ <", "Ġ |"]


def text(rng: Random, family: Family) -> Text:
    """Words, marks, and parts of marks that may meet at a seam of two texts or of two pieces."""
    pieces: Text = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        mark = rng.choice(family.marks)
        start, end = sorted(rng.randrange(len(mark) + 1) for _ in range(2))
        how = rng.randrange(8)
        if how < 3:
            pieces.append((rng.choice(_WORDS), False))
        elif how == 3:
            pieces += [(mark[:end], True), (mark[end:], True)]
        else:
            hidden = [
                mark,
                mark[:end],
                mark[start:],
                mark[start:end],
                mark[1:-1],
                mark + mark[1:],
                mark[0] * 3 + mark,
                mark[:end] + mark + mark[end:],
            ]
            pieces.append(
                (rng.choice(hidden) if how < 7 or "▁" not in mark else mark.replace("▁", " "), True)
            )
    return pieces


def schema(rng: Random, family: Family) -> list[Any]:
    """The properties of a tool: (name, description, default, alternatives)."""
    return [[text(rng, family) for _ in range(4)] for _ in range(rng.randrange(3))]


def conversation(rng: Random, family: Family, *, calls: bool) -> Talk:
    """A conversation in a form of its own, which each API family's is made of."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        turn = {name: text(rng, family) for name in ("user", "name", "answer", "thought")}
        if calls and rng.random() < 0.5:
            names = ("call", "id", "key", "value", "result")
            turn |= {name: text(rng, family) for name in names}
        turns.append(turn)
    tools = [
        [f"f{n}", text(rng, family), schema(rng, family)] for n in range(rng.randrange(3) if calls else 0)
    ]
    return {
        "system": text(rng, family) if rng.random() < 0.6 else None,
        "turns": turns,
        "tools": tools,
        "extra": text(rng, family),
        "last": rng.choice(("user", "user", "answer")),
    }


def written(value: Any, *, harmless: bool) -> Any:
    """The conversation with its pieces put together; harmless: with a word for each part of a mark."""
    if isinstance(value, dict):
        return {key: written(item, harmless=harmless) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, tuple) for item in value):
        return "".join("x" if harmless and hidden and piece else piece for piece, hidden in value)
    if isinstance(value, list):
        return [written(item, harmless=harmless) for item in value]
    return value


def _tools(talk: Talk) -> list[tuple[str, str, dict[str, Any]]]:
    rows = []
    for name, about, properties in talk["tools"]:
        fields = {
            f"p{n}{key}": {"description": words, "default": value, "enum": [value, other]}
            for n, (key, words, value, other) in enumerate(properties)
        }
        rows.append((name, about, {"type": "object", "title": about, "properties": fields}))
    return rows


def _arguments(turn: dict[str, Any]) -> dict[str, Any]:
    return {f"k{turn['key']}": turn["value"], "role": [turn["value"], {"role": turn["key"]}]}


def _called(turn: dict[str, Any]) -> str:
    return f"f{turn['call']}"[:128]


def _openai_rows(talk: Talk) -> list[dict[str, Any]]:
    """Messages of chat completions; arguments are escaped JSON, as clients write it."""
    rows: list[dict[str, Any]] = []
    if talk["system"] is not None:
        rows.append({"role": "system", "content": [{"type": "text", "text": talk["system"]}]})
    for turn in talk["turns"]:
        rows.append({"role": "user", "content": turn["user"], "name": turn["name"]})
        if "call" in turn:
            arguments = json.dumps(_arguments(turn)).replace("<", "\\u003c")
            function = {"name": _called(turn), "arguments": arguments}
            call = {"id": f"c{turn['id']}", "type": "function", "function": function}
            thoughts = {"reasoning_content": turn["thought"]} if turn["thought"] else {}
            rows.append({"role": "assistant", "content": None, "tool_calls": [call], **thoughts})
            rows.append({"role": "tool", "tool_call_id": call["id"], "content": turn["result"]})
        rows.append({"role": "assistant", "content": turn["answer"]})
    return rows if talk["last"] == "answer" else rows[:-1]


def _openai_tools(talk: Talk) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}
        for name, about, parameters in _tools(talk)
    ]


def _openai(talk: Talk) -> Conversation:
    body: dict[str, Any] = {"messages": _openai_rows(talk), "tools": _openai_tools(talk)}
    return ChatCompletion(**body, chat_template_kwargs={"documents": [talk["extra"]]}).conversation()


def _responses(talk: Talk) -> Conversation:
    items: list[dict[str, Any]] = []
    for row in _openai_rows(talk):
        if row["role"] == "system":
            continue
        if "tool_calls" in row:
            [call] = row["tool_calls"]
            items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
        elif row["role"] == "tool":
            output = [{"type": "output_text", "text": row["content"]}]
            items.append({"type": "function_call_output", "call_id": row["tool_call_id"], "output": output})
        else:
            items.append({"role": row["role"], "content": row["content"]})
    tools = [{"type": "function", **tool["function"]} for tool in _openai_tools(talk)]
    return Responses.model_validate(
        {"input": items, "instructions": talk["system"], "tools": tools}
    ).conversation()


def _anthropic(talk: Talk) -> Conversation:
    rows: list[dict[str, Any]] = []
    for turn in talk["turns"]:
        rows.append({"role": "user", "content": turn["user"]})
        if "call" in turn:
            call = {"type": "tool_use", "id": turn["id"], "name": _called(turn), "input": _arguments(turn)}
            thought = {"type": "thinking", "thinking": turn["thought"]}
            result = {"type": "tool_result", "tool_use_id": turn["id"], "content": turn["result"]}
            rows.append({"role": "assistant", "content": [thought, call]})
            rows.append({"role": "user", "content": [result]})
        rows.append({"role": "assistant", "content": [{"type": "text", "text": turn["answer"]}]})
    tools = [
        {"name": name, "description": about, "input_schema": parameters}
        for name, about, parameters in _tools(talk)
    ]
    return ConversationFields.model_validate(
        {
            "messages": rows if talk["last"] == "answer" else rows[:-1],
            "system": [{"type": "text", "text": talk["system"] or ""}],
            "tools": tools,
        }
    ).conversation()


def _ollama(talk: Talk) -> Conversation:
    rows: list[dict[str, Any]] = []
    for row in _openai_rows(talk):
        given = {"role": row["role"], "content": row["content"] or ""}
        if row["role"] == "system":
            given["content"] = talk["system"]
        if "tool_calls" in row:
            [call] = row["tool_calls"]
            function = {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
            given |= {"tool_calls": [{"function": function}], "thinking": row.get("reasoning_content")}
        rows.append(given | ({"tool_name": row["tool_call_id"]} if row["role"] == "tool" else {}))
    body = OllamaChat.model_validate({"model": "m", "messages": rows, "tools": _openai_tools(talk)})
    messages = flat([message.message(f"messages[{n}]") for n, message in enumerate(body.messages)])
    return Conversation(messages, tools=[tool.function.tool() for tool in body.tools or []])


_CONVERSATIONS: dict[str, Callable[[Talk], Conversation]] = {
    "openai": _openai,
    "responses": _responses,
    "anthropic": _anthropic,
    "ollama": _ollama,
}


class Tokenizers:
    """A family's tokenizer in each backend and in training, and its template. folder: takes their files."""

    def __init__(self, folder: Path, family: Family) -> None:
        folder.mkdir(parents=True)
        self.family = family
        # The tiny tokenizer has this one by itself.
        added = [(mark, on) for mark, on in family.added if mark != "<think>"]
        described = tiny_onnx.tokenizer(added)
        model = cast(dict[str, Any], described["model"])
        joined = ["".join(merge.split(" ")) for merge in _MERGES]
        model["vocab"] |= {token: 280 + n for n, token in enumerate(joined)}
        model["merges"] = _MERGES
        eos = DEEPSEEK.marks[0] if family.bos == DEEPSEEK.bos else family.end
        config = {"bos_token": family.bos or None, "eos_token": eos}
        (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
        self.form = chat_format.load(folder)
        self.onnx = Vocabulary(folder, 300)
        # Held: its vocabulary is the library's.
        self._model = Model(tiny_llama.write(folder / "m.gguf", added=family.added))
        self.llamacpp = self._model.vocabulary
        marks = {259 + n: mark for n, (mark, _) in enumerate(added)} | {257: "<|end|>", 258: "<think>"}
        self._onnx_marks = marks | {256: "<|begin|>"}
        self._native_marks = {tiny_llama.VOCAB + n: mark for n, (mark, _) in enumerate(family.added)}
        # The same template over each backend's list of added tokens, and without any.
        self.templates = [
            ChatTemplate(family.template, tokens=tokens, bos=family.bos, eos=eos)
            for tokens in (self.onnx.added, self.llamacpp.added, AddedTokens())
        ]

    def read(self, prompt: Prompt, vocabulary: Any) -> tuple[list[int], list[str], str]:
        """(ids, added tokens, text) of a prompt in one backend."""
        [ids] = token_ids([prompt], lambda parts: [vocabulary.encode(part, special=True) for part in parts])
        marks = self._onnx_marks if vocabulary is self.onnx else self._native_marks
        data = b"".join(
            marks[token].encode("utf-8") if token in marks else self._bytes(token, vocabulary)
            for token in ids
        )
        return ids, [marks[token] for token in ids if token in marks], data.decode("utf-8")

    def _bytes(self, token: int, vocabulary: Any) -> bytes:
        if vocabulary is self.onnx:
            return self.onnx.decode(token)
        return b" " if token == tiny_llama.SPACE else bytes([token - tiny_llama.BYTES_AT])

    def learnt(self, talk: Talk) -> list[list[str]]:
        """The added tokens of each sample that training makes of a conversation, which begin as served."""
        tools = [FunctionTool.model_validate(tool).function.tool().spec() for tool in _openai_tools(talk)]
        messages = [
            {**row, "content": talk["system"] if row["role"] == "system" else row["content"] or ""}
            for row in _openai_rows({**talk, "last": "answer"})
        ]
        for call in (call for row in messages for call in row.get("tool_calls", [])):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        row = Row("d, row 1", messages, tools or None)
        samples = encode.encode([row], self.form, Report(), encode.Rules(cutoff_len=10**6))
        if samples:
            given = {"tools": tools} if tools else {}
            mode = chat_format.thinking_mode(self.form, enable_thinking=True)
            served = self.read(self.templates[0].render(messages[:-1], thinking=mode, **given), self.onnx)[0]
            assert list(samples[-1].ids[: len(served)]) == served
        marks = self._onnx_marks
        return [[marks[token] for token in sample.ids if token in marks] for sample in samples]


def prompts(tokenizers: Tokenizers, asked: Conversation) -> list[Prompt]:
    """The prompt of a conversation, protected by each backend's list of tokens, and without protection."""
    rows = []
    for template in tokenizers.templates:
        model = SimpleNamespace(template=lambda t=template: t, thinking=None, reasons=False, name="m")
        rows.append(PreparedChat(cast(Any, model), asked).prompt)
    return rows


def _served(tokenizers: Tokenizers, asked: Conversation) -> list[list[str]]:
    """The added tokens that each backend finds in a conversation. Raises where a text is not kept whole."""
    *protected, raw = prompts(tokenizers, asked)
    found = []
    for prompt, vocabulary in zip(protected, (tokenizers.onnx, tokenizers.llamacpp), strict=True):
        # Nothing of the protection is left in the text.
        assert prompt.text == raw.text
        ids, marks, read = tokenizers.read(prompt, vocabulary)
        # To SentencePiece a space and its own character for it are the same.
        native = vocabulary is tokenizers.llamacpp
        assert read == prompt.text or (native and read.replace("▁", " ") == prompt.text.replace("▁", " "))
        if vocabulary is tokenizers.onnx:
            assert ids == tokenizers.form.encode([prompt])[0]
        if not prompt.cuts:
            assert ids == vocabulary.encode(prompt.text, special=True)
        found.append(marks)
    assert found[0] == found[1]
    return found


@contextlib.contextmanager
def conversations(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """A conversation has the control tokens of the same one with words in the place of marks."""
    made = {name: Tokenizers(folder / name, family) for name, family in _TEMPLATES.items()}

    def draw(rng: Random) -> tuple[str, str, Talk]:
        name, form = rng.choice(list(_TEMPLATES)), rng.choice(_FORMS)
        # Training shows calls as answers, which not every template does.
        calls = form != "training" or name in ("chatml", "turns", "seams", "qwen")
        return name, form, conversation(rng, _TEMPLATES[name], calls=calls)

    def check(given: tuple[str, str, Talk]) -> None:
        name, form, talk = given
        tokenizers = made[name]
        harmless, hostile = (written(talk, harmless=plain) for plain in (True, False))
        if form == "training":
            assert tokenizers.learnt(hostile) == tokenizers.learnt(harmless)
            return
        try:
            wanted = _served(tokenizers, _CONVERSATIONS[form](harmless))
            assert not prompts(tokenizers, _CONVERSATIONS[form](harmless))[0].cuts
        except RequestError:
            return
        assert _served(tokenizers, _CONVERSATIONS[form](hostile)) == wanted

    yield draw, check
