"""LogView: the lines of a file that may grow, a screenful at a time, with what is searched for marked."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

from .lines import Line, Lines, wrapped

#: Lines kept; of a longer log, the newest.
KEPT = 20_000
#: What no log may do to the terminal: escape sequences, and control characters of both blocks.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """A line without what a terminal would obey; of a progress bar that redraws itself, the last picture."""
    kept = text.rstrip("\r\n").rpartition("\r")[2]
    return _ESCAPES.sub("", kept.expandtabs(4))


class LogView(Lines):
    """Lines with a place in them; :attr:`following` stays at the end as they grow."""

    TITLED = True
    can_focus = True

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self.following = True
        self.heading = "log"
        self.nothing = ""
        """What is said where there are no lines."""
        self.wanted = ""
        """Text that is marked wherever it stands, in any case."""
        self._lines_kept: deque[str] = deque(maxlen=KEPT)
        self._dropped = 0
        self._top = 0

    def clear(self) -> None:
        """Begin anew."""
        self._lines_kept.clear()
        self._dropped, self._top, self.following = 0, 0, True

    def add(self, lines: Iterable[str]) -> None:
        """More lines at the end."""
        for line in lines:
            if len(self._lines_kept) == KEPT:
                self._dropped += 1
                self._top = max(self._top - 1, 0)
            self._lines_kept.append(clean(line))
        self.redraw()

    @property
    def rows(self) -> int:
        """Lines that can be seen at once."""
        return max(self.size.height - 2, 1)

    @property
    def _last_top(self) -> int:
        return max(len(self._lines_kept) - self.rows, 0)

    def move(self, lines: int) -> None:
        """Go down, or up; the end is followed again once it is reached."""
        top = self._last_top if self.following else self._top
        self._top = min(max(top + lines, 0), self._last_top)
        self.following = self._top == self._last_top and lines > 0
        self.redraw()

    def find(self, direction: int) -> bool:
        """Go to the next line, or the one before, that holds :attr:`wanted`; whether there is one."""
        lines, needle = list(self._lines_kept), self.wanted.lower()
        at = len(lines) if self.following else self._top
        places = range(at + 1, len(lines)) if direction > 0 else range(min(at, len(lines)) - 1, -1, -1)
        for place in places:
            if needle and needle in lines[place].lower():
                self._top, self.following = place, False
                self.redraw()
                return True
        return False

    def title(self, width: int) -> Line:
        """What it is, where one is in it, and whether its end is followed."""
        total = self._dropped + len(self._lines_kept)
        last = min(self._dropped + (self._last_top if self.following else self._top) + self.rows, total)
        place = f"  {last:,} of {total:,}" if total else "  nothing yet"
        dropped = f", the first {self._dropped:,} are not kept" if self._dropped else ""
        return [(self.heading, "bold"), (place + dropped, "dim"), ("  following" if self.following else "", "good")]

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if not self._lines_kept and self.nothing:
            return wrapped(self.nothing, width, "dim")[:height]
        top = max(len(self._lines_kept) - height, 0) if self.following else self._top
        return [self._marked(self._lines_kept[n]) for n in range(top, min(top + height, len(self._lines_kept)))]

    def _marked(self, text: str) -> Line:
        needle = self.wanted.lower()
        if not needle or needle not in text.lower():
            return [(text, "")]
        line: Line = []
        rest = text
        while (at := rest.lower().find(needle)) >= 0:
            line += [(rest[:at], ""), (rest[at : at + len(needle)], "cursor")]
            rest = rest[at + len(needle) :]
        return [*line, (rest, "")]
