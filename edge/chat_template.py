"""Chat templates, rendered as transformers renders them, in a process of its own (`edge.rendering`).

There is no fallback template: a model without one can only be asked with `raw`.
"""

from __future__ import annotations

from typing import Any

from edge.reasoning import THINK_END, opens_reasoning
from edge.rendering.client import RENDERER


class ChatTemplate:
    """A chat template. variables: the names it reads. Raises InputError for an invalid one.

    file: where it stands, for errors.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", file: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._file = file
        self.variables = RENDERER.variables(source, file)

    def render(self, messages: list[dict[str, Any]], *, thinking: str | None = None, **extra: Any) -> str:
        """The prompt for `messages`, with the beginning of the assistant's turn.

        thinking: the mode; "off" opens and closes empty reasoning where the template opens any. extra: the
        template's own variables (tools, enable_thinking, ...). Raises RequestError (400) with the template's
        own message, or the bound that it crosses.
        """
        if thinking in ("on", "off"):
            extra.setdefault("enable_thinking", thinking == "on")
        context = {**self._tokens, "messages": messages, "add_generation_prompt": True, **extra}
        prompt = RENDERER.render(self.source, context, self._file)
        if thinking == "off" and opens_reasoning(prompt):
            # The template opens reasoning in any mode; without, the model was trained on empty reasoning.
            prompt = prompt.rstrip() + f"\n\n{THINK_END}\n\n"
        return prompt
