"""`edge export ollama RUN`: a Modelfile beside the GGUF, so that `ollama create` makes the same model of it.

Ollama does not run Jinja: it takes a Go template from the Modelfile, or maps the GGUF's chat template to one
that it knows. So the template is taken apart into what stands around each role's text, and written only where
that gives, character by character, what the model's own template gives for conversations of several shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from convert.model import chat_format
from edge.artefact import find
from edge.artefact.gguf_header import GGUFArray, GGUFHeader
from edge.chat_template import ChatTemplate
from edge.errors import InputError, RequestError
from edge.prompt import AddedTokens

FILE = "Modelfile"
# Texts of the system, of a question, of its answer and of a second question that no template contains.
_SYSTEM, _QUESTION, _ANSWER, _AGAIN = "\u2042s\u2042", "\u2042q\u2042", "\u2042a\u2042", "\u2042r\u2042"

Turn = tuple[str, str]  # role, text


@dataclass(frozen=True)
class Shape:
    """A chat template taken apart: what stands around each role's text, and what begins the answer.

    default: what it puts in front where there is no system message.
    """

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    begin: str
    bos: str
    default: str

    def render(self, turns: list[Turn]) -> str:
        """What Ollama makes of `turns` with the template of `go`."""
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        head = "" if turns[0][0] == "system" else self.default
        body = "".join(around[role][0] + text + around[role][1] for role, text in turns)
        return self.bos + head + body + self.begin

    def go(self) -> str:
        """The template in Go's language, as Ollama wants it. The begin-of-text token is Ollama's to add."""
        parts = []
        if self.default:
            parts.append("{{- if not .System }}" + _text(self.default) + "{{ end }}")
        if self.system:
            parts.append("{{- if .System }}" + _between(self.system, "{{ .System }}") + "{{ end }}")
        parts += [
            "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{- if eq .Role "user" }}' + _between(self.user, "{{ .Content }}"),
            '{{- else if eq .Role "assistant" }}' + _text(self.assistant[0]) + "{{ .Content }}",
            "{{- if not $last }}" + _text(self.assistant[1]) + "{{ end }}{{ end }}",
            '{{- if and $last (ne .Role "assistant") }}' + _text(self.begin) + "{{ end }}",
            "{{- end }}",
        ]
        return "\n".join(parts)


def take_apart(template: ChatTemplate, bos: str) -> Shape:
    """The shape of `template`. Raises InputError where no Go template of this kind says the same.

    bos: the token that the runtime puts in front by itself, which the Go template must then not write; "" for
    none.
    """
    # Several shapes say the same; people would write the one that ends all turns alike and begins them with a
    # token.
    for shape in sorted(_shapes(template, bos), key=_oddness):
        if _renders_the_same(shape, template):
            return shape
    raise InputError(
        "the chat template cannot be written for Ollama without changing what the model reads",
        "serve it with edge serve, which runs the template itself",
    )


def _shapes(template: ChatTemplate, bos: str) -> Iterator[Shape]:
    """Every way to cut what the template renders into what stands around each role's text."""
    single = _render(template, [("user", _QUESTION)])
    double = _render(template, [("user", _QUESTION), ("assistant", _ANSWER), ("user", _AGAIN)])
    if single is None or double is None:
        raise InputError("the chat template refuses a conversation", "serve the model with edge serve")
    bos = bos if single.startswith(bos) else ""
    system = _render(template, [("system", _SYSTEM), ("user", _QUESTION)])
    head, _, rest = double.removeprefix(bos).partition(_QUESTION)
    middle, _, rest = rest.partition(_ANSWER)
    between, _, tail = rest.partition(_AGAIN)
    if single.removeprefix(bos) != head + _QUESTION + tail:
        return
    for cut in range(len(head)):
        # A user's turn begins as its second one does; what stands before it in the first is the default.
        lead = head[cut:]
        if not between.endswith(lead):
            continue
        around = _around_system(system, bos, lead)
        for split in range(len(tail) + 1):
            close, begin = tail[:split], tail[split:]
            if middle.startswith(close):
                assistant = middle[len(close) :], between[: len(between) - len(lead)]
                yield Shape(around, (lead, close), assistant, begin, bos, head[:cut])


def _oddness(shape: Shape) -> tuple[bool, bool, int]:
    alike = bool(shape.user[1]) and shape.user[1] == shape.assistant[1]
    length = len(shape.user[1])
    return not alike, shape.user[0][0] not in "<[", -length if alike else length


def _around_system(text: str | None, bos: str, lead: str) -> tuple[str, str] | None:
    if text is None or _SYSTEM not in text:
        return None
    before, _, after = text.removeprefix(bos).partition(_SYSTEM)
    end = after.find(lead + _QUESTION)
    return (before, after[:end]) if end >= 0 else None


def _renders_the_same(shape: Shape, template: ChatTemplate) -> bool:
    question, answer = ("user", "一 {q}"), ("assistant", "b\nc")
    conversations = [
        [question],
        [question, answer, question],
        [question, answer, question, answer, question],
    ]
    if shape.system:
        conversations += [[("system", "是 s"), *turns] for turns in conversations]
    return all(_render(template, turns) == shape.render(turns) for turns in conversations)


def _render(template: ChatTemplate, turns: list[Turn]) -> str | None:
    """The prompt that the template makes of `turns`; None where it refuses them."""
    try:
        return template.render([{"role": role, "content": text} for role, text in turns]).text
    except RequestError:
        return None


def _between(around: tuple[str, str], inner: str) -> str:
    return _text(around[0]) + inner + _text(around[1])


def _text(text: str) -> str:
    """`text` in a Go template: as a quoted constant, so that no brace and no line end of it is read."""
    quoted = _escaped(text).replace("\n", "\\n").replace("\t", "\\t")
    return '{{ "' + quoted + '" }}' if text else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def run(given: Path, *, context: int = 4096) -> Path:
    """Write the Modelfile beside the GGUF of `given`; its path.

    Raises InputError where there is no GGUF, or its template cannot be said in Ollama's language.
    """
    artefact = find.resolve(given, "llamacpp")
    header = artefact.header
    assert isinstance(header, GGUFHeader)
    if artefact.chat_template is None:
        raise InputError(
            f"{artefact.path} has no chat template",
            "train with template: NAME, or take a model that has one; edge serve goes on with texts without",
        )
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GGUFArray)
    words = [str(word) for word in tokens.values()]
    bos, eos = (header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
    bos_text, eos_text = (words[token] if isinstance(token, int) else "" for token in (bos, eos))
    # What a file leaves open, its kind of vocabulary decides, as in llama.cpp.
    added = header.metadata.get("tokenizer.ggml.add_bos_token")
    if not isinstance(added, bool):
        added = header.metadata.get("tokenizer.ggml.model") == "llama"
    template = ChatTemplate(
        artefact.chat_template,
        # Our own texts alone are rendered.
        tokens=AddedTokens(),
        bos=bos_text,
        eos=eos_text,
        file=str(artefact.path),
    )
    shape = take_apart(template, bos_text if added else "")
    ends = sorted(artefact.stop_ids) or [token for token in (eos,) if isinstance(token, int)]
    context = min(context, header.context_length)
    return _write(artefact.path.parent, f"./{artefact.path.name}", shape, context, [words[id] for id in ends])


def of_folder(folder: Path, *, context: int = 4096) -> Path:
    """Write a Modelfile into a transformers folder, which Ollama converts itself; its path.

    Raises InputError where its template cannot be said in Ollama's language.
    """
    form = chat_format.load(folder)
    begins = form.tokenizer.encode("x").ids[:1] == [form.special.get(form.bos)]
    shape = take_apart(form.chat, form.bos if begins else "")
    stops = [str(form.tokenizer.id_to_token(token)) for token in form.stop_ids]
    return _write(folder, ".", shape, context, stops)


def _write(folder: Path, source: str, shape: Shape, context: int, stops: list[str]) -> Path:
    lines = [
        f"FROM {source}",
        f'TEMPLATE """{shape.go()}"""',
        f"PARAMETER num_ctx {context}",
        # A stop text is quoted as in Go; the tokens themselves end an answer by the file's own metadata.
        *(f'PARAMETER stop "{_escaped(stop)}"' for stop in stops),
    ]
    path = folder / FILE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
