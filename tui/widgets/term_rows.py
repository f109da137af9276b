"""TermRows: the base of what shows figures of a plan in rows, one of which can be asked how it was reckoned."""

from __future__ import annotations

from textual.events import Click
from textual.message import Message

from ..keys import bindings
from .lines import Line, Lines


class TermRows(Lines, can_focus=True):
    """Rows with a cursor while focused; :meth:`names` are those that it stands on, in their order."""

    BINDINGS = bindings("terms")

    class Asked(Message):
        """How is this figure reckoned?"""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._at = 0

    def names(self) -> list[str]:
        """The terms that have a row, from above."""
        raise NotImplementedError

    @property
    def current(self) -> str:
        """The term under the cursor; empty while something else has the focus."""
        names = self.names()
        return names[min(self._at, len(names) - 1)] if self.has_focus and names else ""

    def mark(self, name: str) -> Line:
        """What stands before a row."""
        return [("▸ " if name == self.current else "  ", "accent")]

    def watch_has_focus(self, focused: bool) -> None:
        """Show the cursor, or take it away."""
        super().watch_has_focus(focused)
        self.redraw()

    def on_click(self, event: Click) -> None:
        """A click asks for the row below it."""
        lines = self.text.splitlines()
        words = lines[event.y].split() if event.y < len(lines) else []
        for number, name in enumerate(self.names()):
            if name in words[:2]:
                self._at = number
                self.redraw()
                self.action_explain()

    def action_term(self, direction: int) -> None:
        """Go to the row above or below; from the last one on to what comes next."""
        at = min(self._at, max(len(self.names()) - 1, 0)) + direction
        if 0 <= at < len(self.names()):
            self._at = at
            self.redraw()
        elif direction > 0:
            self.screen.focus_next()
        else:
            self.screen.focus_previous()

    def action_explain(self) -> None:
        """Ask."""
        if self.current:
            self.post_message(self.Asked(self.current))
