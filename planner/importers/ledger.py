"""Ledger: the keys of one file of another tool, and what became of each. Nothing of it can be dropped in silence."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Self

from ..errors import RecipeError
from ..secrets import secret_in

#: ``carried``: a key of ours says the same. ``default``: no key of the file, but what its tool does where it says
#: nothing and we would do otherwise. ``not needed``: without it the training is the same. ``not carried``: something is
#: lost, or has to be said otherwise. ``unknown``: nobody knows this key.
Outcome = Literal["carried", "default", "not needed", "not carried", "unknown"]
OUTCOMES: tuple[Outcome, ...] = ("carried", "default", "not needed", "not carried", "unknown")
Path = tuple[str | int, ...]
#: Values that switch an option off.
_OFF = (None, False, "", "no", "none", "None", "off", "never", "disabled")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_SECRET_KEY = re.compile(r"(?i)(?:api|access)_?key|secret|passw|(?:hub|auth)_token|webhook")
_WIDEST = 48


@dataclass(frozen=True)
class Fate:
    """What became of one key: ``to`` names ours, ``why`` says what it did or why it is not needed, ``do`` what to do
    instead. ``line`` is 0 where the key stands in no file."""

    key: str
    line: int
    value: str
    outcome: Outcome
    to: str = ""
    why: str = ""
    do: str = ""


@dataclass
class _Book:
    """What all views of one file share."""

    tree: dict[str, Any]
    source: str
    lines: Mapping[Path, int]
    recipe: dict[str, Any] = field(default_factory=dict)
    fates: dict[Path, Fate] = field(default_factory=dict)
    defaults: list[Fate] = field(default_factory=list)
    places: dict[Path, int] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)


class Ledger:
    """A mapping of a file, whose keys are read by type and then settled: carried, idle or lost.

    Args:
        tree: plain values, keys as text.
        source: the file, for messages.
        lines: where each key stands.
    """

    def __init__(self, tree: dict[str, Any], source: str, lines: Mapping[Path, int]) -> None:
        self._book = _Book(tree, source, lines)
        self._prefix: Path = ()

    @property
    def recipe(self) -> dict[str, Any]:
        """What has been carried so far, as a recipe's dictionary."""
        return self._book.recipe

    @property
    def places(self) -> dict[Path, int]:
        """The line that each carried key of the recipe came from."""
        return self._book.places

    def at(self, *path: str | int) -> Self:
        """The mapping at a path below this one; an empty one if there is none.

        Raises:
            RecipeError: there is something that is no mapping.
        """
        view = type(self).__new__(type(self))
        view._book, view._prefix = self._book, (*self._prefix, *path)
        if isinstance(path[0], str):
            self._know(path[0])
        value = _find(self._book.tree, view._prefix)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(path[0] if len(path) == 1 else path, "a mapping of keys to values")
        return view

    def items(self, key: str) -> int:
        """How many items the list at a key has; a mapping alone counts as one.

        Raises:
            RecipeError: it is neither.
        """
        value = self.raw(key)
        if value is None:
            self._empty(key)
            return 0
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.wrong(key, "a list of mappings")
        if not value:
            self.idle(key, "it is empty")
        return len(value)

    def here(self) -> list[str]:
        """The keys of this mapping."""
        return list(_find(self._book.tree, self._prefix) or ())

    def raw(self, key: str | Path) -> Any:
        """The value at a key, whatever it is; None if it is missing."""
        self._know(key)
        return _find(self._book.tree, self._path(key))

    def has(self, key: str) -> bool:
        """Whether a key says something."""
        return self.raw(key) is not None

    def settled(self, key: str) -> bool:
        """Whether it is known already what becomes of a key."""
        return self._path(key) in self._book.fates

    # --- values by type; None where the file says nothing

    def text(self, key: str) -> str | None:
        value = self._value(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool | int | float):
            return str(value).lower() if isinstance(value, bool) else str(value)
        raise self.wrong(key, "text")

    def flag(self, key: str) -> bool | None:
        value = self._value(key)
        if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
            return value.lower() in _TRUE
        if value in (0, 1) and not isinstance(value, float):
            return bool(value)
        if value is None:
            return None
        raise self.wrong(key, "true or false")

    def number(self, key: str, *, least: float = -math.inf) -> float | None:
        """A finite number; ``1e-5`` is one, which YAML reads as text."""
        value = self._value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self.wrong(key, "a number")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise self.wrong(key, "a number") from None
        if not math.isfinite(number) or number < least:
            raise self.wrong(key, f"a number of {least:g} or more" if least > -math.inf else "a finite number")
        return number

    def integer(self, key: str, *, least: int = -(2**53)) -> int | None:
        number = self.number(key)
        if number is None:
            return None
        if number != int(number) or not least <= number <= 2**53:
            raise self.wrong(key, f"a whole number of {least} or more" if least > -(2**53) else "a whole number")
        return int(number)

    def names(self, key: str) -> list[str] | None:
        """A list of texts, or several in one text with commas."""
        value = self._value(key)
        if value is None:
            return None
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of names")
        return list(dict.fromkeys(item.strip() for item in value if item.strip()))

    # --- what becomes of a key

    def carry(self, keys: str | Sequence[str], to: str, value: Any, why: str = "") -> None:
        """Set a key of the recipe because of one or several keys here; without any of them, nothing is set."""
        there = self._there(keys)
        if there:
            _put(self._book.recipe, to, value)
        for key in there:
            before = self._book.fates.get(self._path(key))
            if before is not None and before.outcome == "carried" and before.to != to:
                to_all, why_all = f"{before.to}, {to}", "; ".join(part for part in (before.why, why) if part)
                self._settle(key, "carried", to=to_all, why=why_all)
            else:
                self._settle(key, "carried", to=to, why=why)
            self._book.places.setdefault(_steps(to), self._line(key))

    def default(self, to: str, value: Any, why: str) -> None:
        """Set a key of the recipe to what the other tool does where its file says nothing."""
        _put(self._book.recipe, to, value)
        self._book.defaults.append(Fate("", 0, _shown("", value), "default", to=to, why=why))

    def idle(self, keys: str | Sequence[str], why: str) -> None:
        """Not needed: those of the keys of which nothing else has been said."""
        for key in self._there(keys, empty=True):
            if not self.settled(key):
                self._settle(key, "not needed", why=why if self.has(key) else "it is empty")

    def lose(self, keys: str | Sequence[str], what: str, do: str) -> None:
        """Not carried over, or not all of it: what it would have done, and what to do instead."""
        for key in self._there(keys):
            before = self._book.fates.get(self._path(key))
            self._settle(key, "not carried", to=before.to if before else "", why=what, do=do)

    def retract(self, section: str, what: str, do: str) -> None:
        """Take a section of the recipe back: the keys that made it are not carried over after all."""
        self._book.recipe.pop(section, None)
        self._book.defaults = [fate for fate in self._book.defaults if not fate.to.startswith(f"{section}.")]
        for path, fate in self._book.fates.items():
            if fate.outcome == "carried" and fate.to.startswith(f"{section}."):
                self._book.fates[path] = replace(fate, outcome="not carried", to="", why=what, do=do)

    def without(self, to: str, why: str) -> bool:
        """Take one key of the recipe out again, because it has no effect; whether it was there."""
        *way, last = _steps(to)
        target = _find(self._book.recipe, tuple(way))
        if not isinstance(target, dict) or last not in target:
            return False
        del target[last]
        for path, fate in self._book.fates.items():
            if fate.outcome == "carried" and fate.to == to:
                self._book.fates[path] = replace(fate, outcome="not needed", to="", why=why)
        self._book.defaults = [fate for fate in self._book.defaults if fate.to != to]
        return True

    def table(self, idle: Mapping[str, str], lost: Mapping[str, str]) -> None:
        """Settle what is left by tables: key to why it is not needed, and key to ``what it did||what to do``."""
        self._book.known |= idle.keys() | lost.keys() if not self._prefix else set()
        for key in self.here():
            if self.settled(key):
                continue
            value = _find(self._book.tree, (*self._prefix, key))
            if key in idle:
                self.idle(key, idle[key])
            elif key in lost and (value in ([], {}) or any(value is off or value == off for off in _OFF)):
                self.idle(key, "it is empty" if value in (None, "", [], {}) else "it is off")
            elif key in lost:
                what, _, do = lost[key].partition("||")
                self.lose(key, what, do)

    def wrong(self, key: str | int | Path, wanted: str) -> RecipeError:
        """The error of a value that can't be what it is."""
        path = self._path(key)
        value = _find(self._book.tree, path)
        shown = f" (not {_shown(str(path[-1]), value)})" if value is not None else ""
        return RecipeError(f"must be {wanted}{shown}", where=self.where(key))

    def where(self, key: str | int | Path) -> str:
        """File, line and key, for messages."""
        line = self._line(key)
        return f"{self._book.source}{f':{line}' if line else ''}: {_dotted(self._path(key))}"

    def fates(self, tool: str) -> tuple[Fate, ...]:
        """What became of each key, in the order of the file; then the defaults. What nobody asked for is unknown.

        Args:
            tool: whose file it is, by name.
        """
        names = sorted(self._book.known)
        for key in names:
            if key in self._book.tree and not self.settled(key) and self._book.tree[key] in (None, [], {}):
                self.idle(key, "it is empty")
        paths = self._paths(self._book.tree, ())
        found = [self._book.fates.get(path) or self._unknown(path, names, tool) for path in paths]
        return (*found, *self._book.defaults)

    def _paths(self, value: Any, path: Path) -> Iterator[Path]:
        if path in self._book.fates:
            yield path
        elif isinstance(value, dict) and value:
            for key, part in value.items():
                yield from self._paths(part, (*path, key))
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, part in enumerate(value):
                yield from self._paths(part, (*path, index))
        elif path:
            yield path

    def _unknown(self, path: Path, names: Sequence[str], tool: str) -> Fate:
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.8) if len(path) == 1 else []
        do = f"Did you mean {near[0]}?" if near else "Look whether it had an effect there."
        value = _shown(str(path[-1]), _find(self._book.tree, path))
        return Fate(_dotted(path), self._line_of(path), value, "unknown", why=f"{tool} has no such key", do=do)

    def _value(self, key: str) -> Any:
        value = self.raw(key)
        if value is None:
            self._empty(key)
        return value

    def _empty(self, key: str) -> None:
        if self._path(key)[-1] in self.here() and not self.settled(key):
            self.idle(key, "it is empty")

    def _there(self, keys: str | Sequence[str], *, empty: bool = False) -> list[str]:
        listed = [keys] if isinstance(keys, str) else keys
        for key in listed:
            self._know(key)
        return [key for key in listed if key in self.here() and (empty or self.raw(key) is not None)]

    def _know(self, key: str | Path) -> None:
        if not self._prefix and isinstance(key, str):
            self._book.known.add(key)

    def _settle(self, key: str, outcome: Outcome, *, to: str = "", why: str = "", do: str = "") -> None:
        path = self._path(key)
        value = _shown(key, _find(self._book.tree, path))
        self._book.fates[path] = Fate(_dotted(path), self._line(key), value, outcome, to, why, do)

    def _path(self, key: str | int | Path) -> Path:
        return (*self._prefix, *key) if isinstance(key, tuple) else (*self._prefix, key)

    def _line(self, key: str | int | Path) -> int:
        return self._line_of(self._path(key))

    def _line_of(self, path: Path) -> int:
        return next((self._book.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._book.lines), 0)


def _find(tree: Any, path: Path) -> Any:
    for part in path:
        if isinstance(tree, list):
            tree = tree[part] if isinstance(part, int) and part < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _steps(to: str) -> Path:
    return tuple(int(part) if part.isdigit() else part for part in to.split("."))


def _put(tree: dict[str, Any], to: str, value: Any) -> None:
    """Set a dotted key; a number is the place in a list, which grows by one item at most."""
    steps: tuple[Any, ...] = _steps(to)
    last, target = steps[-1], tree
    for part, following in pairwise(steps):
        new: Any = [] if isinstance(following, int) else {}
        if isinstance(target, list) and part == len(target):
            target.append(new)
        target = target[part] if isinstance(target, list) else target.setdefault(part, new)
    if isinstance(target, list) and last == len(target):
        target.append(value)
    else:
        target[last] = value


def _dotted(path: Path) -> str:
    """``datasets[0].path``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _shown(key: str, value: Any) -> str:
    """A value in a few characters; of a secret nothing."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if (_SECRET_KEY.search(key) and isinstance(value, str) and value) or secret_in(text):
        return "***"
    text = " ".join(text.split())
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"
