"""Templates are rendered as by transformers, and no operation of theirs makes a text without bounds."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import jinja2
import pytest

from edge.rendering import sandbox
from edge.rendering.sandbox import Refusal

# Texts, elements or digits that an operation must not make: as many bytes, at least.
MANY = 300_000_000
LONG = "{% set s = 'x' * 20000 %}{% set t = 'y' * 20000 %}"
NS = "{% set ns = namespace(s='x', l=[], n=3) %}"
WIDE = NS.replace("'x'", "'\U0001f600'")
TWICE = "{% for i in range(28) %}"
END = "{% endfor %}"

EVIL = {
    "*": "{{ 'x' * MANY }}",
    "* list": "{% set l = [0] * MANY %}",
    "* numbers": NS + TWICE + "{% set ns.n = ns.n * ns.n %}" + END,
    "**": "{{ 10 ** 100000000 }}",
    "** again": "{% set n = 10 ** 64 ** 64 ** 64 ** 64 %}",
    "+": WIDE + TWICE + "{% set ns.s = ns.s + ns.s %}" + END,
    "+ list": "{% set ns = namespace(l=[1]) %}" + TWICE + "{% set ns.l = ns.l + ns.l %}" + END,
    "~": WIDE + TWICE + "{% set ns.s = ns.s ~ ns.s %}" + END,
    "~ list": LONG + "{{ 1 ~ ([s] * 20000) }}",
    "%": "{{ '%MANYd' % 1 }}",
    "% precision": "{{ '%.MANYf' % 1 }}",
    "% star": "{{ '%*d' % (MANY, 1) }}",
    "% key": "{{ '%((a)b)MANYd' % {'(a)b': 1} }}",
    "% again": LONG + "{{ ('%(s)s' * 20000) % {'s': s} }}",
    "% list": LONG + "{{ '%s' % [[s] * 20000] }}",
    "slice of a text": "{% set s = 'x' * 8000000 %}" + NS + "{% for i in range(50) %}"
    "{% set ns.l = ns.l + [s[1:]] %}" + END,
    "output of a list": LONG + "{{ [s] * 20000 }}",
    "output of lists of lists": NS + TWICE + "{% set ns.l = [ns.l, ns.l] %}" + END + "{{ ns.l }}",
    "output of a namespace": LONG + "{{ namespace(l=[s] * 20000) }}",
    "set block": NS + TWICE + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}" + END,
    "macro": NS + "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}" + TWICE + "{% set ns.s = d(ns.s) %}" + END,
    "call block": NS + "{% macro d(s) %}{{ caller() }}{{ caller() }}{% endmacro %}" + TWICE
    + "{% set ns.s %}{% call d(1) %}{{ ns.s }}{% endcall %}{% endset %}" + END,
    "filter block": LONG + "{% filter replace('x', t) %}{{ s }}{% endfilter %}",
    "text in a loop": "{% set s %}{% for i in range(99999) %}" + "x" * 3000 + END + "{% endset %}",
    "output in a loop": LONG + "{% for i in range(20000) %}{{ s }}" + END,
    "upper in a loop": "{% set s = 'x' * 8000000 %}" + NS + "{% for i in range(50) %}"
    "{% set ns.l = ns.l + [s.upper()] %}" + END,
    "upper filter in a loop": "{% set s = 'x' * 8000000 %}" + NS + "{% for i in range(50) %}"
    "{% set ns.l = ns.l + [s | upper] %}" + END,
    "range": "{{ range(MANY) | list }}",
    "raise_exception": LONG + "{{ raise_exception([s] * 20000) }}",
    "strftime_now": "{{ strftime_now('%c' * 4000000) }}",
    "lipsum": "{{ lipsum(n=20000) }}",
    ".center": "{{ 'x'.center(MANY) }}",
    ".ljust": "{{ 'x'.ljust(MANY) }}",
    ".rjust": "{{ 'x'['rjust'](MANY) }}",
    ".zfill": "{{ '1'.zfill(MANY) }}",
    ".expandtabs": "{{ '\t'.expandtabs(MANY) }}",
    ".translate": LONG + "{{ s.translate({120: t}) }}",
    ".encode": LONG + "{{ (s.encode() * 20000) | length }}",
    ".to_bytes": "{{ (5).to_bytes(MANY, 'big') | length }}",
    ".format": "{{ '{:MANY}'.format(1) }}",
    ".format precision": "{{ '{:.MANYf}'.format(1) }}",
    ".format nested": "{{ '{:{w}}'.format(1, w=MANY) }}",
    ".format again": LONG + "{{ ('{0}' * 20000).format(s) }}",
    ".format list": LONG + "{{ '{!r}'.format([s] * 20000) }}",
    ".format_map": "{{ '{a:MANY}'.format_map({'a': 1}) }}",
    ".join": LONG + "{{ t.join(s) }}",
    ".join generator": LONG + "{{ t.join(s | map('upper')) }}",
    ".replace": LONG + "{{ s.replace('x', t) }}",
    ".replace of nothing": LONG + "{{ s.replace('', t) }}",
    ".replace of markup": LONG + "{{ (s | safe).replace('x', t) }}",
    "batch": "{{ [1] | batch(100000000, 0) | list | length }}",
    "center": "{{ 'x' | center(MANY) }}",
    "escape": LONG + "{{ ([s] * 20000) | escape }}",
    "escape of a long text": "{{ ('<' * 8000000) | e | length }}",
    "format": "{{ '%MANYd' | format(1) }}",
    "format key": "{{ '%(a)MANYd' | format(a=1) }}",
    "indent": "{{ 'x' | indent(MANY, first=true) }}",
    "indent by a text": LONG + "{{ ('x\n' * 20000) | indent(t) }}",
    "join": LONG + "{{ s | join(t) }}",
    "join attribute": LONG + "{{ ([{'a': s}] * 20000) | join(attribute='a') }}",
    "join of lists": LONG + "{{ [[s] * 20000] | join }}",
    "list": "{{ ('x' * 8000000) | list | length }}",
    "map": LONG + "{{ [s] | map('replace', 'x', t) | list }}",
    "pprint": LONG + "{{ ([s] * 20000) | pprint }}",
    "replace": LONG + "{{ s | replace('x', t) }}",
    "round": "{{ 2.5 | round(100000000, 'ceil') }}",
    "slice": "{{ [1] | slice(30000000) | list | length }}",
    "sort": "{{ ('xy' * 4000000) | sort | length }}",
    "string": LONG + "{{ ([s] * 20000) | string | length }}",
    "sum of lists": "{{ ([[1] * 1000] * 10000) | sum(start=[]) | length }}",
    "tojson": LONG + "{{ ([s] * 20000) | tojson | length }}",
    "tojson indent": "{{ [1] | tojson(indent=MANY) }}",
    "tojson indent of a text": LONG + "{{ range(20000) | list | tojson(indent=t) }}",
    "tojson separators": LONG + "{{ range(20000) | list | tojson(separators=(t, t)) }}",
    "upper": LONG + "{{ ([s] * 20000) | upper | length }}",
    "urlize": LONG + "{{ ('www.a.com ' * 20000) | urlize(target=t) | length }}",
    "urlencode": LONG + "{{ {'a': [s] * 20000} | urlencode | length }}",
    "wordwrap": LONG + "{{ s | wordwrap(1, wrapstring=t) | length }}",
    "xmlattr": LONG + "{{ {'a': [s] * 20000} | xmlattr | length }}",
}  # fmt: skip


def render(source: str, **context: Any) -> str:
    return sandbox.render(source, context)


@pytest.mark.parametrize("source", EVIL.values(), ids=EVIL)
def test_what_makes_a_text_longer_is_refused_before_it_is_made(source: str) -> None:
    source = source.replace("MANY", str(MANY))
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises((Refusal, jinja2.TemplateError)):
            render(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 1.0
    assert peak < 200 * 2**20


USED = {
    "{{ 'a-b' | replace('-', '+') | upper }}": "A+B",
    "{{ [1, 2] | join(', ') }}": "1, 2",
    "{{ [{'k': 'v'}] | join(attribute='k') }}": "v",
    "{{ 'a\nb' | indent(2, first=true) }}": "  a\n  b",
    "{{ {'b': '好', 'a': [1.5, none, true]} | tojson(sort_keys=true) }}":
    '{"a": [1.5, null, true], "b": "好"}',
    "{{ [1] | tojson(indent=2) }}": "[\n  1\n]",
    "{{ [1, 2] | tojson(separators=(',', ':')) }}": "[1,2]",
    "{{ '好' | tojson(ensure_ascii=true) }}": '"\\u597d"',
    "{{ [1, 2] | sum }}": "3",
    "{{ '%05.1f%%' % 2.25 }}": "002.2%",
    "{{ '%s=%s' | format('a', 1) }}": "a=1",
    "{{ '{:>4}|{a!r}'.format(7, a='b') }}": "   7|'b'",
    "{{ ', '.join(['x', 'y']) }}": "x, y",
    "{{ 'aXbX'.replace('X', '', 1) }}": "abX",
    "{{ 'abc'[1:] ~ 1 ~ none ~ [1] }}": "bc1None[1]",
    "{{ 'abc'[::-1] }}{{ [1, 2, 3][-2:] }}": "cba[2, 3]",
    "{{ [1] + [2] }}": "[1, 2]",
    "{{ 2 ** 10 * 3 % 7 }}": "6",
    "{{ 2.567 | round(1) }}": "2.6",
    "{{ '<' | e }}{{ ('<' | safe) ~ '>' }}": "&lt;<>",
    "{% set s %}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ s }}": "012",
    "{% macro m(x) %}[{{ x }}{{ caller() if caller }}]{% endmacro %}{{ m(1) }}{% call m(2) %}c{% endcall %}":
    "[1][2c]",
    "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1}.get('b', 2) }}": "a12",
    "{{ nothing is undefined }}<{{ nothing }}>": "True<>",
    "{% generation %}g{% endgeneration %}": "g",
    "{{ dict(a=1) | dictsort }}{{ 'a b'.split() | map('upper') | list }}": "[('a', 1)]['A', 'B']",
}  # fmt: skip


@pytest.mark.parametrize(("source", "want"), USED.items(), ids=USED)
def test_what_templates_use_is_rendered_as_by_jinja2(source: str, want: str) -> None:
    assert render(source) == want


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('only twice') }}", "refuses these messages: only twice"),
        ("{{ nothing.attribute }}", "nothing"),
        ("{{ 1 + 'x' }}", "unsupported operand"),
        ("{{ 'a'|truncate(-1) }}", "expected length"),
        ("{% include 'a' %}", "cannot be applied"),
        ("{% filter list %}a{% endfilter %}", "cannot be applied"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ cycler() }}", "at least one item"),
    ],
)
def test_a_template_that_fails_says_why(source: str, why: str) -> None:
    with pytest.raises(Refusal, match=why):
        render(source, messages=[])


def test_the_variables_that_a_template_reads() -> None:
    assert sandbox.variables("{% set a = tools %}{{ a ~ messages[1:] }}") == ["messages", "tools"]


def test_what_a_rendering_has_made_does_not_count_in_the_next() -> None:
    source = "{% for i in range(12) %}{% set s = 'x' * 8000000 %}{% endfor %}"
    assert [render(source) for _ in range(3)] == ["", "", ""]
