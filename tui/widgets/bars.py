"""The line at the top, which says where one is, and the line at the foot, which says what one can press."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from textual.events import Click

from ..keys import KEYS, Key, key_name
from .lines import Line, Lines, fitted, length, spread

#: Key, mode and title of each screen, from the table of keys.
MODES = [
    (key.keys, key.action.split("'")[1], key.help.partition(":")[0])
    for key in KEYS
    if key.action.startswith("app.mode(")
]


def rebound_modes(own: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """:data:`MODES` with the user's own keys."""
    return [(key_name(own.get(f"app.mode.{mode}", key).split(",")[0]), mode, label) for key, mode, label in MODES]


class Bar(Lines):
    """One line with keys on it, which a click presses."""

    def __init__(self) -> None:
        super().__init__()
        self._pressed: Mapping[str, str] = {}
        """Keys by what stands for them in the line."""

    def on_click(self, event: Click) -> None:
        """Press the key that the name under the pointer belongs to."""
        place, key = 0, ""
        for text, role in self._lines[0] if self._lines else ():
            if role in ("key", "cursor"):
                key = self._pressed.get(text.split()[0], "")
            elif role:
                key = ""
            place += cell_len(text)
            if event.x < place:
                if key and text.strip():
                    self.app.simulate_key(key)
                return


class TopBar(Bar):
    """The program's name, its screens with their keys, and this machine."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self._mode = mode
        self._machine = ""
        self._own: Mapping[str, str] = {}

    def show(self, machine: str, own: Mapping[str, str]) -> None:
        """Say which machine this is; ``own`` are the user's own keys."""
        self._machine, self._own = machine, own
        self._pressed = {
            key_name(first): first
            for first in (own.get(f"app.mode.{mode}", key).split(",")[0] for key, mode, _ in MODES)
        }
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        left: Line = [(" finetui ", "accent")]
        gap = " " if sum(len(label) + 4 for _, _, label in MODES) <= width else ""
        for key, mode, label in rebound_modes(self._own):
            here, name = mode == self._mode, f"{label} "
            left += [(f"{gap}{key} {name}", "cursor")] if here else [(f"{gap}{key} ", "key"), (name, "")]
        if length(left) > width:
            left = left[1:]
        at = next((n for n, (_, role) in enumerate(left) if role == "cursor"), 0)
        if length(left[: at + 1]) > width:  # where one is comes before what else there is
            left = [(text, role) for text, role in left if role]
        right: Line = [(f"{self._machine} ", "dim")]
        if length(left) + length(right) + 2 > width:
            room = width - length(left) - 2
            right = fitted(right, room) if room >= 12 else []
        return [spread(left, right, width) if right else fitted(left, width)]


class KeyBar(Bar):
    """As many keys as fit; help and quit always do."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: Sequence[Key] = ()

    def show(self, keys: Sequence[Key]) -> None:
        """List these keys, the most useful ones first."""
        self._keys = [key for key in keys if key.label]
        self._pressed = {key.shown: key.keys.split(",")[0] for key in self._keys}
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
