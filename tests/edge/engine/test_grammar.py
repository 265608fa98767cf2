"""Constraints: every answer matches, whatever the model wants; what cannot be honoured is refused."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.backends.fake import FakeBackend
from edge.engine import protocol as msg
from edge.engine.core import Engine
from edge.engine.grammar import MAX_CHARACTERS, Constraint, Grammars, fits, json_constraint
from edge.engine.sampling import Params
from edge.errors import RequestError


def answer(constraint: Constraint, *, seed: int = 0, batch: int = 1, **given: object) -> list[str]:
    events: list[msg.Event] = []
    engine = Engine(FakeBackend(slots=4, context=256), events.extend)
    for key in range(batch):
        params = Params(seed=seed + key, **given)  # type: ignore[arg-type]
        engine.submit(msg.Submit(key, f"go {seed + key}", params, constraint=constraint))
    engine.drain(1e9)
    while engine.turn():
        pass
    assert sum(isinstance(e, msg.Done) and e.reason in ("stop", "length") for e in events) == batch
    return [
        "".join(e.text for e in events if isinstance(e, (msg.Delta, msg.Done)) and e.key == key)
        for key in range(batch)
    ]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([0.0, 1.0, 2.0]))
def test_any_sampling_obeys_a_regex(seed: int, temperature: float) -> None:
    pattern = "(yes|no|[0-9]{3}), 好{1,2}!"
    for text in answer(Constraint("regex", pattern), seed=seed, temperature=temperature, batch=3):
        assert re.fullmatch(pattern, text)


def test_json_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "n": {"type": "integer", "maximum": 9}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    for seed in range(5):
        [text] = answer(json_constraint(schema, "x"), seed=seed)
        found = json.loads(text)
        assert set(found) == {"name", "n"}
        assert len(found["name"]) <= 4
        assert found["n"] <= 9


def test_lark() -> None:
    [text] = answer(Constraint("lark", 'start: "a" ("b" | "c")+ "d"'), temperature=2.0)
    assert re.fullmatch("a[bc]+d", text) or len(text) > 200


def test_min_tokens_and_ignore_eos_do_not_break_a_complete_answer() -> None:
    assert answer(Constraint("regex", "ab"), ignore_eos=True, min_tokens=10) == ["ab"]


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "(("),
        Constraint("regex", "(" * 50_000 + ")" * 50_000),
        Constraint("regex", "a" * (MAX_CHARACTERS + 1)),
        Constraint("lark", "start: ("),
        Constraint("lark", "nothing"),
        Constraint("json_schema", '{"type": "foo"}'),
        Constraint("json_schema", "[1]"),
        Constraint("json_schema", '{"not": {"type": "string"}}'),
        Constraint("json_schema", '{"type": "string", "format": "no-such-format"}'),
        Constraint("json_schema", '{"$ref": "http://127.0.0.1:9/schema.json"}'),
        Constraint("json_schema", '{"a": ' * 70 + "1" + "}" * 70),
        # Over these llguidance would end the process, wherever they stand: a reference may lead there.
        Constraint("json_schema", json.dumps({"enum": [{"a": [-(2**63)]}]})),
        Constraint("json_schema", json.dumps({"$ref": "#/default", "default": {"const": 512 - 2**63}})),
        Constraint("lark", 'start: "%json {" %json\n{"const": -9223372036854775807}'),
        # Of these it would write a neighbour.
        Constraint("lark", 'start: "%json {" %json{"properties": {"a": {"enum": [9007199254740993]}}}'),
        Constraint("lark", 'start: %json {"const": 9007199254740993.0}'),
        # An automaton of so many states takes it minutes.
        Constraint("json_schema", '{"type": "integer", "multipleOf": 999983}'),
        Constraint("json_schema", '{"allOf": [{"multipleOf": 9.91}, {"items": {"multipleOf": 997}}]}'),
    ],
    ids=lambda c: f"{c.kind}-{c.text[:20]}",
)
def test_what_cannot_be_honoured_is_refused(constraint: Constraint) -> None:
    with pytest.raises(RequestError) as caught:
        Grammars(FakeBackend()).compile(constraint)
    assert caught.value.status == 400
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("keyword", ["const", "enum", "minimum", "maximum", "exclusiveMinimum"])
@pytest.mark.parametrize(
    "number",
    [
        2**53 + 1, -(2**53) - 1, 2**55 + 2, -(2**63) - 1, 10**400, 10**5000,
        # Floats that it takes for a neighbour.
        0.9697965044964699, 262815942439728.78, float("inf"),
    ],
    ids=lambda number: str(number)[:20] if isinstance(number, float) or abs(number) < 2**64 else "large",
)  # fmt: skip
def test_a_number_that_would_be_rounded_is_refused(keyword: str, number: float) -> None:
    text = f'{{"type": "number", "{keyword}": {"[1, %s]" if keyword == "enum" else "%s"}}}'
    spelled = f"1{'0' * 5000}" if number == 10**5000 else json.dumps(number)
    with pytest.raises(RequestError, match=r"would be rounded|expected value") as caught:
        Grammars(FakeBackend()).compile(Constraint("json_schema", text % spelled, "format"))
    assert (caught.value.status, caught.value.param) == (400, "format")
    assert spelled[:10] in caught.value.message or number in (10**400, 10**5000, float("inf"))
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("9007199254740992", "9007199254740992"),
        ("9223372036854775807", "9223372036854775807"),
        ("1" + "0" * 30, "1" + "0" * 30),
        ("1e300", "1" + "0" * 300),
        ("0.1", "0.1"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("-2.50", "-2.5"),
        ("1.0", "1"),
        ("-0.0", "-0"),
        ("0E+5", "0"),
        ("1e-320", "0." + "0" * 319 + "1"),
    ],
)
def test_a_number_that_is_written_as_it_is_stays(number: str, text: str) -> None:
    matcher = Grammars(FakeBackend()).compile(Constraint("json_schema", f'{{"const": {number}}}'))
    for byte in text.encode():
        assert matcher.mask()[byte]
        matcher.accept(byte)
    assert matcher.mask()[256]


@pytest.mark.parametrize(
    "schema",
    [
        # What bounds nothing may be any number, and a limit may lie beyond all that is written.
        {"type": "integer", "default": 2**53 + 1, "examples": [2**70], "maximum": 2**63 - 1},
        {"type": "integer", "minimum": -5, "exclusiveMaximum": 2**64 - 1},
        {"anyOf": [{"multipleOf": 0.01}, {"type": "integer", "multipleOf": 25_000}], "minimum": 1e-10},
    ],
)
def test_numbers_that_are_kept_to_are_taken(schema: dict[str, object]) -> None:
    Grammars(FakeBackend()).compile(json_constraint(schema, "x"))


@pytest.mark.slow
def test_chains_of_references_have_room() -> None:
    """As long as they can be; llguidance recurses along them, which ended the process."""
    chain = {f"{i}": {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1_450)}
    schema = {"$ref": "#/$defs/0", "$defs": {**chain, "1450": True}}
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(4_200))
    for constraint in (
        json_constraint(schema, "x"),
        Constraint("lark", f'start: r0\n{rules}\nr4200: "a"'),
    ):
        Grammars(FakeBackend()).compile(constraint)
    assert fits(schema, [])


def test_a_schema_must_be_an_object() -> None:
    for schema in (None, False, 3, [{}]):
        with pytest.raises(RequestError):
            json_constraint(schema, "x")


def accepts(schema: dict[str, object], text: str) -> bool:
    matcher = Grammars(FakeBackend()).compile(json_constraint(schema, "x"))
    for byte in text.encode():
        if not matcher.mask()[byte]:
            return False
        matcher.accept(byte)
    return bool(matcher.mask()[256])


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
        ({"type": "array", "minItems": 2, "items": {"type": "null"}}, "[null,null]", "[null]"),
        ({"type": "integer", "minimum": 10}, "12", "9"),
        ({"type": "string", "pattern": "^a+$"}, '"aa"', '"ab"'),
        ({"type": "string", "format": "date"}, '"2026-11-25"', '"2026-13-25"'),
        ({"const": "你好"}, '"你好"', '"你"'),
        ({"anyOf": [{"type": "null"}, {"enum": [1, 2]}]}, "2", "3"),
    ],
)
def test_what_is_accepted_is_enforced(schema: dict[str, object], good: str, bad: str) -> None:
    assert accepts(schema, good)
    assert not accepts(schema, bad)


def test_blank_space_is_bounded() -> None:
    schema: dict[str, object] = {"type": "object"}
    assert accepts(schema, '{\n    "a": 1\n}')
    assert not accepts(schema, '{  "a":1}')


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ({"city": "é", "n": 5}, True),
        ({"n": 5, "city": "x"}, True),
        ({"city": "x", "in": [{"b": 1, "a": 2}]}, True),
        ({"city": "x", "n": 1}, False),
        ({"n": 5}, False),
        ({"city": "x", "z": 1}, False),
        ([], False),
    ],
)
def test_text_that_no_mask_bound_is_held_against_a_schema(value: Any, want: bool) -> None:
    inner = {"type": "object", "properties": {"a": {}, "b": {}}}
    known = {
        "city": {"type": "string"},
        "n": {"type": "integer", "minimum": 3},
        "in": {"type": "array", "items": inner},
    }
    schema = {"type": "object", "properties": known, "required": ["city"], "additionalProperties": False}
    assert fits(schema, value) is want
    assert not fits({"type": "nonsense"}, value)
    assert not fits({"enum": ["x" * 70_000]}, value)
