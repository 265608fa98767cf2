"""The JSON Schema (draft 2020-12) of a training configuration: `edge train --json-schema`.

It is made of the table that `convert.config` reads YAML by. An editor's YAML plug-in completes and checks
with it: `# yaml-language-server: $schema=edge-train.schema.json` as the first line of the YAML.

The first `type` of a key is its own; the others are what YAML makes of it (1e-4 is text) or null, the
default. Beside JSON Schema's words each key has `x-description-zh`, `x-group` and `x-group-zh`,
`x-llamafactory` (false: a key of ours) and `x-status`: honoured, no-effect, or refused (but for the values in
`enum`), the last two with `x-reason` and `x-reason-zh`. Keys that exclude each other are checked by
`edge train` alone.
"""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

from convert.config_keys import FIELDS, GROUPS, NUMBER, REQUIRED, Key, plain
from convert.config_unused import UNUSED, Unused

# A whole number as text: 3, 3.0, 1e3.
_WHOLE = r"([0-9]+(\.0*)?|([0-9]+\.?[0-9]*|\.[0-9]+)[eE]\+?[0-9]+)"
_NONE = "[Nn][Oo][Nn][Ee]"
_BOUNDS = {
    "minimum": "minimum",
    "exclusive_minimum": "exclusiveMinimum",
    "maximum": "maximum",
    "exclusive_maximum": "exclusiveMaximum",
}


def schema() -> dict[str, Any]:
    """The whole schema, as JSON's plain values."""
    properties: dict[str, Any] = {}
    group = ("", "")
    for name, key in FIELDS.items():
        group = GROUPS.get(name, group)
        properties[name] = {
            **_values(key),
            **({} if key.default is MISSING else {"default": plain(key.default)}),
            "description": key.help,
            "x-description-zh": key.help_zh,
            "x-group": group[0],
            "x-group-zh": group[1],
            "x-llamafactory": not key.ours,
            "x-status": "honoured",
        }
    for name, unused in UNUSED.items():
        properties[name] = _unused(unused)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edge train",
        "description": "A training configuration; keys and defaults are LLaMA-Factory's and transformers'.",
        "x-description-zh": "训练配置；键名与默认值同 LLaMA-Factory 和 transformers。",
        "type": "object",
        "properties": properties,
        "required": list(REQUIRED),
        "additionalProperties": False,
    }


def _values(key: Key) -> dict[str, Any]:
    """What the key may be: `convert.config` accepts the same."""
    null = key.default is not MISSING
    if key.choices:
        allowed = [*key.choices, *(str(choice) for choice in key.choices if not isinstance(choice, str))]
        allowed += [False] if "no" in key.choices else []  # what YAML 1.1 makes of a bare `no`
        allowed += ["", "none", "None"] if key.default is None else []
        return {"enum": [*allowed, None] if null else allowed}
    types, more = _TYPES[key.kind]
    values: dict[str, Any] = {"type": [*types, "null"] if null else list(types)}
    for name, word in _BOUNDS.items():
        if getattr(key, name) is not None:
            values[word] = getattr(key, name)
    if key.kind in ("int", "float"):
        low = key.minimum if key.minimum is not None else key.exclusive_minimum
        sign = "[-+]?" if low is None or low < 0 else r"\+?"
        number = sign + (_WHOLE if key.kind == "int" else NUMBER)
        values["pattern"] = rf"^\s*{number}\s*$"
        if key.default is None:
            values["pattern"] = rf"^(\s*({number}|{_NONE})\s*)?$"
    if key.names:
        name = f"({'|'.join(key.names)})"
        values |= {"pattern": rf"^\s*{name}(\s*,\s*{name})*\s*$", "items": {"enum": list(key.names)}}
        return values
    if key.default is None and "pattern" in more:
        values["pattern"] = f"^$|{more['pattern']}"
    return {**more, **values}


# Of each kind: JSON's types, the key's own first, and what limits them.
_TYPES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "int": (("integer", "string"), {}),
    "float": (("number", "string"), {}),
    "bool": (("boolean",), {}),
    "bool?": (("boolean",), {}),
    "text": (("string", "number"), {"pattern": r"\S"}),
    "names": (("string", "array"), {"pattern": r"[^\s,]", "items": {"type": "string"}, "minItems": 1}),
    "floats": (
        ("string", "array"),
        {
            "pattern": rf"^\s*({NUMBER}(\s*,\s*{NUMBER})*|{_NONE})\s*$",
            "items": {"type": ["number", "string"], "exclusiveMinimum": 0, "pattern": rf"^\s*{NUMBER}\s*$"},
        },
    ),
    "resume": (("boolean", "string", "number"), {"pattern": r"\S"}),
}


def _unused(unused: Unused) -> dict[str, Any]:
    about = {"x-llamafactory": True, "x-reason": unused.reason, "x-reason-zh": unused.reason_zh}
    if unused.values is None:
        about |= {
            "description": f"no effect: {unused.reason}",
            "x-description-zh": f"不起作用：{unused.reason_zh}",
        }
        return about | {"x-status": "no-effect"}
    about |= {
        "description": f"no other value is supported: {unused.reason}",
        "x-description-zh": f"不支持其他取值：{unused.reason_zh}",
    }
    return {"enum": [*unused.values, None]} | about | {"x-status": "refused"}
