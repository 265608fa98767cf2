"""Schemas, regular expressions and grammars: refused, or every answer under their masks matches."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import jsonschema

from edge.backends.fake import FakeBackend
from edge.engine.grammar import Constraint, Grammars, json_constraint
from edge.errors import RequestError
from edge.server.request_fields import constraint_of
from tests.fuzz import mutate

Draw = Callable[[Random], Any]
Check = Callable[[Any], None]
# Answers that are longer are left where they are.
MOST_BYTES = 400
_END = 256
_FORMATS = ["date", "time", "date-time", "email", "uuid", "ipv4", "uri", "no-such-format"]
# Within what floating point holds, at its edge and beyond it.
_NUMBERS = [
    -5, 0, 1, 3, 10, 2.5, 0.1, 1e30, 1e300, 1e-320, -0.0, 0.30000000000000004, 0.9697965044964699,
    *(sign * (2**power + off) for sign in (1, -1) for power in (53, 55, 63, 64) for off in (-1, 0, 1, 2)),
]  # fmt: skip
_PATTERNS = ["^a+$", "[a-c]{2}", "^(x|yy)*z$", r"^\d{1,3}$", "(", "(?=a)", "^$", r"\p{L}", "a{1000,2000}"]


def schema(rng: Random, depth: int = 3) -> Any:
    """A JSON schema, in most places a right one."""
    if rng.random() < 0.03:
        return mutate.value(rng, 2)
    small = rng.choice((0, 1, 2, 3, 10))
    kind = rng.randrange(10 if depth else 5)
    if kind == 0:
        limits = rng.choice(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
        number = rng.choice(_NUMBERS)
        return {"type": rng.choice(["integer", "number"]), **({limits: number} if rng.random() < 0.7 else {})}
    if kind == 1:
        more = rng.choice([{"maxLength": small}, {"minLength": small}, {"pattern": rng.choice(_PATTERNS)},
                           {"format": rng.choice(_FORMATS)}, {}])  # fmt: skip
        return {"type": "string", **more}
    if kind == 2:
        return rng.choice([{"type": "boolean"}, {"type": "null"}, {}, True, {"type": ["string", "null"]}])
    if kind == 3:
        return {
            "enum": [
                rng.choice((rng.choice(_NUMBERS), "a", None, [1], {"a": "你"}, True))
                for _ in range(1 + small)
            ]
        }
    if kind == 4:
        return {"const": rng.choice((rng.choice(_NUMBERS), 'a\n"', None, [], {"b": [1]}))}
    if kind == 5:
        more = rng.choice(
            [{"minItems": small}, {"maxItems": small}, {"uniqueItems": True}, {"contains": {}}, {}]
        )
        return {"type": "array", "items": schema(rng, depth - 1), **more}
    if kind == 6:
        return {
            rng.choice(["anyOf", "anyOf", "oneOf", "allOf"]): [
                schema(rng, depth - 1) for _ in range(rng.randint(1, 3))
            ]
        }
    if kind == 7:
        return (
            {"not": schema(rng, depth - 1)}
            if rng.random() < 0.3
            else {"$ref": rng.choice(["#", "#/$defs/a", "x"])}
        )
    names = rng.sample(["a", "b", "c", "é", "a b", "$ref"], rng.randrange(4))
    more = {"required": rng.sample(names, rng.randint(0, len(names)))} if rng.random() < 0.6 else {}
    if rng.random() < 0.5:
        more["additionalProperties"] = rng.choice([False, True, schema(rng, depth - 1)])
    if rng.random() < 0.2:
        rest = [
            {"minProperties": small},
            {"maxProperties": small},
            {"patternProperties": {"^x": {}}},
            {"propertyNames": {"maxLength": 2}},
            {"$defs": {"a": schema(rng, depth - 1)}},
        ]
        more |= rng.choice(rest)
    return {"type": "object", "properties": {name: schema(rng, depth - 1) for name in names}, **more}


def regex(rng: Random, depth: int = 3) -> str:
    """A regular expression that Python and llguidance read alike, in most places a right one."""
    if rng.random() < 0.03:
        return rng.choice(
            ["(", ")", "[", "*", "(?P<a>a)", r"\1", "(?=a)", "a{3,1}", "\\", "^", "$", r"\b", "(?i)a"]
        )
    kind = rng.randrange(8 if depth else 4)
    if kind < 4:
        return rng.choice(["a", "b", "你", "[a-c]", "[^a]", r"\.", "0", " ", "[é-ü]", "[0-9a-f]"])
    inner = regex(rng, depth - 1)
    if kind == 4:
        return f"({inner})" + rng.choice(["*", "+", "?", "{2}", "{0,3}", "{1,}", "{0}"])
    if kind == 5:
        return f"({inner}|{regex(rng, depth - 1)})"
    return inner + regex(rng, depth - 1)


_RULES = [
    '"a"',
    '"b"',
    "/[a-c]+/",
    "start",
    "x",
    "Y",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    ":",
    "\n",
    "x:",
    "Y:",
    "%json {}",
    "~ 3",
]


@contextlib.contextmanager
def grammars(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """Constraints compiled in bounded time; answers sampled under their masks match them."""
    compiler = Grammars(FakeBackend())

    def draw(rng: Random) -> tuple[str, Any, int]:
        kind = rng.choice(["json", "json", "regex", "regex", "grammar", "choice"])
        if kind == "json":
            given: Any = schema(rng)
        elif kind == "regex":
            given = regex(rng)
        elif kind == "choice":
            given = [rng.choice(mutate.TEXTS) for _ in range(rng.randint(0, 3))]
        else:
            sign = rng.choice((":", "::="))
            given = (
                rng.choice(("start", "root"))
                + sign
                + " ".join(rng.choice(_RULES) for _ in range(rng.randint(1, 8)))
            )
        if rng.random() < 0.1:
            given = (
                mutate.inside(rng, given)
                if isinstance(given, (dict, list))
                else str(given) * rng.choice((2, 1000))
            )
        return kind, given, rng.getrandbits(32)

    def check(given: tuple[str, Any, int]) -> None:
        kind, asked, seed = given
        try:
            constraint = json_constraint(asked, "x") if kind == "json" else constraint_of(kind, asked, "x")
            text = _answer(compiler, constraint, Random(seed))
        except RequestError:
            return
        if text is not None:
            _check_match(kind, asked, text)

    yield draw, check


def _answer(compiler: Grammars, constraint: Constraint, rng: Random) -> str | None:
    """A random answer that the constraint allows; None where it has no end within MOST_BYTES."""
    matcher = compiler.compile(constraint)
    written = bytearray()
    while len(written) < MOST_BYTES:
        allowed = matcher.mask().nonzero()[0].tolist()
        assert allowed, f"nothing may follow {bytes(written)!r}"
        token = _END if _END in allowed and rng.random() < 0.5 else rng.choice(allowed)
        if token == _END:
            return written.decode("utf-8")
        written.append(token)
        if matcher.accept(token):
            return written.decode("utf-8")
    return None


def _exact(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


def _check_match(kind: str, asked: Any, text: str) -> None:
    if kind == "json":
        # llguidance takes some schemas that are none, and more regular expressions than Python.
        with contextlib.suppress(jsonschema.SchemaError, RecursionError):
            jsonschema.validate(_exact(text), _exact(json.dumps(asked)), jsonschema.Draft202012Validator)
    elif kind == "regex":
        with contextlib.suppress(re.error):
            assert re.fullmatch(asked, text, re.DOTALL), text
    elif kind == "choice":
        assert text in asked, text
