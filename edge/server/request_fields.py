"""Request fields that several routes share, with their bounds, and how they become sampling parameters."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge.engine.sampling import Params
from edge.errors import RequestError
from edge.server.conversation import EFFORTS
from edge.server.tool_dialects import Tool

MAX_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 2048
MAX_CALLS = 128
MAX_BIASES = 1024

# Numbers are taken as numbers only: "0.7" and true are refused, NaN and infinity too.
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
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOPS)]


class Sampled(BaseModel):
    """What every generating route understands. Fields beyond OpenAI's keep transformers' or vLLM's names."""

    model_config = ConfigDict(strict=True, extra="forbid")

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
    stop_token_ids: TokenIds | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    speculate: bool | None = None
    timeout: Seconds | None = None
    stream: bool | None = None

    def params(self, *, temperature: float, max_tokens: int | None, logprobs: int | None = None) -> Params:
        """Sampling parameters; the arguments are what holds where the request says nothing."""
        given: dict[str, Any] = {
            name: value
            for name in (
                "top_p",
                "top_k",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
                "seed",
                "min_tokens",
                "ignore_eos",
            )
            if (value := getattr(self, name)) is not None
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Params(
            temperature=temperature if self.temperature is None else self.temperature,
            max_tokens=max_tokens if self.max_tokens is None else self.max_tokens,
            logit_bias=self._bias(),
            stop=stop,
            stop_ids=self.stop_token_ids or [],
            logprobs=logprobs,
            **given,
        )

    def run(self) -> dict[str, Any]:
        """How the engine is to treat the request: keywords of `EngineProcess.submit`."""
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


class Thinking(BaseModel):
    """How a reasoning model is to think: Qwen's names, OpenAI's `reasoning_effort`, llama.cpp's format.

    enable_thinking: asks for a thought, or for none. thinking_budget: tokens that it may have.
    reasoning_format none: the thought stays in the content, tags and all.
    """

    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def thinking(self) -> dict[str, Any]:
        """Keywords of `Conversation`. Raises RequestError where two fields contradict."""
        extra = dict(self.chat_template_kwargs or {})
        switch = self.enable_thinking
        if (given := extra.pop("enable_thinking", None)) is not None:
            if not isinstance(given, bool):
                raise RequestError("enable_thinking must be true or false", param="chat_template_kwargs")
            switch = given if switch is None else switch
        budget = self.thinking_budget
        if self.reasoning_effort == "none":
            switch = False if switch is None else switch
        elif self.reasoning_effort is not None and budget is None:
            budget = EFFORTS[self.reasoning_effort]
        raw = self.reasoning_format == "none"
        return {"thinking": switch, "budget": budget, "raw": raw, "extra": extra}


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    arguments: str | dict[str, Any] = "{}"


class PastCall(BaseModel):
    """A tool call of an earlier turn. arguments: a JSON object, or its text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"

    def flat(self, where: str) -> dict[str, Any]:
        """As templates read it, the arguments as JSON text. Raises RequestError where they are no object."""
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


class Message(BaseModel):
    """One message. content: a text, a list of text parts, or null beside tool calls."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
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
        flat = {**(self.model_extra or {}), "role": role, "content": joined(self.content, f"{where}.content")}
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            flat["tool_calls"] = [call.flat(f"{where}.tool_calls[{i}]") for i, call in calls]
        return flat


def joined(content: Content, where: str) -> str:
    """The text of a content. Raises RequestError for a part that is no text."""
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where} has a part of type {part.get('type')!r}; this is a text model", param=where
            )
    return "".join(part["text"] for part in content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


def flat(messages: list[Message]) -> list[dict[str, Any]]:
    return [message.flat(i) for i, message in enumerate(messages)]


class Function(BaseModel):
    """A tool's definition. parameters: the JSON schema of its arguments."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        given = {} if self.parameters is None else {"parameters": self.parameters}
        return Tool(self.name, self.description or "", strict=bool(self.strict), **given)
