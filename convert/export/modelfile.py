"""`edge export ollama RUN`: a Modelfile beside the GGUF, so that `ollama create` makes the same model of it.

Ollama does not run Jinja: it takes a Go template from the Modelfile, or maps the GGUF's chat template to one
that it knows. So the template is taken apart into what stands around each role's text, and written only where
that gives, character by character, what the model's own template gives for conversations of several shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge.artefact import find
from edge.chat_template import ChatTemplate
from edge.errors import InputError, RequestError

FILE = "Modelfile"
_SYSTEM, _ASKED, _SAID, _AGAIN = "\u2042s\u2042", "\u2042q\u2042", "\u2042a\u2042", "\u2042r\u2042"


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

    def render(self, messages: list[dict[str, str]]) -> str:
        """What Ollama makes of `messages` with the template of `go`."""
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        head = "" if messages[0]["role"] == "system" else self.default
        body = "".join(around[one["role"]][0] + one["content"] + around[one["role"]][1] for one in messages)
        return self.bos + head + body + self.begin

    def go(self) -> str:
        """The template in Go's language, as Ollama wants it. The begin-of-text token is Ollama's to add."""
        parts = []
        if self.default:
            parts.append("{{- if not .System }}" + _text(self.default) + "{{ end }}")
        if self.system:
            parts.append("{{- if .System }}" + _between(self.system, "{{ .System }}") + "{{ end }}")
        parts.append("{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}")
        parts.append('{{- if eq .Role "user" }}' + _between(self.user, "{{ .Content }}"))
        parts.append('{{- else if eq .Role "assistant" }}' + _text(self.assistant[0]) + "{{ .Content }}")
        parts.append("{{- if not $last }}" + _text(self.assistant[1]) + "{{ end }}{{ end }}")
        parts.append('{{- if and $last (ne .Role "assistant") }}' + _text(self.begin) + "{{ end }}")
        return "\n".join([*parts, "{{- end }}"])


def take_apart(template: ChatTemplate, bos: str) -> Shape:
    """The shape of `template`. Raises InputError where no Go template of this kind says the same.

    bos: the token that the runtime puts in front by itself, which the Go template must then not write; "" for
    none.
    """
    texts = {
        "one": _render(template, [("user", _ASKED)]),
        "two": _render(template, [("user", _ASKED), ("assistant", _SAID), ("user", _AGAIN)]),
        "system": _render(template, [("system", _SYSTEM), ("user", _ASKED)]),
    }
    one, two, system = texts["one"], texts["two"], texts["system"]
    if one is None or two is None:
        raise InputError("the chat template refuses a conversation", "serve the model with edge serve")
    begin_of_text = bos if bos and one.startswith(bos) else ""
    head, _, rest = two.removeprefix(begin_of_text).partition(_ASKED)
    middle, _, rest = rest.partition(_SAID)
    between, _, tail = rest.partition(_AGAIN)
    one_head, _, one_tail = one.removeprefix(begin_of_text).partition(_ASKED)
    shapes = []
    for cut in range(len(head) if one_head == head and one_tail == tail else 0):
        # A user's turn begins as its second one does; what stands before it in the first is the default.
        lead = head[cut:]
        for split in range(len(tail) + 1 if between.endswith(lead) else 0):
            close, begin = tail[:split], tail[split:]
            if middle.startswith(close):
                opening = middle[len(close) :], between[: len(between) - len(lead)]
                around = _system(system, begin_of_text, lead)
                shapes.append(Shape(around, (lead, close), opening, begin, begin_of_text, head[:cut]))

    # Several say the same; people would write the one that ends all turns alike and begins them with a token.
    def odd(shape: Shape) -> tuple[bool, bool, int]:
        alike = bool(shape.user[1]) and shape.user[1] == shape.assistant[1]
        length = len(shape.user[1])
        return not alike, shape.user[0][0] not in "<[", -length if alike else length

    shapes.sort(key=odd)
    for shape in shapes:
        if _says_the_same(shape, template.render):
            return shape
    raise InputError(
        "the chat template cannot be written for Ollama without changing what the model reads",
        "serve it with edge serve, which runs the template itself",
    )


def _system(text: str | None, bos: str, lead: str) -> tuple[str, str] | None:
    if text is None or _SYSTEM not in text:
        return None
    before, _, after = text.removeprefix(bos).partition(_SYSTEM)
    end = after.find(lead + _ASKED)
    return (before, after[:end]) if end >= 0 else None


def _says_the_same(shape: Shape, render: Callable[..., str]) -> bool:
    question, answer = ("user", "一 {q}"), ("assistant", "b\nc")
    conversations = [
        [question],
        [question, answer, question],
        [question, answer, question, answer, question],
    ]
    if shape.system:
        conversations += [[("system", "是 s"), *conversation] for conversation in conversations]
    for conversation in conversations:
        messages = [{"role": role, "content": text} for role, text in conversation]
        try:
            if render(messages) != shape.render(messages):
                return False
        except RequestError:
            return False
    return True


def _render(template: ChatTemplate, turns: list[tuple[str, str]]) -> str | None:
    try:
        return template.render([{"role": role, "content": text} for role, text in turns])
    except RequestError:
        return None


def _between(around: tuple[str, str], inner: str) -> str:
    return _text(around[0]) + inner + _text(around[1])


def _text(text: str) -> str:
    """`text` in a Go template: as a quoted constant, so that no brace and no line end of it is read."""
    if not text:
        return ""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '{{ "' + quoted + '" }}'


def modelfile(file: str, shape: Shape, stops: list[str], context: int) -> str:
    """The Modelfile for the GGUF `file` in the same folder. stops: texts of the stop tokens."""
    lines = [f"FROM ./{file}", f'TEMPLATE """{shape.go()}"""', f"PARAMETER num_ctx {context}"]
    # A stop text is quoted as in Go; the tokens themselves end an answer by the file's own metadata.
    lines += ['PARAMETER stop "' + stop.replace("\\", "\\\\").replace('"', '\\"') + '"' for stop in stops]
    return "\n".join(lines) + "\n"


def run(given: Path, *, context: int = 4096) -> Path:
    """Write the Modelfile beside the GGUF of `given`; its path.

    Raises InputError where there is no GGUF, or its template cannot be said in Ollama's language.
    """
    found = find.resolve(given)
    if found.chat_template is None:
        raise InputError(f"{found.path} has no chat template", "export it again from a folder that has one")
    tokens = found.header.metadata["tokenizer.ggml.tokens"]
    words = tokens.values()  # type: ignore[union-attr]
    bos, eos = (found.header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
    bos_text, eos_text = (str(words[one]) if isinstance(one, int) else "" for one in (bos, eos))
    # What a file leaves open, its kind of vocabulary decides, as in llama.cpp.
    added = found.header.metadata.get("tokenizer.ggml.add_bos_token")
    if not isinstance(added, bool):
        added = found.header.metadata.get("tokenizer.ggml.model") == "llama"
    template = ChatTemplate(found.chat_template, bos=bos_text, eos=eos_text)
    shape = take_apart(template, bos_text if added else "")
    ends = sorted(found.stop_ids) or [one for one in (eos,) if isinstance(one, int)]
    stops = [str(words[one]) for one in ends]
    path = found.path.parent / FILE
    text = modelfile(found.path.name, shape, stops, min(context, found.header.context_length))
    path.write_text(text, encoding="utf-8")
    return path
