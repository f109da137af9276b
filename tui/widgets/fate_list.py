"""FateList: what became of each key of another tool's file. As high as needed: put it into something that scrolls."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from .lines import Line, Lines, fitted, length, wrapped

if TYPE_CHECKING:
    from ...planner.importers import Imported, Outcome

#: What needs a look comes first, where the eye is.
_ORDER: tuple[Outcome, ...] = ("unknown", "not carried", "default", "carried", "not needed")
_ROLES: dict[Outcome, str] = {
    "unknown": "bad", "not carried": "warn", "default": "accent", "carried": "good", "not needed": "dim",
}  # fmt: skip
#: Share of the width that keys and their values may take, and the cells before them.
_KEYS, _INDENT = 0.42, 2


class FateList(Lines):
    """How the file was read, how its keys came out in all, then the keys: theirs on the left, ours on the right."""

    def __init__(self) -> None:
        super().__init__()
        self._found: Imported | None = None
        self._asked: list[Line] = []
        self._words: tuple[str, str] = ("reading…", "dim")

    def show(self, found: Imported | None, asked: list[Line], words: str = "", role: str = "bad") -> None:
        """Draw what was found; without it, ``words`` say why. ``asked`` stands above."""
        self._found, self._asked, self._words = found, asked, (words, role)
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if self._found is None:
            return [*self._asked, [], *wrapped(self._words[0], width, self._words[1])]
        from ..import_view import GLYPHS, TITLES, rows_of, summary

        lines = [*self._asked, [], *wrapped(summary(self._found), width, "bold")]
        for outcome in _ORDER:
            fates = [fate for fate in self._found.fates if fate.outcome == outcome]
            if fates:
                lines += [[], [(f"{TITLES[outcome]} ({len(fates)})", _ROLES[outcome])]]
            for key, told in rows_of(fates):
                lines += _row(GLYPHS[outcome], _ROLES[outcome], key, told, width)
        return lines


def _row(glyph: str, role: str, key: str, told: str, width: int) -> list[Line]:
    """One key beside what is told of it, both broken into lines of their own column."""
    left = max(int(width * _KEYS) - _INDENT - 2, 8)
    right = max(width - _INDENT - left - 2, 8)
    names, words = wrapped(key, left, indent="  "), wrapped(told, right) if told else []
    lines: list[Line] = []
    nothing: Line = []
    for name, word in zip_longest(names, words, fillvalue=nothing):
        mark: Line = [("  ", "") if lines else (f"{glyph} ", role)]
        line = [*mark, *fitted(name, left), ("  ", ""), *word]
        lines.append(line if length(line) <= width else fitted(line, width))
    return lines
