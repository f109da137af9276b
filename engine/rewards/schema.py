"""Whether a completion is JSON of a given shape: the part of JSON Schema (2020-12) that describes answers.

A keyword that is not known here is an error when the recipe is read, never a check that is left out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .answers import code_of

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
KEYWORDS = frozenset(
    {
        "type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "uniqueItems",
        "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
        "maxLength", "pattern", "anyOf", "oneOf", "allOf", "not", "minProperties", "maxProperties",
        "title", "description", "default", "examples", "$schema", "$id", "$comment",
    }
)  # fmt: skip


def unknown_keyword(schema: Any) -> str | None:
    """The first keyword of a schema, or of a schema inside it, that is not checked here."""
    if isinstance(schema, bool) or not isinstance(schema, dict):
        return None if isinstance(schema, bool) else repr(schema)
    for keyword, value in schema.items():
        if keyword not in KEYWORDS:
            return str(keyword)
        inside: list[Any] = []
        if keyword == "properties":
            inside = list(value.values())
        elif keyword in ("items", "not", "additionalProperties"):
            inside = [value]
        elif keyword in ("anyOf", "oneOf", "allOf"):
            inside = list(value)
        for part in inside:
            if (found := unknown_keyword(part)) is not None:
                return found
    return None


def json_schema(completions: Sequence[str], schemas: Sequence[Any]) -> list[float | None]:
    """1 where a completion, or the last fenced block in it, is JSON that its schema allows; None without a schema."""
    told: list[float | None] = []
    for text, schema in zip(completions, schemas, strict=True):
        if schema is None:
            told.append(None)
            continue
        try:
            value = json.loads(code_of(text).strip())
        except (ValueError, RecursionError):
            told.append(0.0)
            continue
        told.append(float(allowed(value, json.loads(schema) if isinstance(schema, str) else schema)))
    return told


def allowed(value: Any, schema: Any) -> bool:
    """Whether a schema allows a value."""
    if isinstance(schema, bool):
        return schema
    return (
        _is_of_type(value, schema.get("type"))
        and ("enum" not in schema or any(_same(value, one) for one in schema["enum"]))
        and ("const" not in schema or _same(value, schema["const"]))
        and all(allowed(value, one) for one in schema.get("allOf", ()))
        and ("anyOf" not in schema or any(allowed(value, one) for one in schema["anyOf"]))
        and ("oneOf" not in schema or sum(allowed(value, one) for one in schema["oneOf"]) == 1)
        and ("not" not in schema or not allowed(value, schema["not"]))
        and (not isinstance(value, dict) or _object(value, schema))
        and (not isinstance(value, list) or _array(value, schema))
        and (not isinstance(value, str) or _string(value, schema))
        and (not _is_number(value) or _number(value, schema))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_of_type(value: Any, kinds: Any) -> bool:
    if kinds is None:
        return True
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind in ("number", "integer") and isinstance(value, bool):
            continue
        if isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer()):
            return True
    return False


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _object(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    return (
        all(name in value for name in schema.get("required", ()))
        and schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value))
        and all(allowed(item, known.get(name, rest)) for name, item in value.items())
    )


def _array(value: list[Any], schema: dict[str, Any]) -> bool:
    unique = not schema.get("uniqueItems") or not any(_same(a, b) for i, a in enumerate(value) for b in value[:i])
    return (
        schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        and unique
        and all(allowed(item, schema.get("items", True)) for item in value)
    )


def _string(value: str, schema: dict[str, Any]) -> bool:
    return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)) and (
        "pattern" not in schema or re.search(schema["pattern"], value) is not None
    )


def _number(value: float, schema: dict[str, Any]) -> bool:
    step = schema.get("multipleOf")
    return (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        and (step is None or abs(value / step - round(value / step)) < 1e-9)
    )
