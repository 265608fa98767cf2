"""Chat templates, rendered as transformers renders them, in a sandbox; and the split of a thought.

A template is untrusted text from a model file: it runs in jinja2's immutable sandbox, with the functions that
templates use. There is no fallback template: a model without one can only be asked `raw`.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge.errors import InputError, RequestError

THINK, THINK_END = "<think>", "</think>"
_LONGEST_PROMPT = 8 * 2**20


class _Raised(Exception):
    """What a template said through `raise_exception`."""


def _raise(message: str) -> None:
    raise _Raised(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML, which no chat template wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


class ChatTemplate:
    """A compiled chat template. Raises InputError where `source` is no valid template."""

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(
                f"the model's chat template is not valid: {error}", "ask with raw: true"
            ) from error

    def render(self, messages: list[dict[str, Any]], *, thinking: str | None = None, **extra: Any) -> str:
        """The prompt for `messages`, with the beginning of the assistant's turn.

        thinking: the artefact's mode, "off" closes an empty thought. extra: the template's own variables
        (tools, enable_thinking, ...). Raises RequestError (400) with the template's own words.
        """
        if thinking in ("on", "off"):
            extra.setdefault("enable_thinking", thinking == "on")
        try:
            prompt = self._template.render(
                messages=messages, add_generation_prompt=True, **self._tokens, **extra
            )
        except _Raised as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}",
                code="chat_template_error",
                param="messages",
            ) from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            OverflowError,
        ) as error:
            raise RequestError(
                f"the model's chat template cannot be applied to these messages: {error}",
                code="chat_template_error",
                param="messages",
            ) from error
        if len(prompt) > _LONGEST_PROMPT:
            raise RequestError("the rendered prompt is too long", code="prompt_too_long", param="messages")
        if thinking == "off" and opens_thought(prompt):
            # The template opens a thought whatever it is told; the model was trained with an empty one.
            prompt = prompt.rstrip() + f"\n\n{THINK_END}\n\n"
        return prompt


def opens_thought(prompt: str) -> bool:
    """Whether the prompt ends inside a thought that the model is to finish."""
    return prompt.rstrip().endswith(THINK)


class ThoughtSplit:
    """Parts a stream of text into (thought, answer), whoever opened the thought.

    inside: the template has opened it already. Joined over all pushes and `finish`, `a</think>b` gives
    ("a", "b"). Blank space around the tags belongs to neither.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._held = ""
        self._begun = inside
        self._strip = inside

    def push(self, text: str) -> tuple[str, str]:
        """What is certain after `text`: (more of the thought, more of the answer)."""
        self._held += text
        thought = answer = ""
        while True:
            if not self._begun:
                bare = self._held.lstrip()
                if bare.startswith(THINK):
                    self._held = bare[len(THINK) :]
                    self._begun = self._inside = self._strip = True
                    continue
                if THINK.startswith(bare):
                    return thought, answer
                self._begun = True
                continue
            if self._strip:
                self._held = self._held.lstrip()
                if not self._held:
                    return thought, answer
                self._strip = False
            if not self._inside:
                answer, self._held = answer + self._held, ""
                return thought, answer
            at = self._held.find(THINK_END)
            if at < 0:
                # A tag that may have begun, and blank space that may stand before it, are held back.
                keep = len(self._held) - max(
                    (n for n in range(len(THINK_END)) if self._held.endswith(THINK_END[:n])), default=0
                )
                keep = len(self._held[:keep].rstrip())
                thought, self._held = thought + self._held[:keep], self._held[keep:]
                return thought, answer
            thought += self._held[:at].rstrip()
            self._held = self._held[at + len(THINK_END) :]
            self._inside, self._strip = False, True

    def finish(self) -> tuple[str, str]:
        """What was held back when the stream ended."""
        held, self._held = self._held, ""
        return (held, "") if self._inside else ("", held)
