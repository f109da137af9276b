"""Files of other tools, read as plain values of bounded size, with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..explain import line_numbers
from ..yaml_text import LONGEST, parse

#: Letters of a text, and levels of one value in another, that interpolation may come to.
_LONGEST_TEXT, _DEEPEST = 4096, 20
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


def read(path: Path) -> tuple[dict[str, Any], Mapping[tuple[str | int, ...], int]]:
    """The keys of a YAML (or JSON) file, and the line of each.

    Raises:
        RecipeError: the file is missing, too long, not UTF-8, not YAML, or no mapping of keys to values.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST + 1)
        if len(raw) > LONGEST:
            what = f"the file is longer than {LONGEST >> 10} KiB, which no training config is"
            raise RecipeError(what, where=str(path), do="Give the YAML file that you train with.")
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError("there is no such file", where=str(path), do="Check the path.") from None
    except (OSError, ValueError) as error:
        what, do = f"the file can't be read ({error})", "Give the YAML file that you train with, in UTF-8."
        raise RecipeError(what, where=str(path), do=do) from None
    tree, node = parse(text, str(path))
    if not isinstance(tree, dict) or not tree:
        what = "there are no keys in this file" if not tree else "this is no mapping of keys to values"
        raise RecipeError(what, where=str(path), do="Give the YAML file that you train with.")
    return _plain(tree), line_numbers(node)


def _plain(value: Any) -> Any:
    """Values that JSON has too: keys as text, dates as they are written, sets as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def referenced(value: Any) -> set[str]:
    """The keys of the file itself that ``${…}`` names, without what is below them."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return {name for part in parts for name in referenced(part)}
    found = _REFERENCE.findall(value) if isinstance(value, str) else []
    return {name.strip().partition(".")[0] for name in found}


def interpolate(tree: dict[str, Any], source: str, lines: Mapping[tuple[str | int, ...], int]) -> dict[str, Any]:
    """The same keys with ``${a.b}`` replaced by the value of that key (https://omegaconf.readthedocs.io).

    A resolver (``${oc.env:HOME}``) and a key that is not there stay as they are written: whether that matters depends
    on who reads it.

    Raises:
        RecipeError: a value stands for itself, or for more text than any path has.
    """

    known: dict[str, Any] = {}

    def value_of(value: Any, path: tuple[str | int, ...], within: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: value_of(part, (*path, key), within) for key, part in value.items()}
        if isinstance(value, list):
            return [value_of(part, (*path, index), within) for index, part in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        return text_of(value, path, within)

    def text_of(value: str, path: tuple[str | int, ...], within: tuple[str, ...]) -> Any:
        line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 0)
        where = f"{source}{f':{line}' if line else ''}: {'.'.join(map(str, path))}"

        def replaced(name: str) -> Any:
            name = name.strip()
            found: Any = tree
            for part in name.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            if found is None or isinstance(found, dict | list):
                return None
            if name in within:
                raise RecipeError(f"${{{name}}} stands for itself", where=where, do="Write the value.")
            if len(within) >= _DEEPEST:
                raise RecipeError(f"${{{name}}} is nested too deeply", where=where, do="Write the value.")
            if name not in known:
                known[name] = value_of(found, tuple(name.split(".")), (*within, name))
            return known[name]

        whole = _REFERENCE.fullmatch(value)
        if whole is not None:
            found = replaced(whole[1])
            return value if found is None else found
        parts: list[str] = []
        end = total = 0
        for match in _REFERENCE.finditer(value):
            found = replaced(match[1])
            parts += [value[end : match.start()], match[0] if found is None else str(found)]
            total += len(parts[-1]) + len(parts[-2])
            end = match.end()
            if total > _LONGEST_TEXT:
                raise RecipeError("this stands for more text than any path has", where=where, do="Write the value.")
        return "".join([*parts, value[end:]])

    result = value_of(tree, (), ())
    assert isinstance(result, dict)
    return result
