"""TextBlock: text as it is; and StartRow: the one line that enter acts on."""

from __future__ import annotations

from .lines import Line, Lines, wrapped


class TextBlock(Lines):
    """Text as it is."""

    def __init__(self, *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self._text = ""

    def show(self, text: str) -> None:
        """Draw a text."""
        self._text = text
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        return [line for text in self._text.splitlines() for line in wrapped(text, width, indent="    ")]


class StartRow(Lines, can_focus=True):
    """What enter does here."""

    def __init__(self) -> None:
        super().__init__()
        self._text, self._role = "", "dim"

    def show(self, text: str, role: str) -> None:
        """Draw what would happen."""
        self._text, self._role = text, role
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        return [[("▸ " if self.has_focus else "  ", "accent"), (self._text, self._role)]]

    def watch_has_focus(self, focused: bool) -> None:
        """Show the cursor, or take it away."""
        super().watch_has_focus(focused)
        self.redraw()
