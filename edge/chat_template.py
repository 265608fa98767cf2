"""Chat templates, rendered as transformers renders them, in a sandbox.

A template is untrusted text from a model file: it runs in jinja2's immutable sandbox, with the functions that
templates use and bounds on time and size. There is no fallback template: a model without one can only be
asked with `raw`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge.errors import InputError, RequestError
from edge.reasoning import THINK_END, opens_reasoning

_LONGEST_PROMPT = 8 * 2**20
_LARGEST_EXPONENT = 64
# A prompt is rendered on the thread that answers HTTP; real templates take milliseconds.
RENDER_S = 2.0
_TICK = "_edge_tick"
_TOO_LARGE = "prompt_too_long"
# What a template may raise that does not suit the messages.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def _raise(message: str) -> None:
    raise _refused(f"refuses these messages: {message}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML, which no chat template wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _small(value: Any, bound: int) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= bound


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with a bound on the results of multiplications and powers."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_small(left, 2**64) and _small(right, _LARGEST_EXPONENT)):
            raise SecurityError("a power of large numbers")
        for items, times in ((left, right), (right, left)):
            if (
                isinstance(items, Sequence)
                and isinstance(times, int)
                and len(items) * times > _LONGEST_PROMPT
            ):
                raise SecurityError(f"a repetition of {times} times")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled chat template. variables: the names it reads. Raises InputError for an invalid one."""

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            {"raise_exception": _raise, "strftime_now": _strftime_now, _TICK: self._tick}
        )
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._deadline = 0.0
        try:
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            _watch_loops(tree)
            code = environment.compile(tree)
            self._template = environment.template_class.from_code(environment, code, environment.globals)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(
                f"the model's chat template is not valid: {error}", "ask with raw: true"
            ) from error

    def render(self, messages: list[dict[str, Any]], *, thinking: str | None = None, **extra: Any) -> str:
        """The prompt for `messages`, with the beginning of the assistant's turn.

        thinking: the mode; "off" opens and closes empty reasoning where the template opens any. extra: the
        template's own variables (tools, enable_thinking, ...). Raises RequestError (400) with the template's
        own message.
        """
        if thinking in ("on", "off"):
            extra.setdefault("enable_thinking", thinking == "on")
        try:
            prompt = self._render({"messages": messages, "add_generation_prompt": True, **extra})
        except _FAILURES as error:
            raise _refused(f"cannot be applied to these messages: {error}") from error
        if thinking == "off" and opens_reasoning(prompt):
            # The template opens reasoning in any mode; without, the model was trained on empty reasoning.
            prompt = prompt.rstrip() + f"\n\n{THINK_END}\n\n"
        return prompt

    def _render(self, variables: dict[str, Any]) -> str:
        self._deadline = time.monotonic() + RENDER_S
        parts, length = [], 0
        for part in self._template.generate(**self._tokens, **variables):
            length += len(part)
            if length > _LONGEST_PROMPT:
                raise _refused(
                    f"makes a prompt of more than {_LONGEST_PROMPT} characters of these messages", _TOO_LARGE
                )
            parts.append(part)
        return "".join(parts)

    def _tick(self) -> str:
        if time.monotonic() > self._deadline:
            raise _refused(f"takes more than {RENDER_S:g} s for these messages", _TOO_LARGE)
        return ""


def _watch_loops(tree: nodes.Template) -> None:
    """Check the time in every iteration of a loop and every call of a macro."""
    assert tree.environment is not None
    watched: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
    for node in watched:
        call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        tick = nodes.Output([call], lineno=node.lineno)
        node.body.insert(0, tick.set_environment(tree.environment))


def _refused(why: str, code: str = "chat_template_error") -> RequestError:
    return RequestError(f"the model's chat template {why}", code=code, param="messages")
