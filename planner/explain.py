"""Turns what pydantic finds wrong with a recipe into messages that name file, line, field and the way out."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from .errors import RecipeError

if TYPE_CHECKING:
    import yaml

Lines = dict[tuple[str | int, ...], int]


def explain(model: type[BaseModel], error: ValidationError, source: str, lines: Lines) -> RecipeError:
    """All problems of one validation as one error, a line each.

    Args:
        model: what was validated against.
        source: the name of the file, for messages.
        lines: where each key stands, from :func:`line_numbers`; may be empty.
    """
    first, *rest = [_problem(model, item, source, lines) for item in _distinct(model, error)]
    return RecipeError(first.what, where=first.where, do="\n".join([first.do, *map(str, rest)]))


def line_numbers(node: yaml.Node | None, path: tuple[str | int, ...] = ()) -> Lines:
    """The 1-based line of every key and list item of a YAML document, by its path."""
    import yaml

    lines: Lines = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            lines[here] = key.start_mark.line + 1
            lines |= line_numbers(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            lines |= line_numbers(value, (*path, index))
    return lines


def _distinct(model: type[BaseModel], error: ValidationError) -> list[Any]:
    """One error per field: the branches of a union all complain about the same value."""
    seen: dict[tuple[Any, ...], Any] = {}
    for item in error.errors():
        path = _field_path(model, item["loc"])
        if path not in seen and path[:-1] in seen and not _is_field(model, path):
            path = path[:-1]  # a second branch of the union at path[:-1]
        if path not in seen or item["type"] in _BOUNDS:  # "at least 1" says more than "not 'auto'"
            seen[path] = item
    return sorted(seen.values(), key=lambda item: item["type"] == "missing")  # a misspelt key explains a missing one


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)


def _field_path(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[str | int, ...]:
    """The part of a pydantic location that the user wrote: union branches ('literal[...]', 'int') are dropped."""
    path: list[str | int] = []
    section: type[BaseModel] | None = model
    for part in loc:
        if section is not None and isinstance(part, str) and part in section.model_fields:
            path.append(part)
            section = _section_of(section.model_fields[part].annotation)
        elif isinstance(part, int):
            path.append(part)
        elif section is not None:  # an unknown key, or a union branch behind a scalar field
            path.append(part)
            section = None
    return tuple(path)


def _problem(model: type[BaseModel], item: Any, source: str, lines: Lines) -> RecipeError:
    path = _field_path(model, item["loc"])
    kind, raw = item["type"], str(item["msg"])
    if kind != "extra_forbidden" and len(path) > 1 and isinstance(path[-1], str) and not _is_field(model, path):
        path = path[:-1]  # a union branch, not a key
    field = ".".join(str(part) for part in path)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = source + (f":{line}" if line else "") + (f": {field}" if field else "")
    if kind == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        do = f"Did you mean {near[0]!r}?" if near else f"Known keys here: {', '.join(sorted(known))}."
        return RecipeError(f"unknown key {path[-1]!r}", where=where, do=do)
    if kind == "missing":
        return RecipeError(f"{field} is missing", where=where.removesuffix(f": {field}"), do=f"Add '{path[-1]}: …'.")
    if kind == "value_error":
        what, _, do = raw.removeprefix("Value error, ").partition("||")
        return RecipeError(what, where=where, do=do)
    allowed = _choices(model, path)
    value = item.get("input")
    bound = _BOUNDS.get(kind)
    if bound:
        limit = next(iter(item["ctx"].values()))
        return RecipeError(f"{value!r} is out of range: {field} must be {bound} {limit:g}", where=where)
    shown = f" (not {value!r})" if isinstance(value, str | int | float | bool) or value is None else ""
    if allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.6)
        what = f"must be {_one_of(allowed)}{shown}"
        return RecipeError(what, where=where, do=f"Did you mean {near[0]!r}?" if near else "")
    keys = _known_keys(model, path)
    do = f"Its keys: {', '.join(keys)}." if keys else ""
    shape = "a list of sources" if path == ("data",) else "a mapping of keys to values" if keys else raw.lower()
    return RecipeError(f"must be {shape}{shown}", where=where, do=do)


#: pydantic's range errors, in words.
_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def _is_field(model: type[BaseModel], path: tuple[str | int, ...]) -> bool:
    return path[-1] in _known_keys(model, path[:-1])


def _known_keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    section: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, str) and section is not None:
            field = section.model_fields.get(part)
            section = _section_of(field.annotation) if field else None
    return list(section.model_fields) if section is not None else []


def _choices(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """What a field accepts, in words, if part of it is a fixed set."""
    section: type[BaseModel] | None = model
    annotation: Any = None
    for part in path:
        if isinstance(part, str) and section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            section = _section_of(annotation)
    return _describe(annotation) if annotation is not None and section is None else []


def _describe(annotation: Any) -> list[str]:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    if getattr(annotation, "__origin__", None) is Literal:
        return [str(arg) for arg in get_args(annotation)]
    if annotation in names:
        return [names[annotation]]
    if getattr(annotation, "__origin__", None) is list:
        return ["a list"]
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        arguments = arguments[:1]
    return [word for arg in arguments if arg is not type(None) for word in _describe(arg)]


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
