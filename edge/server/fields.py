"""Request fields that several routes share, with their bounds, and how they become sampling parameters."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from edge.errors import RequestError
from edge.sampling import Params

MAX_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 2048

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
    logit_bias: dict[str, Bias] | None = None
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


Content = str | list[dict[str, Any]] | None


class Message(BaseModel):
    """One message. content: a text, a list of text parts, or null beside tool calls."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content = None

    def flat(self, index: int) -> dict[str, Any]:
        """The message as chat templates read it, text parts joined."""
        content = self.content
        where = f"messages[{index}].content"
        if content is None:
            if not (self.model_extra or {}).get("tool_calls"):
                raise RequestError(f"{where} is null; only a message with tool_calls may be", param=where)
            content = ""
        if isinstance(content, list):
            for part in content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    kind = part.get("type")
                    raise RequestError(
                        f"{where} has a part of type {kind!r}; this is a text model", param=where
                    )
            content = "".join(part["text"] for part in content)
        return {"role": self.role, "content": content, **(self.model_extra or {})}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


def flat(messages: list[Message]) -> list[dict[str, Any]]:
    return [message.flat(i) for i, message in enumerate(messages)]
