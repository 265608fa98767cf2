"""Chat templates, rendered as transformers renders them, in a process of its own (`edge.rendering`).

There is no fallback template: a model without one can only be asked with `raw`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from edge.errors import RequestError
from edge.prompt import ANSWERS, AddedTokens, Marks, Prompt
from edge.reasoning import THINK_END, opens_reasoning
from edge.rendering.client import RENDERER

# Templates write a role as it is given, into the mark of a turn or beside it.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What the mark of a turn looks like that no flag tells from other tokens.
_TURN = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)


class ChatTemplate:
    """A chat template. variables: the names it reads. Raises InputError for an invalid one.

    tokens: those that the tokenizer finds in a text; without any, no text of a user is cut. file: where the
    template stands, for errors.
    """

    def __init__(
        self, source: str, *, tokens: AddedTokens, bos: str = "", eos: str = "", file: str = ""
    ) -> None:
        self.source = source
        self.tokens = tokens
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._file = file
        self.variables = RENDERER.variables(source, file)

    def render(self, messages: list[dict[str, Any]], *, thinking: str | None = None, **extra: Any) -> Prompt:
        """The prompt for `messages`, with the beginning of the assistant's turn.

        Only what the template wrote is a mark in it. thinking: the mode; "off" opens and closes empty
        reasoning where the template opens any. extra: the template's own variables (tools, enable_thinking,
        ...). Raises RequestError (400) with the template's own message, or the bound that it crosses, and for
        a role outside ROLES.
        """
        for number, message in enumerate(messages):
            if (role := message.get("role")) not in ROLES:
                raise RequestError(
                    f"messages[{number}] has the role {str(role)[:60]!r}; known: {', '.join(ROLES)}",
                    code="unknown_role",
                    param=f"messages[{number}].role",
                )
        if thinking in ("on", "off"):
            extra.setdefault("enable_thinking", thinking == "on")
        try:
            messages, extra, cut = self._marks.cut(messages, extra)
        except RecursionError as error:
            raise RequestError("the messages are nested too deeply", param="messages") from error
        prompt = self._marks.prompt(self._render(messages, extra, cut), cut)
        if thinking == "off" and opens_reasoning(prompt.text):
            # The template opens reasoning in any mode; without, the model was trained on empty reasoning.
            prompt = Prompt(prompt.text.rstrip() + f"\n\n{THINK_END}\n\n", prompt.cuts)
        return prompt

    def answer(self, text: str, tail: str = "") -> Prompt:
        """An assistant's text as a template would write it, and `tail`, in which marks count."""
        [message], _, cut = self._marks.cut([{"role": "assistant", "content": text}])
        return self._marks.prompt(message["content"] + tail, cut)

    @functools.cached_property
    def _marks(self) -> Marks:
        """Control tokens, and other tokens by which the template begins or ends a turn."""
        marks = {*self.tokens.special}
        # Others are words or white space: tokens of any text.
        others = {text for text in self.tokens.others if _TURN.fullmatch(text)} - ANSWERS
        if others:
            written = self._turns() + "".join(self._tokens.values())
            before, behind = self._tool_turn()
            marks |= {text for text in others if text in written or (text in behind and text not in before)}
        return Marks(marks, RENDERER.literals(self.source, self._file))

    def _turns(self) -> str:
        """What the template makes of a short conversation; some refuse a system's message."""
        turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
        for messages in (turns, turns[1:], turns[1:2]):
            try:
                return self._render(messages, {})
            except RequestError:
                continue
        return self.source

    def _tool_turn(self) -> tuple[str, str]:
        """What the template makes of a tool's call, and of the call and its result; "" where it refuses."""
        call = {"type": "function", "function": {"name": "x", "arguments": {}}}
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "x"},
        ]
        extra = {"add_generation_prompt": False}
        try:
            return self._render(turns[:2], extra), self._render(turns, extra)
        except RequestError:
            return "", ""

    def _render(self, messages: list[dict[str, Any]], extra: dict[str, Any], cut: str = "") -> str:
        context = {**self._tokens, "messages": messages, "add_generation_prompt": True, **extra}
        return RENDERER.render(self.source, context, self._file, cut=cut)
