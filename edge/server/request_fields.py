"""Request fields that several API families share: their bounds, and what the engine makes of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge.engine.grammar import Constraint, json_constraint
from edge.engine.sampling import Params
from edge.errors import RequestError
from edge.server.conversation import EFFORTS
from edge.server.tool_dialects import MAX_TOOLS, Tool

MAX_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 2048
MAX_CALLS = 128
MAX_BIASES = 1024
MAX_INPUTS = 2048

# Numbers must be numbers: "0.7" and true are refused, NaN and infinity too.
Temperature = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Floor = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]
Repetition = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TopK = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Seconds = Annotated[float, Field(gt=0.0, le=86400.0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Role = Annotated[str, Field(min_length=1, max_length=64)]
Effort = Literal["none", "minimal", "low", "medium", "high"]

_SAMPLING = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "max_tokens", "min_tokens", "ignore_eos",
    }
)  # fmt: skip


class Closed(BaseModel):
    """An object whose unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Open(BaseModel):
    """An object whose unknown fields are kept, so that they can be refused or passed on by name."""

    model_config = ConfigDict(strict=True, extra="allow")

    def refuse(self, *names: str, neutral: tuple[Any, ...] = (), why: str = "") -> None:
        """Raise RequestError for a field that would change the answer. neutral: values that would not."""
        given = {**vars(self), **(self.model_extra or {})}
        for name in names:
            if given.get(name) and given[name] not in neutral:
                raise RequestError(f"{name} is not supported{why}", code="unsupported", param=name)


class Part(BaseModel):
    """An object whose unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


def sampling(body: BaseModel, **options: Any) -> Params:
    """Sampling parameters from the fields of `body` that are given. options: further ones, and defaults."""
    fields = set(_SAMPLING & type(body).model_fields.keys())
    return Params(**{**options, **body.model_dump(include=fields, exclude_none=True)})


class Sampled(Closed):
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
            if not key.isascii() or not key.isdigit():
                raise RequestError(f"logit_bias has the key '{key}', not a token id", param="logit_bias")
            bias[int(key)] = value
        return bias


def stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


class Thinking(BaseModel):
    """How a reasoning model thinks: Qwen's names, OpenAI's `reasoning_effort`, llama.cpp's format.

    enable_thinking: asks for reasoning, or for none. thinking_budget: tokens of reasoning at most.
    reasoning_format none: the reasoning stays in the content, tags and all.
    """

    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    reasoning_effort: Effort | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

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
        return {"thinking": switch, "budget": budget, "raw": raw, "extra": extra}


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
        arguments = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise RequestError(f"{where}.function.arguments is not JSON: {error}", param=where) from error
        if not isinstance(arguments, dict):
            raise RequestError(f"{where}.function.arguments must be a JSON object", param=where)
        text = json.dumps(arguments, ensure_ascii=False)
        call = {"type": self.type, "function": {"name": self.function.name, "arguments": text}}
        return {"id": self.id, **call} if self.id else call


Content = str | list[dict[str, Any]] | None


class Message(Open):
    """One message. content: a text, a list of text parts, or null beside tool calls."""

    role: Role
    content: Content = None
    tool_calls: Annotated[list[PastCall], Field(max_length=MAX_CALLS)] | None = None

    def flat(self, index: int) -> dict[str, Any]:
        """The message as chat templates read it, text parts joined."""
        where = f"messages[{index}]"
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
    return [message.flat(i) for i, message in enumerate(messages)]


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


def answer_format(wanted: Any, param: str, schema_param: str) -> Constraint | None:
    """The constraint of a format such as {"type": "json_schema", "schema": ...}; None for a text.

    param, schema_param: the fields that errors name. Raises RequestError for an unknown type.
    """
    kind = wanted.get("type") if isinstance(wanted, dict) else wanted
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return json_constraint(True, param)
    if kind == "json_schema" and isinstance(wanted, dict):
        return json_constraint(wanted.get("schema"), schema_param)
    raise RequestError(f"{param} of type {kind!r} is not known", code="unsupported", param=param)


def only_constraint(
    fields: dict[str, tuple[Literal["json_schema", "regex", "lark"], Any]], given: Constraint | None = None
) -> Constraint | None:
    """What the answer must match. Raises RequestError where the request has more than one such field.

    fields: by name, the kind of each and its value or None. given: a constraint from a field of another form.
    """
    constraints = [] if given is None else [given]
    for param, (kind, value) in fields.items():
        if value is not None:
            json_schema = kind == "json_schema"
            constraints.append(
                json_constraint(value, param) if json_schema else Constraint(kind, value, param)
            )
    if len(constraints) > 1:
        first, second = constraints[0].param, constraints[1].param
        raise RequestError(f"give one of {first} and {second}", param=second)
    return constraints[0] if constraints else None
