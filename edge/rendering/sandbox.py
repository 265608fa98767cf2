"""Chat templates, rendered as transformers renders them, in a sandbox with bounds.

A template is untrusted text from a model file. It runs in jinja2's immutable sandbox with the filters,
functions and methods that chat templates use, and no others. What makes a text longer is measured before it
is done: one text may have LONGEST characters, all that a rendering makes MOST. Time and memory are bounded
from outside (`edge.rendering.child`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Sized
from datetime import datetime
from string import Formatter
from typing import Any

import jinja2
from jinja2 import filters, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LONGEST = 8 * 2**20
MOST = 16 * LONGEST
TOO_LARGE = "prompt_too_long"
# In characters: an element of a list, by its pointer; a value in a list that is to become text, by the time
# that measuring takes.
_ELEMENT, _VALUE = 8, 128
# Bits of an integer: Python writes no longer ones as text.
_MOST_BITS = 2**14
_LONGEST_PATTERN = 256
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format",
    "groupby", "indent", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title",
    "trim", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
# Those that make a text of any value.
_TEXT_FILTERS = (
    "capitalize", "e", "escape", "lower", "safe", "string", "title", "trim", "upper", "wordcount",
)  # fmt: skip
_LIST_FILTERS = ("groupby", "list", "sort", "unique")
_GLOBALS = ("cycler", "dict", "joiner", "namespace", "range")
_METHODS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (str, (
        "capitalize", "casefold", "count", "endswith", "find", "format", "format_map", "index", "isalnum",
        "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle",
        "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace",
        "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
        "swapcase", "title", "upper",
    )),
    (dict, ("copy", "get", "items", "keys", "values")),
    (list, ("copy", "count", "index")),
    (tuple, ("count", "index")),
    (int, ()), (float, ()), (range, ()),
)  # fmt: skip
_COLLECTIONS: tuple[Any, ...] = (dict, list, tuple, type({}.keys()), type({}.values()), type({}.items()))
# A directive of a `%` format, and one whose key hides from this pattern where it ends.
_DIRECTIVE = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")
_NESTED_KEY = re.compile(r"%\([^)]*\(")


class Refusal(Exception):
    """A template that cannot be rendered for these messages, in words that follow "the chat template"."""

    def __init__(self, message: str, code: str = "chat_template_error") -> None:
        super().__init__(message)
        self.code = code


def variables(source: str) -> list[str]:
    """The names that the template `source` reads. Raises jinja2.TemplateError where it is not valid."""
    return _template(source)[1]


def literals(source: str) -> list[str]:
    """The texts that stand in the template `source`, and the names of the fields that it reads."""
    return _template(source)[2]


def render(source: str, context: dict[str, Any], cut: str = "") -> str:
    """The text that the template `source` makes of `context`. Raises Refusal.

    cut: a character that is never escaped.
    """
    environment, parts, length = _sandbox(), [], 0
    environment.spent, environment.cut = 0, cut
    try:
        for part in _template(source)[0].generate(context):
            length += len(part)
            environment.check(length)
            parts.append(part)
        # A part may be no text: {% filter list %}.
        return "".join(parts)
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # what a template, and jinja2's filters, raise for odd values
        raise Refusal(f"cannot be applied to these messages: {error}") from error


@functools.lru_cache(maxsize=16)
def _template(source: str) -> tuple[jinja2.Template, list[str], list[str]]:
    environment = _sandbox()
    environment.spent = 0
    tree = environment.parse(source)
    names, texts = sorted(meta.find_undeclared_variables(tree)), sorted(_texts(tree))
    code = environment.compile(_Measured().visit(tree))
    return environment.template_class.from_code(environment, code, environment.globals), names, texts


def _texts(tree: nodes.Template) -> set[str]:
    fields = {node.attr for node in tree.find_all(nodes.Getattr)}
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return fields | constants | {node.data for node in tree.find_all(nodes.TemplateData)}


@functools.cache
def _sandbox() -> _Sandbox:
    return _Sandbox()


class _Generation(Extension):
    """The tag by which templates mark the assistant's text, for transformers' masks: its body is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox. spent: the characters of all texts that this rendering has made. cut: see `render`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self.printable,
        )
        self.spent, self.cut = 0, ""
        self.filters = {name: self._bounded(name, filters.FILTERS[name]) for name in _FILTERS}
        self.filters |= {"join": self._join, "sum": self._sum, "tojson": self._tojson}
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"raise_exception": self._raise, "strftime_now": _strftime_now}

    def check(self, characters: int) -> None:
        """Raise Refusal for a text of so many characters."""
        if characters > LONGEST:
            raise Refusal(f"makes a text of more than {LONGEST} characters of these messages", TOO_LARGE)

    def charged(self, result: Any) -> Any:
        """`result`, counted among what this rendering has made."""
        size = 0
        if isinstance(result, str):
            size = len(result)
        elif isinstance(result, (list, tuple, dict)):
            size = len(result) * _ELEMENT
        elif isinstance(result, int) and result.bit_length() > _MOST_BITS:
            raise Refusal(f"computes a number of more than {_MOST_BITS} bits")
        self.check(size)
        self.spent += size
        if self.spent > MOST:
            raise Refusal(f"makes texts of more than {MOST} characters of these messages", TOO_LARGE)
        return result

    def size(self, value: Any, indent: int = 0) -> int:
        """About how many characters `value` has as text, or as JSON with `indent` more for each level.

        Raises Refusal for more than LONGEST, TypeError for what is no data.
        """
        if isinstance(value, str):
            return len(value)
        total, waiting = 0, [(value, 1)]
        while waiting:
            item, depth = waiting.pop()
            total += _VALUE + indent * depth
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, _COLLECTIONS):
                waiting += [(part, depth + 1) for part in item]
                if isinstance(item, dict):
                    waiting += [(part, depth + 1) for part in item.values()]
            elif isinstance(item, int):
                total += item.bit_length() // 3
            elif not isinstance(item, (float, range, Undefined)) and item is not None:
                raise TypeError(f"{type(item).__name__} is no text")
            self.check(total)
        return total

    def printable(self, value: Any) -> Any:
        """`value`, which is to become text."""
        if not isinstance(value, str):
            self.check(self.size(value))
        return value

    def text(self, value: Any) -> str:
        """`value` as text."""
        return str(self.printable(value))

    def concat(self, parts: Iterable[str]) -> str:
        """The text of a macro, a block or a captured part."""
        parts = list(parts)
        self.check(sum(map(len, parts)))
        return str(self.charged("".join(parts)))

    def concatenated(self, *values: Any) -> str:
        """`values` one behind the other: the operator ~."""
        self.check(sum(map(self.size, values)))
        return str(self.charged("".join(map(str, values))))

    def sliced(self, value: Any, *bounds: Any) -> Any:
        return self.charged(value[slice(*bounds)])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _check_power(left, right)
        elif operator == "*":
            self.check(_repeated(left, right))
        elif operator == "%" and isinstance(left, str):
            self.check(self._formatted(left, right))
        # A sum is twice as long at most, and refused behind this.
        return self.charged(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            if function.__name__ == "join":
                args = ([*args[0]], *args[1:])
                self.check(self._joined(args[0], text))
            elif function.__name__ == "replace":
                self.check(self._replaced(text, *args))
        return self.charged(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> str:
            given, size = self.size((args, kwargs)), len(value.__self__)
            for _, name, spec, _ in Formatter().parse(value.__self__):
                if "{" in (spec or ""):
                    raise Refusal("takes the width of a field from a value")
                size += given * (name is not None) + sum(map(int, re.findall(r"\d+", spec or "")))
            self.check(size)
            return function(*args, **kwargs)

        return bounded

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter of jinja2's, with its result measured: before it is made, where it may be long."""
        passed = int(hasattr(function, "jinja_pass_arg"))
        estimates: dict[str, Callable[..., int]] = {
            "format": lambda value, *args, **kwargs: self._formatted(self.text(value), kwargs or args),
            "indent": self._indented,
            "replace": self._replaced,
            # The power of ten is computed.
            "round": lambda value, precision=0, method="common": precision * _MOST_BITS,
            **dict.fromkeys(_LIST_FILTERS, _elements),
            **dict.fromkeys(_TEXT_FILTERS, lambda value, *args, **kwargs: self.size(value)),
        }
        estimate = estimates.get(name)

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if estimate:
                self.check(estimate(*args[passed:], **kwargs))
            return self.charged(function(*args, **kwargs))

        return bounded

    def _formatted(self, pattern: str, values: Any) -> int:
        """At most how many characters `pattern % values` has."""
        if _NESTED_KEY.search(pattern):
            raise Refusal("has a parenthesis in the key of a format")
        size, given = len(pattern), self.size(values)
        for widths in _DIRECTIVE.findall(pattern):
            # A width that is taken from the values (*) is no number, and so refused.
            size += given + sum(int(width or 0) for width in widths)
        return size

    def _indented(self, value: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
        text = self.text(value)
        return len(text) + (len(text.splitlines()) + 1) * (len(width) if isinstance(width, str) else width)

    def _replaced(self, value: Any, old: Any, new: Any, count: int | None = None) -> int:
        text = self.text(value)
        return len(text) + text.count(self.text(old)) * self.size(new)

    def _joined(self, values: list[Any], between: str) -> int:
        return sum(map(self.size, values)) + len(values) * len(between)

    def _join(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        get = filters.make_attrgetter(self, attribute) if attribute is not None else lambda part: part
        values, between = [get(part) for part in value], self.text(d)
        self.check(self._joined(values, between))
        return str(self.charged(between.join(map(str, values))))

    def _sum(self, value: Iterable[Any], attribute: str | int | None = None) -> Any:
        # Without a start of its own: a sum of lists is quadratic.
        return self.charged(filters.sync_do_sum(self, value, attribute))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML, which no chat template wants.
        added = len(indent) if isinstance(indent, str) else indent or 0
        self.check(self.size(value, max(added, 0) + sum(map(len, separators or ()))))
        text = json.dumps(
            value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if ensure_ascii:
            text = _NOT_ASCII.sub(lambda m: m[0] if m[0] == self.cut else json.dumps(m[0])[1:-1], text)
        return str(self.charged(text))

    def _raise(self, message: Any) -> None:
        raise Refusal(f"refuses these messages: {self.printable(message)}")


class _Measured(NodeTransformer):
    """Turns what jinja2 compiles to plain Python, and might be long, into calls of the sandbox."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return _call("sliced", [node.node, *bounds], node)


def _call(method: str, args: list[nodes.Expr], node: nodes.Node) -> nodes.Node:
    call = nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None, lineno=node.lineno)
    assert node.environment is not None
    return call.set_environment(node.environment)


def _elements(value: Any, *_: Any, **__: Any) -> int:
    return len(value) * _ELEMENT if isinstance(value, Sized) else 0


def _repeated(left: Any, right: Any) -> int:
    """How many characters or elements a repetition has."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, (str, list, tuple)) and isinstance(times, int):
            return len(items) * times
    return 0


def _check_power(base: Any, exponent: Any) -> None:
    if not (isinstance(base, (int, float)) and isinstance(exponent, (int, float)) and abs(exponent) <= 64):
        raise Refusal("computes a power of large numbers")


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _LONGEST_PATTERN:
        raise Refusal(f"has a date pattern of more than {_LONGEST_PATTERN} characters")
    return datetime.now().astimezone().strftime(pattern)
