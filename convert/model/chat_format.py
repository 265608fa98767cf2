"""The model's own tokenizer and chat template, used in training as the server uses them.

Prompts are rendered by edge.chat_template, the code that serves, and tokenised as one text without added
special tokens. Control tokens count where the template wrote them, unless `load` is told otherwise. Answers
end with the token that the template ends an assistant's turn with.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.model.named_templates import FORMATS, jinja
from edge.artefact import json_file, manifest
from edge.artefact.find import TEMPLATE
from edge.backends.onnx_tokenizer import exact
from edge.chat_template import ChatTemplate
from edge.errors import InputError, RequestError, UsageError
from edge.prompt import AddedTokens, Prompt, token_ids
from edge.reasoning import THINK, THINK_END, opens_reasoning
from edge.server.tool_dialects import Tool, dialect_of, explained, readable

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
    lead: blanks that the template puts before an answer. source: "" for a model without a chat template.
    grown: whether the tokenizer has tokens that its files do not have.
    trims: whether the template strips answers. thinks: whether it knows of thoughts. special: ids by token.
    added: the tokens that are found in a text before all others.
    """

    folder: Path
    tokenizer: Tokenizer
    source: str
    chat: ChatTemplate
    bos: str
    eos: str
    special: dict[str, int]
    added: AddedTokens
    stop_ids: list[int] = field(default_factory=list)
    turn_end: int = -1
    turn_tail: str = ""
    lead: str = ""
    grown: bool = False
    trims: bool = False
    thinks: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str | None:
        """Of the chat template, for manifests; None without one."""
        return manifest.text_digest(self.source or None)

    @property
    def begins(self) -> list[int]:
        """The token that the tokenizer puts before a text by itself; empty where it puts none."""
        number = self.special.get(self.bos)
        return [] if number is None or self.tokenizer.encode("").ids[:1] != [number] else [number]

    def encode(self, texts: Iterable[str | Prompt]) -> list[list[int]]:
        """Token ids of each text; special tokens that stand in it are recognised, none are added."""
        return token_ids(texts, self._encode)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [row.ids for row in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def prompt(
        self, messages: list[dict[str, Any]], thinking: str | None, tools: list[dict[str, Any]] | None = None
    ) -> Prompt:
        """The prompt that serving renders for `messages`.

        Raises InputError with the template's message, and where it does not show one of `tools`.
        """
        extra = {"tools": tools} if tools else {}
        try:
            prompt = self.chat.render(self._readable(messages, tools), thinking=thinking, **extra)
        except RequestError as error:
            raise InputError(error.message) from error
        if any(tool["function"]["name"] not in prompt.text for tool in tools or ()):
            raise InputError("the model's chat template does not show tools (template: NAME gives it one)")
        return prompt

    def call(
        self,
        messages: list[dict[str, Any]],
        prompt: Prompt,
        thinking: str | None,
        tools: list[dict[str, Any]] | None,
    ) -> Prompt:
        """The tool calls of the last of `messages` as they follow `prompt`, including what ends the turn.

        Raises InputError where the template does not show them.
        """
        whole, start = self._finished(messages, "tool calls", thinking, tools), len(prompt.text)
        if not whole.text.startswith(prompt.text):
            # A thought that only prompts have, empty or begun.
            start = len(prompt.text.removesuffix(f"\n{THINK_END}\n\n").removesuffix(f"{THINK}\n"))
        names = [call["function"]["name"] for call in messages[-1]["tool_calls"]]
        answer, end = whole.text, -1
        # What ends the turn is the template's: a text that looks like it is cut.
        while (end := answer.find(self.turn_tail, max(start, end + 1))) >= 0:
            if not any(end < cut < end + len(self.turn_tail) for cut in whole.cuts):
                break
        if (
            not answer.startswith(prompt.text[:start])
            or end < 0
            or any(name not in answer[start:end] for name in names)
        ):
            raise InputError("the model's chat template does not show tool calls")
        return whole.between(start, end + len(self.turn_tail))

    def _readable(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[dict[str, Any]]:
        """`messages` as serving hands them to this template."""
        dialect = dialect_of(self.source)
        messages = [readable(message, dialect) for message in messages]
        if tools and dialect is not None and "tools" not in self.chat.variables:
            messages = explained(messages, [_tool(tool["function"]) for tool in tools], dialect)
        return messages

    def _finished(
        self,
        messages: list[dict[str, Any]],
        what: str,
        thinking: str | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> Prompt:
        """`messages` with no further turn begun. Raises InputError where the template refuses `what`."""
        # transformers passes these two always: templates may ask whether they are none.
        extra: dict[str, Any] = {"tools": tools, "documents": None}
        if thinking is not None:
            extra["enable_thinking"] = thinking == "on"
        try:
            return self.chat.render(self._readable(messages, tools), add_generation_prompt=False, **extra)
        except RequestError as error:
            raise InputError(f"{self.folder}: {what}: {error.message}") from error

    def answer(self, text: str) -> Prompt:
        """What the model is to write for the answer `text`, including what ends its turn."""
        said = self.chat.answer(text.strip() if self.trims else text, self.turn_tail)
        return Prompt(self.lead) + said


def load(
    folder: Path,
    *,
    template: str | None = None,
    adapter: Path | None = None,
    plain: bool = False,
    tokens: tuple[str, ...] = (),
    special_tokens: tuple[str, ...] = (),
    grow: bool = False,
    parse_control_tokens: bool = False,
) -> ChatFormat:
    """The tokenizer and chat template of the transformers folder `folder`.

    tokenizer.json is read as it is: transformers' classes may put another pre-tokenizer in its place.
    template: LLaMA-Factory's name of the one to use. adapter: a folder whose chat template, where it has one,
    takes the place of the model's. plain: a model without a chat template will do. tokens, special_tokens: to
    be added to the tokenizer; grow: likewise the end token of `template`, where it lacks that.
    parse_control_tokens: those that stand in the texts of messages count, too.
    Raises InputError where either is missing or broken, UsageError for a template that does not fit.
    """
    # Imported late: a wrong argument is answered before.
    from tokenizers import AddedToken, Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json", "give a folder with a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_str(exact(path.read_text(encoding="utf-8")))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{path} cannot be read: {error}", "get the model again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    before = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    missing = [FORMATS[template].end] if grow and template in FORMATS else []
    tokenizer.add_special_tokens([*special_tokens, *filter(None, missing)])
    config = json_file.read(folder / "tokenizer_config.json")
    source = (_template_source(adapter, {}) if adapter else "") or _template_source(folder, config)
    bos, eos = (json_file.token_text(config.get(key)) for key in ("bos_token", "eos_token"))
    special = {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special or token.content in (bos, eos)
    }
    found = tokenizer.get_added_tokens_decoder().values()
    added = AddedTokens.of((token.content, token.special) for token in found)
    cut = AddedTokens() if parse_control_tokens else added
    file = TEMPLATE if (folder / TEMPLATE).is_file() else "tokenizer_config.json"
    chat = ChatTemplate(source, tokens=cut, bos=bos, eos=eos, file=str(folder / file))
    form = ChatFormat(folder, tokenizer, source, chat, bos, eos, special, added)
    form.grown = tokenizer.get_vocab_size() > before
    _choose_template(form, template, plain)
    form.thinks = THINK_END in form.source
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
    write_template(target, chat_template)


def save(form: ChatFormat, target: Path) -> None:
    """Write the tokenizer, with the tokens that were added to it, and the chat template of `form`."""
    copy_tokenizer(form.folder, target, form.source)
    if form.grown:
        (target / "tokenizer.json").write_text(form.tokenizer.to_str(pretty=True), encoding="utf-8")


def write_generation_config(source: Path, target: Path, stop_ids: list[int]) -> None:
    """The generation config of the folder `source`, if it has one, with these end tokens."""
    generation = json_file.read(source / "generation_config.json")
    json_file.write(target / "generation_config.json", {**generation, "eos_token_id": stop_ids})


def _choose_template(form: ChatFormat, name: str | None, plain: bool) -> None:
    """Give `form` the template `name` where that says anything else than the model's own does."""
    if name in FORMATS:
        chosen = ChatTemplate(jinja(name), tokens=form.chat.tokens, bos=form.bos, eos=form.eos)
        if form.source and _same(form.chat, chosen):
            return
        end = FORMATS[name].end
        number = form.tokenizer.token_to_id(end) if end else None
        if end and number is None:
            raise UsageError(
                f"template: {name} does not fit the model, which has no token {end} to end a turn with",
                "give another one, such as default or alpaca; or resize_vocab: true, which adds it",
            )
        if number is not None:
            form.special[end] = number
        if form.source:
            form.warnings.append(
                f"template: {name} is not the model's own chat template: training uses {name}, and so will "
                "what is merged, exported and served"
            )
        form.source = jinja(name)
        form.chat = chosen
        return
    if not form.source and not plain:
        raise InputError(
            f"{form.folder} has no chat template",
            f"give it one in the training's configuration, template: NAME ({', '.join(FORMATS)}); or put its "
            "chat_template.jinja there",
        )
    if name is None:
        return
    mark = _MARKS.get(name)
    if mark is not None and mark not in form.source:
        raise UsageError(
            f"template: {name} does not fit the model: its chat template has no {mark!r}",
            "leave `template` out: the model's own chat template is used in training and in serving",
        )
    if mark is None:
        form.warnings.append(f"template: {name} is ignored: the model's own chat template is used")


def _same(own: ChatTemplate, named: ChatTemplate) -> bool:
    """Whether two templates give the same prompts, but for a thought that one of them opens."""

    def prompt(template: ChatTemplate, talk: tuple[str, ...]) -> str:
        roles = ("system", "user", "assistant", "user")[len(talk) % 2 :]
        messages = [{"role": role, "content": text} for role, text in zip(roles, talk, strict=False)]
        return template.render(messages).text.removesuffix("\n").removesuffix(THINK)

    talks = (("q",), ("s", "q"), ("q", "a", "r"), ("s", "q", "a", "r"))
    try:
        return all(prompt(own, talk) == prompt(named, talk) for talk in talks)
    except RequestError:
        return False


def write_template(folder: Path, source: str) -> None:
    """Make `source` the chat template of `folder`, where the tokenizer lies already; "": it gets none."""
    path = folder / "tokenizer_config.json"
    config = json_file.read(path)
    # Converters of GGUF would take the one that stands there.
    if config.get("chat_template", source) != source:
        del config["chat_template"]
        json_file.write(path, config)
    if source:
        (folder / TEMPLATE).write_bytes(source.encode("utf-8"))


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


def _tool(function: dict[str, Any]) -> Tool:
    given = {key: function[key] for key in ("name", "description", "parameters") if function.get(key)}
    return Tool(**given)


def _find_turn_end(form: ChatFormat) -> None:
    """Ask the template how it ends an answer, with an answer that cannot be anything else."""
    if not form.source:
        if form.eos not in form.special:
            raise InputError(f"{form.folder}: its tokenizer names no end token", "get the model again")
        form.turn_end, form.turn_tail = form.special[form.eos], form.eos
        return
    mark = "\u2042probe\u2042"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f" {mark} "}]
    head, shown, tail = form._finished(messages, "a question with its answer").text.rpartition(mark)
    if not shown:
        raise InputError(f"{form.folder}: the chat template does not show the assistant's answer")
    form.trims = not tail.startswith(" ")
    tail = tail if form.trims else tail[1:]
    head = head if form.trims else head.removesuffix(" ")
    lead = head.removeprefix(form.prompt(messages[:1], None).text)
    form.lead = lead if lead != head and not lead.strip() else ""
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
    """The chat template of `folder`, whose tokenizer_config.json is `config`; "" without one."""
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
    return source if isinstance(source, str) else ""


def _generation_ends(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    ends = json_file.read(path).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if any(type(end) is not int for end in ends if end is not None):
        raise InputError(f"{path}: eos_token_id is {str(ends)[:60]}, not token ids", "get the model again")
    return [end for end in ends if end is not None]
