"""Chat templates that a file may bring: each renders, or is refused, in bounded time and length."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from edge.errors import EdgeError
from edge.rendering.client import Renderer
from edge.rendering.sandbox import LONGEST
from tests.fuzz import mutate
from tests.fuzz.runner import sentences

Draw = Callable[[Random], Any]
Check = Callable[[Any], None]
# A second for the template, and what a new process for the next takes on a busy machine.
MOST_S = 8.0
_NUMBERS = [0, 1, -1, 3, 1000, 10**6, 10**8, 2**40, 2**70]
_ATOMS = [
    "messages", "messages[0].content", "'ab'", "''", "[1, 2]", "{'a': 'b'}", "none", "x", "ns.x",
    "bos_token", "messages[-1]", "loop", "self", "''.__class__", "messages.append", "range", "cycler",
    "lipsum", "namespace",
]  # fmt: skip
_FILTERS = [
    "center(N)", "replace('a', E)", "replace('', E)", "join(E)", "tojson(indent=N)", "indent(N)",
    "wordwrap(N)", "format(E)", "truncate(N)", "batch(N)", "batch(N, E)", "slice(N)", "list", "string",
    "upper", "trim", "sort",
    "map('string')", "map('center', N)", "length", "urlize", "xmlattr", "pprint", "tojson", "first", "unique",
    "sum", "round(N)", "groupby('role')", "dictsort", "items", "reverse", "escape", "filesizeformat",
]  # fmt: skip


def expression(rng: Random, depth: int = 4) -> str:
    how = rng.randrange(9 if depth else 3)
    number = str(rng.choice(_NUMBERS))
    if how == 0:
        return number
    if how == 1:
        return rng.choice(_ATOMS)
    if how == 2:
        return rng.choice(["'%Nd'", "'%.Nf'", "'{:N}'", "range(N)", "'%(a)Ns'"]).replace("N", number)
    inner = expression(rng, depth - 1)
    if how < 6:
        filtered = rng.choice(_FILTERS).replace("N", number).replace("E", expression(rng, 1))
        return f"({inner})|{filtered}"
    if how == 6:
        method = rng.choice(["ljust(N)", "zfill(N)", "format(E)", "replace('a', E)", "join(E)", "split(E)",
                             "expandtabs(N)", "encode()", "translate(E)", "append(E)"])  # fmt: skip
        return f"({inner}).{method.replace('N', number).replace('E', expression(rng, 1))}"
    sign = rng.choice(["~", "*", "+", "**", "%", "//", "in", "<", "and"])
    return f"({inner} {sign} {expression(rng, depth - 1)})"


def statement(rng: Random, depth: int = 3) -> str:
    inner = statement(rng, depth - 1) if depth else "{{ " + expression(rng) + " }}"
    return rng.choice(
        [
            "{{ " + expression(rng) + " }}",
            "{% set x = " + expression(rng) + " %}" + inner,
            "{% for x in " + expression(rng) + " %}" + inner + "{% endfor %}",
            "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "{% macro m(a) %}" + inner + "{{ m(a) }}{% endmacro %}{{ m(1) }}",
            "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
            "{% if " + expression(rng, 2) + " %}" + inner + "{% endif %}",
            "{% filter " + rng.choice(_FILTERS).replace("N", "9999999").replace("E", "'a'") + " %}"
            + inner + "{% endfilter %}",
            "{{ raise_exception(" + expression(rng, 2) + ") }}" if rng.random() < 0.1 else inner,
        ]
    )  # fmt: skip


@contextlib.contextmanager
def _process_kept(renderer: Renderer) -> Iterator[None]:
    """What is refused for another reason than its time leaves the process as it was."""
    before = renderer.pid
    try:
        yield
    except EdgeError as error:
        assert renderer.pid == before or "more than" in error.message, error
        raise


@contextlib.contextmanager
def templates(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """Templates of every operation that makes a text longer, over messages of any kind."""
    renderer = Renderer()
    renderer.start()

    def draw(rng: Random) -> tuple[str, Any]:
        source = "{% set ns = namespace(x='ab') %}" + "".join(
            statement(rng) for _ in range(rng.randint(1, 3))
        )
        if rng.random() < 0.1:
            source = mutate.data(rng, source.encode()).decode("utf-8", "replace")
        messages = [{"role": "user", "content": rng.choice(mutate.TEXTS)}]
        return source, mutate.inside(rng, messages) if rng.random() < 0.2 else messages

    def check(given: tuple[str, Any]) -> None:
        source, messages = given
        began = time.monotonic()
        with sentences(), _process_kept(renderer):
            text = renderer.render(source, {"messages": messages, "bos_token": "<s>"})
            assert len(text) <= LONGEST
        assert time.monotonic() - began < MOST_S
        if renderer.pid is None:
            assert renderer.render("{{ x }}", {"x": "ok"}) == "ok"

    try:
        yield draw, check
        assert renderer.render("{{ x }}", {"x": "ok"}) == "ok"
    finally:
        renderer.close()
