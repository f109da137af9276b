"""The line at the top, which says where one is, and the line at the foot, which says what one can press."""

from __future__ import annotations

from collections.abc import Sequence

from ..keys import KEYS, Key
from .lines import Line, Lines, fitted, length, spread

#: Key, mode and title of each screen, from the table of keys.
MODES = [
    (key.keys, key.action.split("'")[1], key.help.partition(":")[0])
    for key in KEYS
    if key.action.startswith("app.mode(")
]


class TopBar(Lines):
    """The program's name, its screens with their keys, and this machine."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self._mode = mode
        self._machine = ""

    def show(self, machine: str) -> None:
        """Say which machine this is."""
        self._machine = machine
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        left: Line = [(" finetui ", "accent")]
        for key, mode, label in MODES:
            left += [(f" {key} {label} ", "cursor")] if mode == self._mode else [(f" {key} ", "key"), (f"{label} ", "")]
        if length(left) > width:
            left = left[1:]
        right: Line = [(f"{self._machine} ", "dim")]
        if length(left) + length(right) + 2 > width:
            room = width - length(left) - 2
            right = fitted(right, room) if room >= 12 else []
        return [spread(left, right, width) if right else fitted(left, width)]


class KeyBar(Lines):
    """As many keys as fit; help and quit always do."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: Sequence[Key] = ()

    def show(self, keys: Sequence[Key]) -> None:
        """List these keys, the most useful ones first."""
        self._keys = [key for key in keys if key.label]
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        last = [key for key in self._keys if key.scope == "app"]
        end: Line = [span for key in last for span in _shown(key)]
        line: Line = [(" ", "")]
        for key in self._keys:
            if key.scope == "app":
                continue
            if length(line) + length(_shown(key)) + length(end) > width:
                break
            line += _shown(key)
        return [fitted([*line, *end], width)]


def _shown(key: Key) -> Line:
    return [(key.shown, "key"), (f" {key.label}  ", "")]
