"""Request fields that several API families share: their bounds, and what the engine makes of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from edge.engine.grammar import Constraint, json_constraint
from edge.engine.sampling import Params
from edge.errors import RequestError
from edge.server.conversation import EFFORTS
from edge.server.error_body import reason
from edge.server.field_names import resolved
from edge.server.tool_dialects import MAX_TOOLS, Tool

MAX_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 2048
MAX_CALLS = 128
MAX_BIASES = 1024
MAX_INPUTS = 2048
# Token ids are 32-bit numbers in every backend; the engine refuses those beyond a model's own vocabulary.
MAX_ID = 2**31 - 1
MAX_LOGPROBS = 20
# A grammar is translated on the thread that answers HTTP, at 4 ms for a thousand characters.
MAX_GBNF = 16_384


def _unbounded(number: int) -> BeforeValidator:
    """Reads the -1 of many clients, "no bound", as `number`."""
    return BeforeValidator(lambda value: number if type(value) is int and value == -1 else value)


# Numbers must be numbers: "0.7" and true are refused, NaN and infinity too.
Temperature = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Floor = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]
Repetition = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS), _unbounded(MAX_TOKENS)]
TopK = Annotated[int, Field(ge=0, le=MAX_TOKENS), _unbounded(0)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Seconds = Annotated[float, Field(gt=0.0, le=86400.0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
Effort = Literal["none", "minimal", "low", "medium", "high"]

_SAMPLING = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "max_tokens", "min_tokens", "ignore_eos",
    }
)  # fmt: skip


class Body(BaseModel):
    """The body of a request. Fields of other names are looked up in edge.server.field_names.

    What could change the answer and is not supported is refused, hints are ignored. `ignored` names the rest.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _by_our_names(cls, given: Any) -> Any:
        return resolved(given, cls.model_fields) if isinstance(given, dict) else given

    @property
    def ignored(self) -> list[str]:
        """The fields that nothing here knows."""
        return sorted(self.model_extra or {})


class Closed(Body):
    """A body whose unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Part(BaseModel):
    """An object within a body. Unknown fields are ignored, and null means absent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


def sampling(body: BaseModel, **options: Any) -> Params:
    """Sampling parameters from the fields of `body` that are given. options: further ones, and defaults."""
    fields = set(_SAMPLING & type(body).model_fields.keys())
    return Params(**{**options, **body.model_dump(include=fields, exclude_none=True)})


class Sampled(Body):
    """What every generating route understands. Fields beyond OpenAI's keep transformers' or vLLM's names."""

    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Floor | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    speculate: bool | None = None
    timeout: Seconds | None = None
    stream: bool | None = None

    def params(self, *, temperature: float, max_tokens: int | None, logprobs: int | None = None) -> Params:
        """Sampling parameters; the arguments hold where the request says nothing."""
        return sampling(
            self,
            temperature=temperature,
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias=self._bias(),
            stop=stops(self.stop),
            stop_ids=self.stop_token_ids or [],
        )

    def run(self) -> dict[str, Any]:
        """Keywords of `EngineProcess.submit`: how the engine treats the request."""
        return {
            "reuse": self.cache_prompt is not False,
            "speculate": self.speculate is not False,
            "timeout_s": self.timeout,
        }

    def _bias(self) -> dict[int, float]:
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) <= len(str(MAX_ID)) and int(key) <= MAX_ID):
                raise RequestError(f"logit_bias has the key '{key[:40]}', not a token id", param="logit_bias")
            bias[int(key)] = value
        return bias


def stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


class Thinking(BaseModel):
    """How a reasoning model thinks: Qwen's names, OpenAI's `reasoning_effort`, llama.cpp's format.

    enable_thinking: asks for reasoning, or for none. thinking_budget: tokens of reasoning at most.
    reasoning_format none: the reasoning stays in the content, tags and all. continue_final_message: whether a
    last message of the assistant is continued, as it is by default; add_generation_prompt: the opposite.
    """

    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    reasoning_effort: Effort | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def thinking(self) -> dict[str, Any]:
        """Keywords of `Conversation`. Raises RequestError for a template variable of the wrong type."""
        extra = dict(self.chat_template_kwargs or {})
        switch = self.enable_thinking
        variable = extra.pop("enable_thinking", None)
        if variable is not None and not isinstance(variable, bool):
            raise RequestError("enable_thinking must be true or false", param="chat_template_kwargs")
        if switch is None:
            switch = False if variable is None and self.reasoning_effort == "none" else variable
        budget = self.thinking_budget
        if budget is None and self.reasoning_effort is not None:
            budget = EFFORTS.get(self.reasoning_effort)
        raw = self.reasoning_format == "none"
        prefill = self.continue_final_message
        if self.add_generation_prompt is not None:
            if prefill is self.add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt are opposites",
                    param="add_generation_prompt",
                )
            prefill = not self.add_generation_prompt
        return {"thinking": switch, "budget": budget, "raw": raw, "extra": extra, "prefill": prefill}


class CalledFunction(Part):
    name: Name
    arguments: str | dict[str, Any] = "{}"


class PastCall(Part):
    """A tool call of an earlier message. arguments: a JSON object, or its text."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"

    def flat(self, where: str) -> dict[str, Any]:
        """The call as chat templates read it. Raises RequestError where the arguments are no JSON object."""
        arguments: Any = self.function.arguments
        try:
            arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
            text = json.dumps(arguments, ensure_ascii=False)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}.function.arguments is not JSON: {error}", param=where) from error
        if not isinstance(arguments, dict):
            raise RequestError(f"{where}.function.arguments must be a JSON object", param=where)
        call = {"type": self.type, "function": {"name": self.function.name, "arguments": text}}
        return {"id": self.id, **call} if self.id else call


Content = str | list[dict[str, Any]] | None


class Message(BaseModel):
    """One message. content: a text, a list of text parts, or null beside tool calls.

    Further fields are the chat template's to read.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    role: Role
    content: Content = None
    tool_calls: Annotated[list[PastCall], Field(max_length=MAX_CALLS)] | None = None

    def flat(self, where: str) -> dict[str, Any]:
        """The message as chat templates read it, text parts joined. where: the field that errors name."""
        if self.content is None and not self.tool_calls:
            raise RequestError(
                f"{where}.content is null; only a message with tool_calls may be", param=f"{where}.content"
            )
        # OpenAI calls the system's role so for its newer models; no template knows the name.
        role = "system" if self.role == "developer" else self.role
        text = text_of(self.content or "", f"{where}.content")
        flat = {**(self.model_extra or {}), "role": role, "content": text}
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            flat["tool_calls"] = [call.flat(f"{where}.tool_calls[{i}]") for i, call in calls]
        return flat


def text_of(content: Any, where: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """The text of a content: a string or a list of text parts. Raises RequestError for anything else.

    kinds: the types of part that hold text.
    """
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else [None]:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind not in kinds or not isinstance(text, str):
            raise RequestError(f"{where} has a part of type {kind!r}; this is a text model", param=where)
        texts.append(text)
    return "".join(texts)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


def flat(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates read them."""
    return [message.flat(f"messages[{i}]") for i, message in enumerate(messages)]


def flat_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A message that another API's was translated to, as chat templates read it.

    where: the field that errors name. Raises RequestError for a value of the wrong form.
    """
    try:
        return Message(**row).flat(where)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([where, *map(str, first["loc"])])
        raise RequestError(f"{field}: {reason(first)}", code=first["type"], param=field) from error


class Function(Part):
    """A tool's definition. parameters: the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        schema = {} if self.parameters is None else {"parameters": self.parameters}
        return Tool(self.name, self.description or "", strict=bool(self.strict), **schema)


class FunctionTool(Part):
    type: Literal["function"]
    function: Function


FunctionTools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]


def constraint_of(kind: str, value: Any, param: str) -> Constraint:
    """What an answer must match. param: the field that errors name. Raises RequestError for a wrong value.

    kind: json (a schema, its text, or true for any object), regex, grammar (Lark, or llama.cpp's GBNF), or
    choice (a list of texts).
    """
    if kind == "json":
        try:
            return json_constraint(json.loads(value) if isinstance(value, str) else value, param)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param} is not JSON: {error}", param=param) from error
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise RequestError(f"{param} must be a list of texts", param=param)
        value = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a text", param=param)
    if kind == "grammar" and "::=" in value:
        value = _as_lark(value, param)
    return Constraint("regex" if kind == "regex" else "lark", value, param)


def _as_lark(gbnf: str, param: str) -> str:
    """A grammar in llama.cpp's form (`root ::= ...`), translated by llguidance."""
    try:
        from llguidance.gbnf_to_lark import any_to_lark
    except ImportError:
        return gbnf  # the engine says which package is missing
    if len(gbnf) > MAX_GBNF:
        raise RequestError(
            f"{param} has {len(gbnf)} characters, {MAX_GBNF} are the limit in this form",
            code="invalid_grammar",
            param=param,
        )
    try:
        return str(any_to_lark(gbnf))
    except Exception as error:  # the translator raises Exception itself
        raise RequestError(
            f"the grammar cannot be honoured: {error}"[:500], code="invalid_grammar", param=param
        ) from error


# The kinds of a response_format, as `constraint_of` has them.
_FORMATS = {
    "json_object": "json",
    "json_schema": "json",
    "json": "json",
    "regex": "regex",
    "grammar": "grammar",
}


def answer_format(wanted: Any, param: str, schema_param: str) -> Constraint | None:
    """The constraint of a format such as {"type": "json_schema", "schema": ...}; None for a text.

    param, schema_param: the fields that errors name. Raises RequestError for an unknown type.
    """
    kind = wanted.get("type") if isinstance(wanted, dict) else wanted
    if wanted is None or kind == "text":
        return None
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise RequestError(f"{param} of type {kind!r} is not known", code="unsupported", param=param)
    names = ("schema", "value", _FORMATS[kind], "pattern")
    fields = wanted if isinstance(wanted, dict) else {}
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if kind == "json_object" and value is None:
        return constraint_of("json", True, param)
    return constraint_of(_FORMATS[kind], value, schema_param)


# The parts of vLLM's structured_outputs, as `constraint_of` has them.
_KINDS = {"json": "json", "json_object": "json", "regex": "regex", "grammar": "grammar", "choice": "choice"}
# What an answer must match, by the names of several servers, and the kind of each.
_CONSTRAINTS = {
    "guided_json": "json", "json_schema": "json", "guided_regex": "regex", "regex": "regex",
    "guided_grammar": "grammar", "grammar": "grammar", "ebnf": "grammar", "guided_choice": "choice",
}  # fmt: skip


class Constrained(Body):
    """What an answer must match, in the words of OpenAI, vLLM, SGLang, TGI, llama.cpp and Ollama."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    json_schema: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    regex: str | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    ebnf: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=256)] | None = None

    def constraint(self) -> Constraint | None:
        """What the answer must match. Raises RequestError for an unknown format, or for several."""
        wanted = self.response_format
        if wanted and isinstance(wanted.get("json_schema"), dict):
            wanted = {**wanted["json_schema"], "type": wanted.get("type")}
        found = [answer_format(wanted or None, "response_format", "response_format.json_schema.schema")]
        for name, value in resolved(self.structured_outputs or {}, _KINDS).items():
            if name not in _KINDS:
                where = "structured_outputs"
                raise RequestError(f"{where}.{name} is not supported", code="unsupported", param=where)
            if value not in (False, ""):
                found.append(constraint_of(_KINDS[name], value, f"structured_outputs.{name}"))
        if self.format:
            found.append(constraint_of("json", True if self.format == "json" else self.format, "format"))
        for name, kind in _CONSTRAINTS.items():
            if (value := getattr(self, name)) is not None:
                found.append(constraint_of(kind, value, name))
        given = [constraint for constraint in found if constraint is not None]
        if len(given) > 1:
            first, second = given[0].param, given[1].param
            raise RequestError(f"give one of {first} and {second}", param=second)
        return given[0] if given else None
