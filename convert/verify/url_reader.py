"""A model that a server answers for, as far as the server shows it: ours, llama-server, vLLM, Ollama, or any
other with OpenAI's routes.

    llama-server  /props (template, type), /apply-template, /tokenize, /detokenize
    vLLM          /tokenize (texts and messages), /detokenize
    ours          /info (stop ids), /api/show (template, type), /tokenize, /detokenize
    Ollama        /api/show (type, stop texts), /api/chat
    all           /v1/models, /v1/chat/completions with log-probabilities and a bias
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import quote

import msgspec

from convert.verify import probes
from convert.verify.http_json import Api, Refused, open_api
from convert.verify.reader import Reader
from edge.errors import InputError

# The most alternatives that OpenAI's routes and vLLM give by default.
TOP = 20
# Larger than the span of any logits; the largest bias of OpenAI's interface.
_BIAS = 100
# Special tokens that are tried as ends beside those that must be.
_TRIED = 16


class Token(msgspec.Struct):
    """A token of an answer with its log-probability (natural) and the most probable ones in its place.

    logprob: None where the server leaves a token out.
    """

    token: str = ""
    logprob: float | None = None
    id: int | None = None
    bytes: list[int] | None = None
    top_logprobs: list[Token] = []


class Answer(msgspec.Struct):
    """tokens: empty where the server gives no log-probabilities. text: reasoning included.

    prompt_tokens: as the server counted them. ended: at a stop token, not at the limit.
    """

    text: str
    tokens: list[Token]
    prompt_tokens: int | None
    ended: bool


# The JSON of servers, as far as it is read.


class _Named(msgspec.Struct):
    id: str
    owned_by: str = ""


class _Models(msgspec.Struct):
    data: list[_Named]


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None

    def text(self) -> str:
        return (self.reasoning_content or self.reasoning or self.thinking or "") + (self.content or "")


class _Logprobs(msgspec.Struct):
    content: list[Token] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class _Props(msgspec.Struct):
    default_generation_settings: dict[str, Any]
    chat_template: str
    model_ftype: str = ""


class _Info(msgspec.Struct):
    backend: str
    stop_ids: list[int]
    digest: str | None = None


class _Details(msgspec.Struct):
    quantization_level: str = ""


class _Show(msgspec.Struct):
    details: _Details
    template: str = ""
    parameters: str = ""
    model_info: dict[str, Any] = {}


class _Ids(msgspec.Struct):
    tokens: list[int]


class _Text(msgspec.Struct):
    text: str = ""
    content: str = ""
    prompt: str = ""


class _Native(msgspec.Struct):
    tokens: list[int]
    content: str
    stop_type: str = ""
    completion_probabilities: list[Token] = []


class _OllamaChat(msgspec.Struct):
    message: _Message
    done_reason: str = ""
    prompt_eval_count: int | None = None
    logprobs: list[Token] | None = None


class UrlReader:
    """A server with OpenAI's routes, asked what `a` is asked; one that shows more is a subclass.

    a: the model that it should be. path: its URL. kind: the type of its weights, "" where it does not say.
    template: None where it does not show it. shows_ids: whether it tokenizes for others. stop_ids: None where
    they cannot be seen. more_ends: other special tokens that end an answer. digest: of the folder that ours
    serves. top: how many alternatives it names for a token.
    """

    stage: ClassVar[str] = "a server"
    shows_ids: ClassVar[bool] = False
    # Fields that switch off what a server changes by itself, as a penalty of the model's generation config.
    _neutral: ClassVar[dict[str, Any]] = {"presence_penalty": 0, "frequency_penalty": 0}

    def __init__(self, api: Api, model: str, a: Reader) -> None:
        self.path, self.manifest, self.model, self._api, self._a = api.root, None, model, api, a
        self.kind, self.digest = "", ""
        self.template: str | None = None
        self.stop_ids: frozenset[int] | None = None
        self.more_ends: frozenset[int] = frozenset()
        self.top = TOP

    def prompt_ids(self, conversations: Iterable[list[dict[str, str]]]) -> list[list[int]]:
        """Token ids of the prompt for each conversation; where `shows_ids`."""
        return [self._prompt_ids(messages) for messages in conversations]

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        raise NotImplementedError

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens recognised and none added; where `shows_ids`."""
        raise NotImplementedError

    def decode(self, rows: list[list[int]]) -> list[str]:
        """The text of each row of ids; where `shows_ids`."""
        raise NotImplementedError

    def special_tokens(self) -> list[str]:
        """Those of `a`: no server lists its own."""
        return self._a.special_tokens()

    @property
    def runtime(self) -> str:
        return self.stage

    @cached_property
    def _special_ids(self) -> list[int]:
        """The ids of what `a` takes as one token wherever it stands."""
        return [ids[0] for ids in self._a.encode(self.special_tokens()) if len(ids) == 1]

    def _shown(self, rows: list[list[int]]) -> list[list[int]]:
        """`rows` without control tokens: servers write them out."""
        texts = self._a.decode([[token] for token in self._special_ids])
        control = {token for token, text in zip(self._special_ids, texts, strict=True) if not text}
        return [[token for token in ids if token not in control] for ids in rows]

    def answer(self, messages: list[dict[str, str]], count: int) -> Answer:
        """A greedy answer of at most `count` tokens, with log-probabilities where they are given.

        Raises Refused where the server has no such route or no such model.
        """
        # Some give fewer alternatives than others, some none, and refuse a number that is too high.
        for top in [number for number in (TOP, 5, 0) if number <= self.top]:
            try:
                found = self._answer(messages, count, top)
            except Refused:
                if top == 0:
                    raise
            else:
                self.top = top
                return found
        raise AssertionError("the last one is tried without log-probabilities")

    def _answer(self, messages: list[dict[str, str]], count: int, top: int) -> Answer:
        return self._chat(messages, count, {"logprobs": True, "top_logprobs": top} if top else {})

    def _chat(self, messages: list[dict[str, str]], count: int, more: dict[str, Any]) -> Answer:
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": count,
            "temperature": 0,
            "stream": False,
        }
        answer = self._api.ask("/v1/chat/completions", _Completion, body | self._neutral | more)
        if not answer.choices:
            raise Refused(
                f"{self.path}/v1/chat/completions answers without a choice", "look into the server's log"
            )
        choice = answer.choices[0]
        return Answer(
            choice.message.text(),
            (choice.logprobs and choice.logprobs.content) or [],
            answer.usage.prompt_tokens if answer.usage else None,
            choice.finish_reason == "stop",
        )

    def find_stops(self) -> None:
        """Set stop_ids: each of a's, and some of its other special tokens, is made certain by a bias.

        They stay None where the server does not take a bias.
        """
        ordinary = next((ids[0] for ids in self._a.encode(["a", "1", "."]) if len(ids) == 1), None)
        tried = {*self._a.stop_ids, *probes.spread(self._special_ids, _TRIED)}
        with contextlib.suppress(Refused):
            if ordinary is not None and not self._ends_at(ordinary, self._a.decode([[ordinary]])[0]):
                self._ends({token for token in tried if self._ends_at(token)})

    def _ends(self, tokens: set[int]) -> None:
        """The server ends at `tokens`; a special token beyond a's ends is no loss."""
        self.more_ends = frozenset(tokens & {*self._special_ids} - self._a.stop_ids)
        self.stop_ids = frozenset(tokens - self.more_ends)

    def _ends_at(self, token: int, text: str = "") -> bool:
        """Whether `token` ends an answer. Raises Refused unless the answer begins with `text`."""
        answer = self._chat([{"role": "user", "content": "a"}], 2, {"logit_bias": {str(token): _BIAS}})
        if not answer.text.startswith(text):
            raise Refused(f"{self.path} does not honour logit_bias")
        return answer.ended


class LlamaServer(UrlReader):
    """llama.cpp's server."""

    stage = "llama-server"
    shows_ids = True
    _neutral: ClassVar[dict[str, Any]] = UrlReader._neutral | {"repeat_penalty": 1.0}

    def __init__(self, api: Api, model: str, a: Reader, props: _Props) -> None:
        super().__init__(api, model, a)
        self.template = props.chat_template
        # Its long names, as "Q4_K - Medium" and "all F32".
        kind = props.model_ftype.removeprefix("all ")
        self.kind = kind.replace(" - Medium", "_M").replace(" - Small", "_S").replace(" - Large", "_L")

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            prompt = self._api.ask("/apply-template", _Text, {"messages": messages}).prompt
        except Refused:
            # As the reader of a folder does where a template refuses a conversation.
            return []
        return self._ids(prompt, special=True)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._ids(text, special=False) for text in texts]

    def _ids(self, text: str, *, special: bool) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": True}
        return self._api.ask("/tokenize", _Ids, body).tokens

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [self._api.ask("/detokenize", _Text, {"tokens": ids}).content for ids in self._shown(rows)]

    def _answer(self, messages: list[dict[str, str]], count: int, top: int) -> Answer:
        """By its own route, which names every id: both leave out those that end within a character."""
        length = self._chat(messages, 1, {}).prompt_tokens
        body = {"prompt": self._prompt_ids(messages), "n_predict": count, "n_probs": top, "temperature": 0}
        answer = self._api.ask("/completion", _Native, body | {"return_tokens": True} | self._neutral)
        left = answer.completion_probabilities[::-1]
        texts = self._a.decode([answer.tokens[: count + 1] for count in range(len(answer.tokens))])
        tokens = [
            left.pop() if left and left[-1].id == id and not text.endswith("\ufffd") else Token(id=id)
            for id, text in zip(answer.tokens, texts, strict=True)
        ]
        return Answer(answer.content, tokens if top else [], length, answer.stop_type == "eos")


class Vllm(UrlReader):
    stage = "vLLM"
    shows_ids = True
    _neutral: ClassVar[dict[str, Any]] = UrlReader._neutral | {
        "repetition_penalty": 1.0,
        "return_tokens_as_token_ids": True,
    }

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if self._a.thinking in ("on", "off"):
            # The server's default for this is part of a conversation's count of tokens.
            body["chat_template_kwargs"] = {"enable_thinking": self._a.thinking == "on"}
        return self._api.ask("/tokenize", _Ids, body).tokens

    def encode(self, texts: list[str]) -> list[list[int]]:
        body = {"model": self.model, "add_special_tokens": False}
        return [self._api.ask("/tokenize", _Ids, body | {"prompt": text}).tokens for text in texts]

    def decode(self, rows: list[list[int]]) -> list[str]:
        bodies = ({"model": self.model, "tokens": ids} for ids in self._shown(rows))
        return [self._api.ask("/detokenize", _Text, body).prompt for body in bodies]


class Edge(UrlReader):
    """Our own server."""

    stage = "edge serve"
    shows_ids = True

    def __init__(self, api: Api, model: str, a: Reader, info: _Info) -> None:
        super().__init__(api, model, a)
        show = api.ask("/api/show", _Show, {"model": model})
        self.template, self.kind = show.template, show.details.quantization_level
        self.digest = info.digest or ""
        self._ends({*info.stop_ids})

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return self._api.ask("/tokenize", _Ids, {"model": self.model, "messages": messages}).tokens

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [
            self._api.ask("/tokenize", _Ids, {"model": self.model, "text": text}).tokens for text in texts
        ]

    def decode(self, rows: list[list[int]]) -> list[str]:
        bodies = ({"model": self.model, "tokens": ids} for ids in self._shown(rows))
        return [self._api.ask("/detokenize", _Text, body).text for body in bodies]

    def find_stops(self) -> None:
        """Nothing is tried: /info names them."""


class Ollama(UrlReader):
    """Ollama: its template is in a language of its own, and nothing of it tokenizes."""

    stage = "Ollama"

    def __init__(self, api: Api, model: str, a: Reader) -> None:
        super().__init__(api, model, a)
        show = api.ask("/api/show", _Show, {"model": model})
        self.kind = show.details.quantization_level
        lines = [line.split(None, 1) for line in show.parameters.splitlines()]
        stops = [line[1].strip().strip('"') for line in lines if len(line) == 2 and line[0] == "stop"]
        ends = [show.model_info.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        ids = [row[0] for row in a.encode(stops) if len(row) == 1]
        self._ends({*ids, *(end for end in ends if isinstance(end, int))})

    def find_stops(self) -> None:
        """Nothing is tried: it takes no bias. What its Modelfile and the file name is known."""

    def _answer(self, messages: list[dict[str, str]], count: int, top: int) -> Answer:
        options = {"temperature": 0, "num_predict": count, "repeat_penalty": 1.0}
        body = {"model": self.model, "messages": messages, "stream": False, "options": options}
        if top:
            body |= {"logprobs": True, "top_logprobs": top}
        answer = self._api.ask("/api/chat", _OllamaChat, body)
        ended = answer.done_reason == "stop"
        return Answer(answer.message.text(), answer.logprobs or [], answer.prompt_eval_count, ended)


def open_url(url: str, a: Reader, *, model: str = "", key: str = "") -> UrlReader:
    """The server at `url`, by what it answers. model: which of its models; "" for its only one.

    Raises InputError where it serves no such model or is no model server, EdgeError where it does not answer.
    """
    api = open_api(url, key)
    served = api.ask("/v1/models", _Models).data
    model = _choose(api.root, [entry.id for entry in served], model)
    with contextlib.suppress(Refused):
        return LlamaServer(api, model, a, api.ask("/props", _Props))
    with contextlib.suppress(Refused):
        info = api.ask(f"/info?model={quote(model, safe='')}", _Info)
        return Edge(api, model, a, info)
    if any(entry.owned_by == "vllm" for entry in served):
        return Vllm(api, model, a)
    with contextlib.suppress(Refused):
        return Ollama(api, model, a)
    return UrlReader(api, model, a)


def _choose(root: str, names: list[str], wanted: str) -> str:
    # Ollama's names end with a tag.
    for name in (wanted, f"{wanted}:latest"):
        if name in names:
            return name
    listed = ", ".join(names[:20]) or "none"
    if wanted:
        raise InputError(f"{root} serves no model '{wanted}'", f"it serves: {listed}")
    if len(names) != 1:
        raise InputError(f"{root} serves {len(names)} models: {listed}", "name one: --model NAME")
    return names[0]
