"""The model's own tokenizer and chat template, used in training as the server uses them.

Prompts are rendered by edge.chat_template, the code that serves, and tokenised as one text without added
special tokens; answers end with the token that the template ends an assistant's turn with.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.artefact import json_file
from edge.artefact.find import TEMPLATE
from edge.chat_template import ChatTemplate
from edge.errors import InputError, RequestError, UsageError
from edge.reasoning import THINK, THINK_END, opens_reasoning

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    TEMPLATE, "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

# What the chat template of a model has in it, by the name LLaMA-Factory gives to its own copy.
_MARKS = {
    "alpaca": "### Instruction", "baichuan2": "<reserved_106>", "chatml": "<|im_start|>",
    "deepseek": "User: ", "deepseek3": "<｜User｜>", "deepseekr1": "<｜User｜>", "gemma": "<start_of_turn>",
    "gemma2": "<start_of_turn>", "gemma3": "<start_of_turn>", "glm4": "<|assistant|>",
    "hunyuan": "<|startoftext|>", "intern2": "<|im_start|>", "llama2": "[INST]",
    "llama3": "<|start_header_id|>", "mistral": "[INST]", "phi": "<|user|>", "phi4": "<|im_start|>",
    "qwen": "<|im_start|>", "qwen3": "<|im_start|>", "qwen3_nothink": "<|im_start|>",
    "smollm": "<|im_start|>", "smollm2": "<|im_start|>", "vicuna": "USER:", "yi": "<|im_start|>",
    "zephyr": "<|user|>",
}  # fmt: skip


@dataclass
class ChatFormat:
    """A tokenizer with its chat template.

    stop_ids: tokenizer's end token, generation config's end tokens, and `turn_end`, sorted.
    turn_end: id that ends an assistant's turn. turn_tail: the text from an answer to its end, included.
    trims: whether the template strips answers. thinks: whether it knows of thoughts. special: ids by token.
    """

    folder: Path
    tokenizer: Tokenizer
    source: str
    chat: ChatTemplate
    bos: str
    eos: str
    special: dict[str, int]
    stop_ids: list[int] = field(default_factory=list)
    turn_end: int = -1
    turn_tail: str = ""
    trims: bool = False
    thinks: bool = False
    warnings: list[str] = field(default_factory=list)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; special tokens that stand in it are recognised, none are added."""
        return [row.ids for row in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def prompt(
        self, messages: list[dict[str, Any]], thinking: str | None, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The prompt that serving renders for `messages`. Raises InputError with the template's message."""
        extra = {"tools": tools} if tools else {}
        try:
            return self.chat.render(messages, thinking=thinking, **extra)
        except RequestError as error:
            raise InputError(error.message) from error

    def call(
        self,
        messages: list[dict[str, Any]],
        prompt: str,
        thinking: str | None,
        tools: list[dict[str, Any]] | None,
    ) -> str:
        """The tool calls of the last of `messages` as they follow `prompt`, including what ends the turn.

        Raises InputError where the template does not show them.
        """
        text = self._finished(messages, "tool calls", thinking, tools)
        names = [call["function"]["name"] for call in messages[-1]["tool_calls"]]
        answer, end, _ = text.removeprefix(prompt).partition(self.turn_tail)
        if not text.startswith(prompt) or not end or any(name not in answer for name in names):
            raise InputError("the model's chat template does not show tool calls")
        return answer + end

    def _finished(
        self,
        messages: list[dict[str, Any]],
        what: str,
        thinking: str | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """`messages` with no further turn begun. Raises InputError where the template refuses `what`."""
        # transformers passes these two always: templates may ask whether they are none.
        extra: dict[str, Any] = {"tools": tools, "documents": None}
        if thinking is not None:
            extra["enable_thinking"] = thinking == "on"
        try:
            return self.chat.render(messages, add_generation_prompt=False, **extra)
        except RequestError as error:
            raise InputError(f"{self.folder}: {what}: {error.message}") from error

    def answer(self, text: str) -> str:
        """What the model is to write for the answer `text`, including what ends its turn."""
        return (text.strip() if self.trims else text) + self.turn_tail


def load(folder: Path) -> ChatFormat:
    """The tokenizer and chat template of the transformers folder `folder`.

    tokenizer.json is read as it is: transformers' classes may put another pre-tokenizer in its place.
    Raises InputError where either is missing or broken.
    """
    # Imported late: a wrong argument is answered before.
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json", "give a folder with a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{path} cannot be read: {error}", "get the model again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = json_file.read(folder / "tokenizer_config.json")
    source = _template_source(folder, config)
    bos, eos = (json_file.token_text(config.get(key)) for key in ("bos_token", "eos_token"))
    special = {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special or token.content in (bos, eos)
    }
    file = TEMPLATE if (folder / TEMPLATE).is_file() else "tokenizer_config.json"
    chat = ChatTemplate(source, bos=bos, eos=eos, file=str(folder / file))
    form = ChatFormat(folder, tokenizer, source, chat, bos, eos, special)
    form.thinks = THINK_END in source
    _find_turn_end(form)
    ends = {form.turn_end, *_generation_ends(folder)}
    if eos in special:
        ends.add(special[eos])
    form.stop_ids = sorted(ends)
    return form


def copy_tokenizer(source: Path, target: Path, chat_template: str) -> None:
    """The tokenizer's files byte for byte, and the chat template as a file of its own."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    (target / TEMPLATE).write_bytes(chat_template.encode("utf-8"))


def write_generation_config(source: Path, target: Path, stop_ids: list[int]) -> None:
    """The generation config of the folder `source`, if it has one, with these end tokens."""
    generation = json_file.read(source / "generation_config.json")
    json_file.write(target / "generation_config.json", {**generation, "eos_token_id": stop_ids})


def check_name(name: str | None, form: ChatFormat) -> str | None:
    """A warning to show where LLaMA-Factory's template `name` cannot be checked against the model's own.

    Raises UsageError where the model's template is of another family.
    """
    if name is None:
        return None
    mark = _MARKS.get(name)
    if mark is None:
        return f"template: {name} is ignored: the model's own chat template is used"
    if mark not in form.source:
        raise UsageError(
            f"template: {name} does not fit the model: its chat template has no {mark!r}",
            "leave `template` out: the model's own chat template is used in training and in serving",
        )
    return None


def thinking_mode(form: ChatFormat, enable_thinking: bool | None) -> str | None:
    """The artefact's thinking mode: None where the template knows no thoughts, else on, off or mixed."""
    if not form.thinks:
        return None
    return {True: "on", False: "off", None: "mixed"}[enable_thinking]


def split_thought(answer: str) -> tuple[str | None, str]:
    """(thought or None, rest) of an answer that may begin with `<think>...</think>`."""
    head, end, rest = answer.partition(THINK_END)
    if not end:
        return None, answer
    return head.strip().removeprefix(THINK).strip(), rest.lstrip()


def with_thought(prompt: str, thought: str, rest: str) -> str:
    """`rest` behind its thought, as it goes on from `prompt`, which may have opened the thought."""
    body = f"{thought}\n{THINK_END}\n\n{rest}"
    if not opens_reasoning(prompt):
        return f"{THINK}\n{body}"
    return body if prompt.endswith("\n") else "\n" + body


def _find_turn_end(form: ChatFormat) -> None:
    """Ask the template how it ends an answer, with an answer that cannot be anything else."""
    mark = "\u2042probe\u2042"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f" {mark} "}]
    _, shown, tail = form._finished(messages, "a question with its answer").rpartition(mark)
    if not shown:
        raise InputError(f"{form.folder}: the chat template does not show the assistant's answer")
    form.trims = not tail.startswith(" ")
    tail = tail if form.trims else tail[1:]
    ends = [(tail.find(token), -len(token), token) for token in form.special if token and token in tail]
    if ends:
        start, _, token = min(ends)
        form.turn_end, form.turn_tail = form.special[token], tail[: start + len(token)]
        return
    if form.eos not in form.special:
        raise InputError(f"{form.folder}: neither chat template nor tokenizer names an end token")
    form.turn_end, form.turn_tail = form.special[form.eos], form.eos
    form.warnings.append(f"the chat template ends an answer with no token: {form.eos} is trained as its end")


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    path = folder / TEMPLATE
    if path.is_file():
        try:
            # As transformers reads it: line ends of Windows count as plain ones.
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8: {error}", "get the model again") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        templates = [entry for entry in source if isinstance(entry, dict)]
        source = {entry.get("name"): entry.get("template") for entry in templates}.get("default")
    if not isinstance(source, str) or not source:
        raise InputError(
            f"{folder} has no chat template", "train a chat model, or put its chat_template.jinja there"
        )
    return source


def _generation_ends(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    ends = json_file.read(path).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if any(type(end) is not int for end in ends if end is not None):
        raise InputError(f"{path}: eos_token_id is {str(ends)[:60]}, not token ids", "get the model again")
    return [end for end in ends if end is not None]
