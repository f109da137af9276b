"""What differs between a recipe and the one it came from, line by line, as YAML."""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Literal

from .form import Tree

#: ``+`` is new, ``-`` is gone, a blank is as it was.
Mark = Literal["+", "-", " "]


def changes(new: Tree, old: Tree | None) -> list[tuple[Mark, str]]:
    """The lines of a recipe, and between them those of ``old`` that are gone; without ``old`` all are as they were."""
    now = _lines(new)
    if old is None:
        return [(" ", line) for line in now]
    # In the order of the old one, so that a key that only moved is no change.
    before, now = _lines(old), _lines({key: new[key] for key in sorted(new, key=_order(old))})
    found: list[tuple[Mark, str]] = []
    for kind, a, b, c, d in SequenceMatcher(None, before, now, autojunk=False).get_opcodes():
        if kind == "equal":
            found += [(" ", line) for line in now[c:d]]
        else:
            found += [("-", line) for line in before[a:b]]
            found += [("+", line) for line in now[c:d]]
    return found


def _order(old: Tree) -> Callable[[str], int]:
    places = {key: number for number, key in enumerate(old)}
    return lambda key: places.get(key, len(places))


def _lines(tree: Tree) -> list[str]:
    from yaml import safe_dump

    return safe_dump(tree, sort_keys=False, allow_unicode=True, width=200).splitlines()
