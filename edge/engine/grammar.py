"""Structured output: JSON schema, regular expression or Lark grammar, as masks over the vocabulary.

The masks come from llguidance, which needs nothing of the backend but its tokenizer, so every backend can
honour a schema. A constraint that cannot be honoured in full is refused when the request comes in. Depth and
size are capped in Python; llguidance itself bounds the time of each mask.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from edge.backends.base import Backend
from edge.engine.deep_stack import deep_stack
from edge.engine.sampling import Mask
from edge.errors import RequestError
from edge.setup import install_command

MAX_CHARACTERS = 65_536
MAX_DEPTH = 64
# Without a bound a model may write white space for ever; this is enough for any indentation.
WHITESPACE = r"[ ]?|\n[ ]{0,32}"
_OPENING, _CLOSING = "([{", ")]}"
# llguidance reads numbers as doubles, and not always the nearest one; an integer that becomes the first of
# these is recursed over until the process ends.
_ENDLESS, _MOST = -(2.0**63), 2**63 - 1
_VALUES, _LOWER, _UPPER = ("const", "enum"), ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
# An automaton for multiples of n has a state for each remainder, once n's twos and fives are taken out.
_MOST_REMAINDERS = 10_000

T = TypeVar("T")


class Constraint(msgspec.Struct, frozen=True):
    """What an answer must match. text: a JSON schema, a regular expression or a Lark grammar.

    param: the request field it came from, for error messages.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    param: str = "response_format"


class Grammars:
    """Compiles constraints for one backend's vocabulary. `compile` may be called from any thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of an answer. Raises RequestError where it cannot be honoured."""
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                "structured output needs the package llguidance",
                code="unsupported",
                param=constraint.param,
                hint=install_command("serve"),
            ) from error
        _check(constraint)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._backend)
        native = _with_stack(lambda: self._native(constraint, llguidance))
        return Matcher(native, self._backend.info.vocab)

    def _native(self, constraint: Constraint, llguidance: Any) -> Any:
        maker = llguidance.LLMatcher
        limits = llguidance.LLParserLimits(verbose_errors=False)
        options = {"json_schema": {"overrides": {"whitespace_pattern": WHITESPACE}}}.get(constraint.kind, {})
        try:
            grammar = getattr(maker, f"grammar_from_{constraint.kind}")(constraint.text, **options)
            failed, messages = maker.validate_grammar_with_warnings(grammar, self._tokenizer, limits=limits)
        except ValueError as error:
            raise _refused(constraint, str(error)) from error
        if failed or messages:
            raise _refused(constraint, "; ".join(messages))
        native = maker(self._tokenizer, grammar, log_level=0, limits=limits)
        if native.is_error():
            raise _refused(constraint, native.get_error())
        return native


class Matcher:
    """One answer's state in its grammar."""

    def __init__(self, native: Any, vocab: int) -> None:
        self._native = native
        self._vocab = vocab
        self._bits = np.zeros((vocab + 31) // 32, np.int32)

    def mask(self) -> Mask:
        """True for each token that may come next, [vocab]. Releases the GIL while it computes.

        Raises RequestError where the grammar outgrew its bounds.
        """
        self._native.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        flags = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return flags[: self._vocab].view(np.bool_)

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        return bool(self._native.validate_tokens([token]) == 1)

    def accept(self, token: int) -> bool:
        """Advance by a token that the mask allowed. True when the answer is complete."""
        self._native.consume_token(token)
        self._check()
        return bool(self._native.is_stopped())

    def _check(self) -> None:
        if self._native.is_error():
            raise RequestError(
                f"the grammar cannot be followed further: {self._native.get_error()}",
                code="grammar_error",
                param="response_format",
            )


def json_constraint(schema: Any, param: str) -> Constraint:
    """A constraint to answer with JSON that fits `schema` (an object, or true for any JSON object)."""
    if schema is True:
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise RequestError(f"{param} must be a JSON schema, an object", param=param)
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False), param)


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Whether `schema` allows `value`; False where that cannot be decided.

    For text that was not sampled under a mask. The order of an object's keys does not matter.
    """
    constraint = json_constraint(schema, "schema")
    text = json.dumps(_ordered(schema, value), ensure_ascii=False)
    try:
        _check(constraint)
        return _with_stack(lambda: _takes(constraint.text, text))
    except (ImportError, ValueError, RequestError):
        return False


def _takes(schema: str, text: str) -> bool:
    """Whether a JSON schema's text allows `text`. Raises ValueError where llguidance refuses the schema."""
    import llguidance

    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
    return bool(matcher.consume_tokens(list(text.encode("utf-8"))) and matcher.is_accepting())


def _with_stack(work: Callable[[], T]) -> T:
    """What `work` returns, on a thread that holds the longest chain of references in MAX_CHARACTERS."""
    with ThreadPoolExecutor(1, "grammar") as pool:
        with deep_stack():
            future = pool.submit(work)
        return future.result()


def _ordered(schema: Any, value: Any) -> Any:
    """`value` with the keys of its objects in the order of `schema`, which a grammar demands."""
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [_ordered(schema.get("items"), item) for item in value]
    properties = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(properties, dict):
        return value
    keys = [key for key in properties if key in value] + [key for key in value if key not in properties]
    return {key: _ordered(properties.get(key), value[key]) for key in keys}


def _tokenizer(backend: Backend) -> Any:
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    info = backend.info
    pieces = [backend.decode(i) for i in range(info.vocab)]
    stops = sorted(info.stop_ids)

    class Vocabulary:
        eos_token_id = stops[0]
        bos_token_id = info.bos_id
        special_token_ids = [i for i, piece in enumerate(pieces) if not piece]  # noqa: RUF012
        # llguidance's own sign for a token that no text can spell.
        tokens = [piece or b"\xff<%d>" % i for i, piece in enumerate(pieces)]  # noqa: RUF012

        def __call__(self, text: bytes) -> list[int]:
            return backend.encode(text.decode("utf-8", "replace"), special=False)

    return LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=info.vocab, eos_token=stops)


def _check(constraint: Constraint) -> None:
    """Native parsers recurse: what is too long or too deep never reaches them, nor what they misread."""
    text = constraint.text
    if len(text) > MAX_CHARACTERS:
        raise _refused(constraint, f"it has {len(text)} characters, {MAX_CHARACTERS} are the limit")
    depth = 0
    for character in text:
        if character in _OPENING:
            depth += 1
            if depth > MAX_DEPTH:
                raise _refused(constraint, f"it is nested deeper than {MAX_DEPTH} levels")
        elif character in _CLOSING:
            depth = max(0, depth - 1)
    for schema in _schemas(constraint):
        _check_numbers(constraint, schema)


def _schemas(constraint: Constraint) -> Iterator[Any]:
    """The JSON schemas in a constraint. Numbers with a point, an exponent or many digits are as spelled."""
    decoder = json.JSONDecoder(
        parse_float=Decimal, parse_int=lambda digits: int(digits) if len(digits) < 300 else Decimal(digits)
    )
    try:
        if constraint.kind == "json_schema":
            yield decoder.decode(constraint.text)
    except (ValueError, RecursionError) as error:
        raise _refused(constraint, str(error)) from error
    if constraint.kind == "lark":
        for part in constraint.text.split("%json")[1:]:
            # In a text or a comment it may be no schema; what is one for llguidance is one for Python.
            with contextlib.suppress(ValueError, RecursionError):
                yield decoder.raw_decode(part.lstrip())[0]


def _numbers(schema: Any) -> Iterator[tuple[str, int | Decimal]]:
    """(keyword, number) of every number in a schema."""
    left = [("", schema)]
    while left:
        keyword, value = left.pop()
        if isinstance(value, dict):
            left += [(keyword if keyword in _VALUES else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(keyword, inner) for inner in value]
        elif isinstance(value, (int, Decimal)) and not isinstance(value, bool):
            yield keyword, value


def _check_numbers(constraint: Constraint, schema: Any) -> None:
    """Refuse numbers that llguidance would take for others, or take too long over."""
    multiple, asked = 1, []
    for keyword, number in _numbers(schema):
        if isinstance(number, Decimal):
            if abs(number.adjusted()) > 330:
                raise _misread(constraint, number)
        elif -(2**63) <= number < 0 and float(number) == _ENDLESS:
            raise _misread(constraint, number)
        elif abs(number) <= 2**53 and keyword != "multipleOf":
            continue
        if keyword == "multipleOf" and number > 0:
            multiple = math.lcm(multiple, _remainders(number))
        elif keyword in _VALUES or keyword in _LOWER or (keyword in _UPPER and number < _MOST):
            asked.append(number)
    if multiple > _MOST_REMAINDERS:
        raise _refused(constraint, f"its multipleOf have more than {_MOST_REMAINDERS} remainders together")
    if asked and (misread := _with_stack(lambda: _first_misread(asked))) is not None:
        raise _misread(constraint, misread)


def _first_misread(numbers: list[int | Decimal]) -> int | Decimal | None:
    """The first number that llguidance, asked for it, writes as another."""
    written = ",".join(map(_plain, numbers))
    if _takes(f'{{"const": [{",".join(map(str, numbers))}]}}', f"[{written}]"):
        return None
    if len(numbers) == 1:
        return numbers[0]
    half = len(numbers) // 2
    found = _first_misread(numbers[:half])
    return _first_misread(numbers[half:]) if found is None else found


def _remainders(number: int | Decimal) -> int:
    """A number above 0 without its decimal point, twos and fives."""
    whole = int(f"{number:f}".replace(".", ""))
    for factor in (2, 5):
        while whole % factor == 0:
            whole //= factor
    return whole


def _plain(number: int | Decimal) -> str:
    """A number as llguidance writes it: without an exponent, or zeros that change nothing."""
    text = f"{number:f}" if isinstance(number, Decimal) else str(number)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _misread(constraint: Constraint, number: int | Decimal) -> RequestError:
    return _refused(
        constraint,
        f"the number {number!s:.40} would be rounded",
        "write it as a string; a limit must be a number that 64-bit floating point holds",
    )


def _refused(constraint: Constraint, why: str, hint: str = "") -> RequestError:
    message = f"the {constraint.kind} cannot be honoured: {why}"
    return RequestError(message, code="invalid_grammar", param=constraint.param, hint=hint)
