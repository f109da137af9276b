"""One field of a row, read or refused; every refusal names file, line and field."""

from __future__ import annotations

import json
from typing import Any

from ...planner.errors import DataError
from .files import Row

_TRUE, _FALSE = {"true", "yes", "1", "good"}, {"false", "no", "0", "bad"}


def string(row: Row, column: str, *, optional: bool = False) -> str:
    """A text; with ``optional``, '' where the column is missing or null.

    Raises:
        DataError: the column is missing, or holds something else.
    """
    value = row.values.get(column)
    if value is None and optional:
        return ""
    if column not in row.values:
        raise missing(row, column)
    if not isinstance(value, str):
        raise bad(row, column, f"must be text, not {kind(value)}")
    return value


def answer(row: Row, column: str) -> str:
    """A text that is more than white space."""
    text = string(row, column)
    if not text.strip():
        raise bad(row, column, "the answer is empty", "Fill it in, or remove the row.")
    return text


def boolean(row: Row, field: str, value: Any) -> bool:
    """True or false, as JSON, numbers and CSV files write it."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if isinstance(value, str | int) and text in _TRUE | _FALSE:
        return text in _TRUE
    if isinstance(value, float) and value in (0.0, 1.0):
        return value == 1.0
    raise bad(row, field, f"must be true or false, not {value!r}" if value is not None else "must be true or false")


def objects(row: Row, field: str, value: Any) -> tuple[dict[str, Any], ...]:
    """A list of objects, or the same as JSON text; None and '' are an empty list."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise bad(row, field, f"is not valid JSON ({error.msg} at column {error.colno})") from None
    if value is None or value == "":
        return ()
    items = [json.loads(item) if isinstance(item, str) and item.startswith("{") else item for item in as_list(value)]
    if not all(isinstance(item, dict) for item in items):
        raise bad(row, field, f"must be a list of objects, not {kind(value)}")
    return tuple(without_nulls(item) for item in items)


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as the only item of one."""
    return value if isinstance(value, list) else [value]


def without_nulls(tree: Any) -> Any:
    """Arrow gives every object all keys that any object has: nulls are what was not there."""
    if isinstance(tree, dict):
        return {key: without_nulls(value) for key, value in tree.items() if value is not None}
    return [without_nulls(value) for value in tree] if isinstance(tree, list) else tree


def missing(row: Row, column: str) -> DataError:
    """The error for a column that is not there."""
    found = ", ".join(row.values) or "none"
    do = "Add it, or remove the row; rows of another format belong into a source of their own."
    return DataError(f"column {column!r} is missing; the row has {found}", where=row.where, do=do)


def bad(row: Row, field: str, what: str, do: str = "Mend the row, or remove it.") -> DataError:
    """The error for a field that can't be used."""
    return DataError(what, where=f"{row.where}: {field}", do=do)


def kind(value: Any) -> str:
    """The JSON type of a value, in words."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
             str: "text", bytes: "bytes"}  # fmt: skip
    return names.get(type(value), "null" if value is None else type(value).__name__)
