"""Whether what was read back from a file has the kinds of value that a dataclass declares.

Run directories are copied between machines and people, and edited by hand: a reader checks them once, where it reads,
so that nobody behind it has to expect a list where a number belongs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

Check = Callable[[Any], bool]
#: Larger whole numbers are no count of anything, and overflow what is computed with them.
_LARGEST = 2**63
_WORDS = ("nan", "inf", "-inf")


def strange_field(kind: type, tree: Mapping[str, Any]) -> str | None:
    """The first key of ``tree`` whose value is not of the kind that the dataclass ``kind`` declares for it.

    Numbers may be given as the words that stand for those that are not finite; fields whose kinds are not plain values,
    and keys that the dataclass does not know, are not looked at.
    """
    checks = _checks(kind)
    for name, value in tree.items():
        check = checks.get(name)
        if check is not None and not check(value):
            return name
    return None


@cache
def _checks(kind: type) -> dict[str, Check]:
    hints = get_type_hints(kind)
    return {field.name: _check(hints[field.name]) for field in dataclasses.fields(kind)}


def _check(hint: Any) -> Check:
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, inside = get_origin(hint), get_args(hint)
    if origin is list:
        item = _check(inside[0])
        return lambda value: isinstance(value, list | tuple) and all(item(part) for part in value)
    if origin is dict:
        item = _check(inside[1])
        return lambda value: isinstance(value, dict) and all(item(part) for part in value.values())
    if origin is not None and str(origin) == "typing.Literal":
        return lambda value: isinstance(value, str | int | bool) and value in inside
    if type(None) in inside or "Union" in str(type(hint)) or "Union" in str(origin):
        parts = [_check(part) for part in inside]
        return lambda value: any(part(value) for part in parts)
    return lambda value: True


def _is_number(value: Any) -> bool:
    if type(value) is float or value in _WORDS:
        return True
    return type(value) is int and -_LARGEST < value < _LARGEST


_PLAIN: dict[Any, Check] = {
    str: lambda value: isinstance(value, str),
    bool: lambda value: isinstance(value, bool),
    int: lambda value: (
        (type(value) is int or (type(value) is float and math.isfinite(value))) and -_LARGEST < value < _LARGEST
    ),
    float: lambda value: not isinstance(value, list | dict) and _is_number(value),
    type(None): lambda value: value is None,
    Any: lambda value: True,
}
