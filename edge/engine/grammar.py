"""Structured output: JSON schema, regular expression or Lark grammar, as masks over the vocabulary.

The masks come from llguidance, which needs nothing of the backend but its tokenizer, so every backend can
honour a schema. A constraint that cannot be honoured in full is refused when the request comes in. Depth and
size are capped in Python; llguidance itself bounds the time of each mask.
"""

from __future__ import annotations

import json
import threading
from typing import Any, Literal

import msgspec
import numpy as np

from edge.backends.base import Backend
from edge.engine.sampling import Mask
from edge.errors import RequestError
from edge.setup import install_command

MAX_CHARACTERS = 65_536
MAX_DEPTH = 64
# Without a bound a model may write white space for ever; this is enough for any indentation.
WHITESPACE = r"[ ]?|\n[ ]{0,32}"
# llguidance recurses without end over this number, in a schema's values as in a grammar's %json.
_ENDLESS = str(-(2**63))
_OPENING, _CLOSING = "([{", ")]}"


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
        _check_size(constraint)
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                "structured output needs the package llguidance",
                code="unsupported",
                param=constraint.param,
                hint=install_command("serve"),
            ) from error
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._backend)
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
        return Matcher(native, self._backend.info.vocab)


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
    try:
        import llguidance

        _check_size(constraint)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(constraint.text)
        tokenizer = llguidance.LLTokenizer("byte")
    except (ImportError, ValueError, RequestError):
        return False
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    text = json.dumps(_ordered(schema, value), ensure_ascii=False).encode("utf-8")
    return bool(matcher.consume_tokens(list(text)) and matcher.is_accepting())


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


def _check_size(constraint: Constraint) -> None:
    """Native parsers recurse: what is too long or too deep never reaches them."""
    text = constraint.text
    if len(text) > MAX_CHARACTERS:
        raise _refused(constraint, f"it has {len(text)} characters, {MAX_CHARACTERS} are the limit")
    if _ENDLESS in text:
        raise _refused(constraint, f"it holds the number {_ENDLESS}")
    depth = 0
    for character in text:
        if character in _OPENING:
            depth += 1
            if depth > MAX_DEPTH:
                raise _refused(constraint, f"it is nested deeper than {MAX_DEPTH} levels")
        elif character in _CLOSING:
            depth = max(0, depth - 1)


def _refused(constraint: Constraint, why: str) -> RequestError:
    return RequestError(
        f"the {constraint.kind} cannot be honoured: {why}", code="invalid_grammar", param=constraint.param
    )
